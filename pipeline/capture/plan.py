"""The plan of a capture: one pass over the corpus, which is tokenized, packed and written as one file per shard.

Each record is read, parsed and tokenized once, here, so a record that cannot be used stops the capture before the
teacher is loaded. The sequences stay in a local folder until they are captured; they take a few bytes per token, a few
percent of the finished cache. The manifest stays there too, so the same command finds its cache without reading the
corpus again.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

from pipeline.cache import manifest as manifests
from pipeline.cache.leases import hold_lease
from pipeline.cache.plain_manifest import sealed
from pipeline.cache.schema import SCHEMA_VERSION
from pipeline.cache.sequence_files import open_sequence_file, sequence_file, write_sequence_file
from pipeline.capture.plan_lookup import PlanFolder, file_states
from pipeline.config.schema import CaptureConfig, CompletionMode, Kind
from pipeline.core.files import sync_files
from pipeline.core.object_store import write_json
from pipeline.core.progress import Progress, log
from pipeline.core.types import InputError, Manifest
from pipeline.data.records import MalformedRecords, find_shape
from pipeline.data.text_files import RawChunk, Text, open_text, raw_records, read_chunks
from pipeline.data.tokenize import read_sequences, text_hash
from pipeline.models.compatibility import check_window
from pipeline.models.loading import resolve_dtype
from pipeline.models.model_files import code_hash, weights_hash
from pipeline.models.paths import model_folder
from pipeline.models.preflight import check_model
from pipeline.models.tokenizer import (
    chat_template_and_end_token,
    load_tokenizer,
    needs_begin_token,
    split_option,
    tokenizer_hash,
    tokenizer_parts,
    vocabulary_size,
)

CORPUS_BYTES_PER_PROCESS = 4 << 20  # starting a process takes longer than tokenizing this much
# Text that was read and is not yet tokenized, whatever the number of cores; beside it there is the shard that is being
# read. A shard larger than this is tokenized alone.
MAX_PENDING_BYTES = 256 << 20
MB = 1_000_000


def make_plan(config: CaptureConfig, plan: PlanFolder, *, with_sequences: bool = True) -> Manifest:
    """Plan a capture, or wait for another process that is planning the same one; returns the manifest.

    The plan is kept in its folder. With `with_sequences=False` an existing manifest is enough: its sequences may have
    been captured and deleted. InputError for options that do not fit the teacher, and for records that cannot be used.
    """
    teacher = resolve_dtype(config.teacher)
    folder = model_folder(teacher.path, revision=teacher.revision, with_code=teacher.trust_remote_code)
    tokenizer = cached_tokenizer(folder, teacher.trust_remote_code)
    check_model(teacher, tokenizer)
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
    text = open_corpus(config, folder)
    states_before = file_states([*text.files, folder])
    unfinished = plan.folder / ".unfinished"  # always this name: a plan that was interrupted goes on in it
    try:
        unfinished.mkdir(exist_ok=True)
        for leftover in unfinished.glob(".*.tmp"):  # a file that a killed process was writing
            leftover.unlink(missing_ok=True)
        with ThreadPoolExecutor(2) as hashing:  # while this thread tokenizes
            corpus_sha256 = hashing.submit(text_hash, text)
            weights_sha256 = hashing.submit(weights_hash, folder)
            num_records = tokenize_corpus(config, text, folder, unfinished)
            tokenizer_sha256 = tokenizer_hash(tokenizer)
        hashes = {"corpus": corpus_sha256.result(), "teacher_weights": weights_sha256.result()}
        hashes |= {
            "tokenizer": tokenizer_sha256,
            **code_hash(folder, trust_remote_code=config.teacher.trust_remote_code),
        }
        manifest = make_manifest(config, tokenizer, num_records, hashes)
        manifest = dataclasses.replace(manifest, tokenizer=sealed(tokenizer_parts(tokenizer), tokenizer_sha256))
        if file_states([*text.files, folder]) != states_before:
            raise InputError(
                "corpus: expected files that do not change, found one changed while it was read; run again"
            )
        sync_files(unfinished)
        shutil.rmtree(plan.sequences, ignore_errors=True)
        unfinished.rename(plan.sequences)
    except InputError:  # the corpus or an option has to be changed, which makes another plan
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    except BrokenProcessPool:
        raise InputError(
            "corpus: expected the processes that tokenize it to live, found one killed (often for want of memory); run "
            "the same command again: it goes on where it was"
        ) from None
    except OSError as error:
        raise InputError(
            f"{unfinished}: expected to write the tokenized corpus, found {error.strerror or error}; free disk space "
            "and run the same command again, or choose another folder with plans_dir="
        ) from error
    write_json(manifests.manifest_path(plan.folder), manifests.to_plain(manifest))
    return manifest


def open_corpus(config: CaptureConfig, folder: Path) -> Text:
    """The corpus files and how to read them, for the teacher in a folder.

    With `complete`, prompts without a completion are allowed.
    """
    text = find_shape(open_text(config.corpus, "corpus"))
    begins_windows = config.corpus.window_begin_token
    return dataclasses.replace(
        text,
        completes=config.complete.how is not CompletionMode.none,
        begins_windows=needs_begin_token(folder) if begins_windows is None else begins_windows,
    )


def make_manifest(config: CaptureConfig, tokenizer: Any, num_records: int, hashes: dict[str, str]) -> Manifest:
    """The manifest of a cache. `hashes` are the sha256 of its inputs; with the options they make the fingerprint."""
    complete = config.complete
    made_of = {
        **hashes,
        "schema_version": SCHEMA_VERSION,
        "teacher_num_layers": config.teacher.num_layers,
        "teacher_dtype": config.teacher.dtype.name,
        **chat_template_and_end_token(tokenizer),
        **split_option(tokenizer),
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
    if complete.how is CompletionMode.sample:  # earlier versions drew the same completion for equal prompts
        made_of["complete"]["draws_by_record"] = True
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


class PendingShards:
    """Shards that were read and are being tokenized, bounded by their text."""

    def __init__(self, executor: Executor, progress: Progress) -> None:
        self._executor, self._progress = executor, progress
        self._shards: deque[tuple[Future[None], int, float]] = deque()
        self._num_bytes = 0

    def submit(self, chunks: Sequence[RawChunk], megabytes: float, path: Path, *arguments: Any) -> None:
        """Let a shard be tokenized as soon as there is room for it; `megabytes` of the corpus are its own."""
        num_bytes = sum(chunk.num_bytes for chunk in chunks)
        self.wait(max_bytes=MAX_PENDING_BYTES - num_bytes)
        self._shards.append((self._executor.submit(write_sequences, path, chunks, *arguments), num_bytes, megabytes))
        self._num_bytes += num_bytes

    def wait(self, *, max_bytes: int) -> None:
        """Wait for the oldest shards until the others hold at most `max_bytes`, or none is left."""
        while self._shards and self._num_bytes > max_bytes:
            tokenized, num_bytes, megabytes = self._shards.popleft()
            tokenized.result()
            self._num_bytes -= num_bytes
            self._progress.advance(megabytes)


def tokenize_corpus(config: CaptureConfig, text: Text, teacher_folder: Path, sequences: Path) -> int:
    """Tokenize and pack each record, and write one file per shard into `sequences`; returns the number of records.

    This process reads the corpus; others tokenize one shard each. A shard whose file exists is only read past.
    """
    started, num_records, num_shards, end = time.monotonic(), 0, 0, 0
    sizes = [file.stat().st_size for file in text.files]
    starts = dict(zip(text.files, itertools.accumulate(sizes, initial=0), strict=False))
    num_finished = len(list(sequences.iterdir()))
    if num_finished:
        log.info("planning goes on: %d shards were tokenized before", num_finished)
    progress = Progress("plan", total=sum(sizes) // MB, unit=" MB", log_every_seconds=config.log_every_seconds)
    with _tokenizing_processes(sum(sizes)) as executor:
        pending = PendingShards(executor, progress)
        try:
            for chunks in read_chunks(text.files, size=config.records_per_shard, columns=text.read_columns):
                path = sequence_file(sequences, num_shards)
                start, end = end, starts[chunks[-1].file] + chunks[-1].position
                first_id, num_shards = num_records, num_shards + 1
                num_records += sum(len(chunk.numbers) for chunk in chunks)
                if path.exists():
                    progress.skip((end - start) / MB)
                    continue
                trust = config.teacher.trust_remote_code
                pending.submit(chunks, (end - start) / MB, path, text, teacher_folder, trust, config.window, first_id)
            pending.wait(max_bytes=-1)
        except BaseException:
            executor.shutdown(cancel_futures=True)
            raise
        finally:
            progress.close()
    num_rows = _count_sequences(text, [sequence_file(sequences, index) for index in range(num_shards)])
    log.info("planned %d records, %d sequences in %.1f s", num_records, num_rows, time.monotonic() - started)
    return num_records


def _count_sequences(text: Text, paths: Sequence[Path]) -> int:
    """The number of sequences in all files; InputError if there is none."""
    files = [open_sequence_file(path) for path in paths]
    num_rows, num_skipped = sum(file.num_rows for file in files), sum(file.num_skipped for file in files)
    if num_rows == 0:
        raise InputError(
            f"corpus: expected usable records, found none in {', '.join(map(str, text.files))} ({num_skipped} "
            "malformed); check the files and corpus.columns"
        )
    if num_skipped:
        log.warning("corpus: %d malformed records skipped", num_skipped)
    return num_rows


def _tokenizing_processes(corpus_bytes: int) -> Executor:
    """One process for each core, if the corpus is large enough; else a thread."""
    num_processes = min(len(os.sched_getaffinity(0)), math.ceil(corpus_bytes / CORPUS_BYTES_PER_PROCESS))
    if num_processes > 1:
        return ProcessPoolExecutor(num_processes, mp_context=get_context("spawn"), initializer=_end_with_parent)
    return ThreadPoolExecutor(1)


def _end_with_parent() -> None:
    """End this process when the one that reads the corpus has ended, also if that was killed."""
    parent = parent_process()
    assert parent is not None

    def wait_and_end() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait_and_end, daemon=True).start()


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
) -> None:
    """Tokenize and pack the records of a shard into one file, whose footer has the number of skipped records."""
    tokenizer = cached_tokenizer(teacher_folder, trust_remote_code)
    malformed = MalformedRecords(skip=text.skip_malformed)
    packed = read_sequences(raw_records(chunks), text, tokenizer, malformed, window=window, first_id=first_id)
    write_sequence_file(path, packed, num_skipped=lambda: malformed.count)
