"""The plan of a capture: one pass over the corpus, which is tokenized, packed and written as one file per shard.

Each record is read, parsed and tokenized once, here, so a record that cannot be used stops the capture before the
teacher is loaded. The sequences stay in a local folder until they are captured; they take a few bytes per token, a few
percent of the finished cache. The manifest stays there too, so the same command finds its cache without reading the
corpus again.
"""

from __future__ import annotations

import dataclasses
import math
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
from pipeline.capture.plan_lookup import PlanFolder, file_states
from pipeline.config.schema import CaptureConfig, CompletionMode, Kind
from pipeline.core.files import sync_files
from pipeline.core.object_store import write_json
from pipeline.core.progress import log
from pipeline.core.types import InputError, Manifest
from pipeline.data.records import MalformedRecords
from pipeline.data.text_files import RawChunk, Text, open_text, raw_records, read_chunks
from pipeline.data.tokenize import read_sequences, text_hash
from pipeline.models.compatibility import check_window
from pipeline.models.loading import resolve_dtype, weights_hash
from pipeline.models.paths import model_folder
from pipeline.models.tokenizer import chat_template_and_end_token, load_tokenizer, tokenizer_hash, vocabulary_size

CORPUS_BYTES_PER_PROCESS = 4 << 20  # starting a process takes longer than tokenizing this much


def make_plan(config: CaptureConfig, plan: PlanFolder, *, with_sequences: bool = True) -> Manifest:
    """Plan a capture, or wait for another process that is planning the same one; returns the manifest.

    The plan is kept in its folder. With `with_sequences=False` an existing manifest is enough: its sequences may have
    been captured and deleted. InputError for options that do not fit the teacher, and for records that cannot be used.
    """
    teacher = resolve_dtype(config.teacher)
    folder = model_folder(teacher.path, revision=teacher.revision, with_code=teacher.trust_remote_code)
    tokenizer = cached_tokenizer(folder, teacher.trust_remote_code)
    check_window(folder, config.window)
    if config.k > vocabulary_size(tokenizer):
        raise InputError(
            f"k: expected at most {vocabulary_size(tokenizer)} (the vocabulary of {folder}), found {config.k}; choose "
            "a smaller k"
        )
    if config.corpus.end_token and tokenizer.eos_token_id is None:
        raise InputError("corpus: expected a tokenizer with an end token, found none; set corpus.end_token=false")
    try:
        plan.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{plan.folder}: expected a folder to write into, found {error.strerror}; choose another with plans_dir="
        ) from error
    while True:
        with hold_lease(plan.folder / "lease", lease_seconds=config.lease_seconds) as held:
            manifest = plan.load()
            if manifest is not None and (plan.sequences.exists() or not with_sequences):
                return manifest
            if held:
                return _write_plan(dataclasses.replace(config, teacher=teacher), folder, tokenizer, plan)
        log.info("%s: another process is planning this capture; waiting", plan.folder)
        time.sleep(min(1.0, config.lease_seconds / 4))


