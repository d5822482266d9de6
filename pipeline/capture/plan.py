"""The plan of a capture: one pass over the corpus, which leaves it tokenized and packed, shard by shard.

Every record is read, parsed and tokenized once, here; what cannot be used stops here, before a teacher loads. The
sequences wait in a local folder (a few bytes a token, a few hundredths of what the cache will take) until they are
captured; the plan itself is remembered, so that the same command knows its cache without reading the corpus again.
"""

from __future__ import annotations

import dataclasses
import os
import secrets
import shutil
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from pipeline.cache import manifest as manifests
from pipeline.cache.leases import hold_lease
from pipeline.cache.schema import SCHEMA_VERSION
from pipeline.cache.sequence_files import sequence_file, write_sequence_file
from pipeline.capture.plan_lookup import PlanFolder, state_of
from pipeline.config.schema import CaptureConfig, CompletionMode, Kind
from pipeline.core.files import sync_files
from pipeline.core.object_store import write_json
from pipeline.core.progress import log
from pipeline.core.types import InputError, Manifest
from pipeline.data.records import MalformedRecords, RawChunk, Text, open_text, raw_records, read_chunks
from pipeline.data.tokenize import read_sequences, text_hash
from pipeline.models import loading as models
from pipeline.models.compatibility import check_window
from pipeline.models.paths import model_folder
from pipeline.models.tokenizer import load_tokenizer, text_settings, tokenizer_hash, vocabulary_size

CORPUS_A_PROCESS_BYTES = 4 << 20  # starting a process takes longer than tokenizing this much


def make_plan(config: CaptureConfig, request: PlanFolder, *, with_sequences: bool = True) -> Manifest:
    """Plan a capture, or wait for a process that is planning the same; the result is remembered.

    Without `with_sequences` a plan is enough whose sequences are captured and gone.
    """
    teacher = models.resolve_dtype(config.teacher)
    folder = model_folder(teacher.path, revision=teacher.revision, with_code=teacher.trust_remote_code)
    tokenizer = tokenizer_of(folder, teacher.trust_remote_code)
    check_window(folder, config.window)
    if config.k > vocabulary_size(tokenizer):
        raise InputError(
            f"k: expected at most {vocabulary_size(tokenizer)} (the vocabulary of {folder}), found {config.k}"
        )
    if config.corpus.end_token and tokenizer.eos_token_id is None:
        raise InputError("corpus: expected a tokenizer with an end token, found none; set corpus.end_token=false")
    try:
        request.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{request.folder}: expected a folder to write into, found {error.strerror}; choose another with plans_dir="
        ) from error
    while True:
        with hold_lease(request.folder / "claim", lease_seconds=config.lease_seconds) as held:
            manifest = request.load()
            if manifest is not None and (request.sequences.exists() or not with_sequences):
                return manifest
            if held:
                return _make(dataclasses.replace(config, teacher=teacher), folder, tokenizer, request)
        log.info("%s: another process is planning this capture; waiting", request.folder)
        time.sleep(min(1.0, config.lease_seconds / 4))


def _make(config: CaptureConfig, folder: Path, tokenizer: Any, request: PlanFolder) -> Manifest:
    text = corpus_of(config)
    before = state_of([*text.files, folder])
    for left in request.folder.glob(".*.tmp"):  # of planners that were killed
        if time.time() - left.stat().st_mtime > config.lease_seconds:
            shutil.rmtree(left, ignore_errors=True)
    spool = request.folder / f".{os.getpid()}.{secrets.token_hex(4)}.tmp"
    spool.mkdir()
    try:
        with ThreadPoolExecutor(2) as beside:
            corpus_sha256 = beside.submit(text_hash, text)
            weights_sha256 = beside.submit(models.weights_hash, folder)
            num_records = tokenize(config, text, folder, spool)
            tokenizer_sha256 = tokenizer_hash(tokenizer)
        hashes = {"corpus": corpus_sha256.result(), "teacher_weights": weights_sha256.result()}
        manifest = make_manifest(config, tokenizer, num_records, {**hashes, "tokenizer": tokenizer_sha256})
        if state_of([*text.files, folder]) != before:
            raise InputError("corpus: expected files that stay as they are, found one changed while it was read; retry")
        sync_files(spool)
        shutil.rmtree(request.sequences, ignore_errors=True)
        spool.rename(request.sequences)
    except OSError as error:
        raise InputError(
            f"{spool}: expected to write the tokenized corpus, found {error.strerror or error}; make room, or choose "
            "another folder with plans_dir="
        ) from error
    finally:
        shutil.rmtree(spool, ignore_errors=True)
    write_json(manifests.manifest_path(request.folder), dataclasses.asdict(manifest))
    return manifest