def _write_plan(config: CaptureConfig, folder: Path, tokenizer: Any, plan: PlanFolder) -> Manifest:
    """Tokenize the corpus into the plan's folder and write the manifest last; `folder` is the teacher's."""
    text = open_corpus(config)
    states_before = file_states([*text.files, folder])
    for leftover in plan.folder.glob(".*.tmp"):  # of processes that were killed while planning
        if time.time() - leftover.stat().st_mtime > config.lease_seconds:
            shutil.rmtree(leftover, ignore_errors=True)
    unfinished = plan.folder / f".{os.getpid()}.{secrets.token_hex(4)}.tmp"
    unfinished.mkdir()
    try:
        with ThreadPoolExecutor(2) as hashing:  # while this thread tokenizes
            corpus_sha256 = hashing.submit(text_hash, text)
            weights_sha256 = hashing.submit(weights_hash, folder)
            num_records = tokenize_corpus(config, text, folder, unfinished)
            tokenizer_sha256 = tokenizer_hash(tokenizer)
        hashes = {"corpus": corpus_sha256.result(), "teacher_weights": weights_sha256.result()}
        manifest = make_manifest(config, tokenizer, num_records, {**hashes, "tokenizer": tokenizer_sha256})
        if file_states([*text.files, folder]) != states_before:
            raise InputError(
                "corpus: expected files that do not change, found one changed while it was read; run again"
            )
        sync_files(unfinished)
        shutil.rmtree(plan.sequences, ignore_errors=True)
        unfinished.rename(plan.sequences)
    except OSError as error:
        raise InputError(
            f"{unfinished}: expected to write the tokenized corpus, found {error.strerror or error}; free disk space, "
            "or choose another folder with plans_dir="
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    write_json(manifests.manifest_path(plan.folder), dataclasses.asdict(manifest))
    return manifest


def open_corpus(config: CaptureConfig) -> Text:
    """The corpus files and how to read them: with `complete`, prompts without a completion are allowed."""
    completes = config.complete.how is not CompletionMode.none
    return dataclasses.replace(open_text(config.corpus, "corpus"), completes=completes)


def make_manifest(config: CaptureConfig, tokenizer: Any, num_records: int, hashes: dict[str, str]) -> Manifest:
    """The manifest of a cache. `hashes` are the sha256 of its inputs; with the options they make the fingerprint."""
    complete = config.complete
    made_of = {
        **hashes,
        "schema_version": SCHEMA_VERSION,
        "teacher_num_layers": config.teacher.num_layers,
        "teacher_dtype": config.teacher.dtype.name,
        **chat_template_and_end_token(tokenizer),
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
    if config.corpus.choices is not None:
        made_of["choices"] = config.corpus.choices
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
        num_shards=math.ceil(num_records / config.records_per_shard),
        records_per_shard=config.records_per_shard,
    )


# ----------------------------------------------------------------------------- one pass over the corpus


def tokenize_corpus(config: CaptureConfig, text: Text, teacher_folder: Path, sequences: Path) -> int:
    """Tokenize and pack each record, and write one file per shard into `sequences`; returns the number of records.

    This process reads the corpus; others tokenize one shard each. At most a few shards are in memory at once.
    """
    started, num_records, num_rows, num_skipped = time.monotonic(), 0, 0, 0
    corpus_bytes = sum(file.stat().st_size for file in text.files)
    num_processes = min(len(os.sched_getaffinity(0)), math.ceil(corpus_bytes / CORPUS_BYTES_PER_PROCESS))
    executor: Executor = ThreadPoolExecutor(1)
    if num_processes > 1:
        executor = ProcessPoolExecutor(num_processes, mp_context=get_context("spawn"))
    with executor:
        shards: deque[Future[tuple[int, int]]] = deque()

        def wait_until_pending(max_pending: int) -> None:
            """Wait for the oldest shards until at most `max_pending` are left, and add up their counts."""
            nonlocal num_rows, num_skipped
            while len(shards) > max_pending:
                rows, skipped = shards.popleft().result()
                num_rows, num_skipped = num_rows + rows, num_skipped + skipped

        try:
            for index, chunks in enumerate(
                read_chunks(text.files, size=config.records_per_shard, columns=text.columns)
            ):
                num_records += sum(len(chunk.numbers) for chunk in chunks)
                first_id = index * config.records_per_shard
                arguments = (chunks, text, teacher_folder, config.teacher.trust_remote_code, config.window, first_id)
                shards.append(executor.submit(write_sequences, sequence_file(sequences, index), *arguments))
                wait_until_pending(2 * num_processes)
            wait_until_pending(0)
        except BaseException:
            executor.shutdown(cancel_futures=True)
            raise
    if num_rows == 0:
        files = ", ".join(map(str, text.files))
        raise InputError(
            f"corpus: expected usable records, found none in {files} ({num_skipped} malformed); check the files and "
            "corpus.columns"
        )
    if num_skipped:
        log.warning("corpus: %d malformed records skipped", num_skipped)
    log.info("planned %d records, %d sequences in %.1f s", num_records, num_rows, time.monotonic() - started)
    return num_records


@lru_cache(maxsize=1)
def cached_tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    """The tokenizer of a model folder, loaded once per process."""
    return load_tokenizer(folder, trust_remote_code=trust_remote_code)


def write_sequences(
    path: Path,
    chunks: Sequence[RawChunk],
    text: Text,
    teacher_folder: Path,
    trust_remote_code: bool,
    window: int,
    first_id: int,
) -> tuple[int, int]:
    """Tokenize and pack the records of a shard into one file; returns the numbers of its rows and skipped records."""
    tokenizer = cached_tokenizer(teacher_folder, trust_remote_code)
    malformed = MalformedRecords(skip=text.skip_malformed)
    packed = read_sequences(raw_records(chunks), text, tokenizer, malformed, window=window, first_id=first_id)
    num_rows = write_sequence_file(path, packed, num_skipped=lambda: malformed.count)
    return num_rows, malformed.count