def corpus_of(config: CaptureConfig) -> Text:
    """The corpus as it is to be read."""
    completes = config.complete.how is not CompletionMode.none
    return dataclasses.replace(open_text(config.corpus, "corpus"), completes=completes)


def make_manifest(config: CaptureConfig, tokenizer: Any, num_records: int, hashes: dict[str, str]) -> Manifest:
    """The promise of a cache: all that changes its content (`hashes` of what it is read from), and its shards' size."""
    complete = config.complete
    made_of = {
        **hashes,
        "schema_version": SCHEMA_VERSION,
        "teacher_num_layers": config.teacher.num_layers,
        "teacher_dtype": config.teacher.dtype.name,
        **text_settings(tokenizer),
        "columns": dataclasses.asdict(config.corpus.columns),
        "targets": config.corpus.targets.name,
        "malformed": config.corpus.malformed.name,
        "end_token": config.corpus.end_token,
        "window": config.window,
        "records_per_shard": config.records_per_shard,
        "kind": config.kind.name,
        "k": 0 if config.kind is Kind.sampled else config.k,
        "draws": 0 if config.kind is Kind.topk else config.draws,
        "draw_seed": 0 if config.kind is Kind.topk else config.seed,
        "temperatures": sorted(config.temperatures),
    }
    if complete.how is not CompletionMode.none:
        made_of["complete"] = {**dataclasses.asdict(complete), "how": complete.how.name}
    return Manifest(
        schema_version=SCHEMA_VERSION,
        fingerprint=manifests.fingerprint(made_of),
        made_of=made_of,
        kind=made_of["kind"],
        k=made_of["k"],
        draws=made_of["draws"],
        draw_seed=made_of["draw_seed"],
        temperatures=tuple(sorted(config.temperatures)),
        vocabulary_size=vocabulary_size(tokenizer),
        window=config.window,
        num_records=num_records,
        num_shards=-(-num_records // config.records_per_shard),
        records_per_shard=config.records_per_shard,
    )


# --------------------------------------------------------------------------------------------- the pass


def tokenize(config: CaptureConfig, text: Text, folder: Path, spool: Path) -> int:
    """Tokenize and pack every record into a file a shard; returns the number of records.

    One process reads, the others tokenize whole shards; at most a few shards are in memory at once.
    """
    started, num_records, num_rows, num_skipped = time.monotonic(), 0, 0, 0
    size = sum(file.stat().st_size for file in text.files)
    processes = min(len(os.sched_getaffinity(0)), -(-size // CORPUS_A_PROCESS_BYTES))
    executor: Executor = (
        ProcessPoolExecutor(processes, mp_context=get_context("spawn")) if processes > 1 else ThreadPoolExecutor(1)
    )
    with executor:
        waiting: deque[Future[tuple[int, int]]] = deque()

        def gather(at_most: int) -> None:
            nonlocal num_rows, num_skipped
            while len(waiting) > at_most:
                rows, skipped = waiting.popleft().result()
                num_rows, num_skipped = num_rows + rows, num_skipped + skipped

        try:
            for index, group in enumerate(read_chunks(text.files, size=config.records_per_shard)):
                num_records += sum(len(piece.numbers) for piece in group)
                first_id = index * config.records_per_shard
                arguments = (group, text, folder, config.teacher.trust_remote_code, config.window, first_id)
                waiting.append(executor.submit(write_sequences, sequence_file(spool, index), *arguments))
                gather(2 * processes)
            gather(0)
        except BaseException:
            executor.shutdown(cancel_futures=True)
            raise
    if num_rows == 0:
        files = ", ".join(map(str, text.files))
        raise InputError(f"corpus: expected usable records, found none in {files} ({num_skipped} malformed)")
    if num_skipped:
        log.warning("corpus: %d malformed records skipped", num_skipped)
    log.info("planned %d records, %d sequences in %.1f s", num_records, num_rows, time.monotonic() - started)
    return num_records


@lru_cache(maxsize=1)
def tokenizer_of(folder: Path, trust_remote_code: bool) -> Any:
    """A folder's tokenizer, loaded once a process."""
    return load_tokenizer(folder, trust_remote_code=trust_remote_code)


def write_sequences(
    path: Path, group: Sequence[RawChunk], text: Text, folder: Path, trust_remote_code: bool, window: int, first_id: int
) -> tuple[int, int]:
    """The records of a shard, tokenized and packed, into one file; returns its rows and the records skipped."""
    tokenizer = tokenizer_of(folder, trust_remote_code)
    malformed = MalformedRecords(skip=text.skip_malformed)
    packed = read_sequences(raw_records(group), text, tokenizer, malformed, window=window, first_id=first_id)
    num_rows = write_sequence_file(path, packed, num_skipped=lambda: malformed.count)
    return num_rows, malformed.count
