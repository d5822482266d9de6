"""One pass over the corpus: each record is read, parsed, tokenized and packed, into one file per shard."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from functools import lru_cache
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

from pipeline.cache.sequence_files import open_sequence_file, sequence_file, write_sequence_file
from pipeline.config.schema import CaptureConfig, CompletionMode
from pipeline.core.folds import Fold, parse_fold
from pipeline.core.progress import Progress, log
from pipeline.core.types import InputError, TokenSequence
from pipeline.data.records import MalformedRecords, find_shape, log_counts
from pipeline.data.text_files import RawChunk, Text, open_text, raw_records, read_chunks
from pipeline.data.tokenize import read_sequences
from pipeline.models.tokenizer import load_tokenizer, needs_begin_token

CORPUS_BYTES_PER_PROCESS = 4 << 20  # starting a process takes longer than tokenizing this much
# Text that was read and is not yet tokenized, whatever the number of cores; beside it there is the shard that is being
# read. A shard larger than this is tokenized alone.
MAX_PENDING_BYTES = 256 << 20
MB = 1_000_000
# what follows from answers in the corpus, by what is supervised
ANSWER_READ = {
    "all": "the teacher reads it, and students learn its tokens",
    "completion": "the teacher reads it, and students learn its tokens",
    "next": "the teacher does not read it, but a term can (loss.lm.on, drop_wrong)",
    "choices": "the teacher does not read it, but a term can (loss.lm.on, drop_wrong)",
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedCorpus:
    """What a pass over the corpus has found, besides the sequences."""

    num_records: int
    """Skipped ones included."""
    skipped: dict[str, int]
    """Skipped records by reason."""
    notes: dict[str, int]
    """Records that were not tokenized as they stand, by what was done."""


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
        fold=None if config.only_fold is None else parse_fold(config.only_fold, "only_fold"),
    )


class PendingShards:
    """Shards that were read and are being tokenized, bounded by their text."""

    def __init__(self, executor: Executor, progress: Progress) -> None:
        self._executor, self._progress = executor, progress
        self._shards: deque[tuple[Future[None], int, float]] = deque()
        self._num_bytes = 0

    def submit(self, chunks: Sequence[RawChunk], amount: float, path: Path, *arguments: Any) -> None:
        """Let a shard be tokenized as soon as there is room for it; `amount` is its part of the progress."""
        num_bytes = sum(chunk.num_bytes for chunk in chunks)
        self.wait(max_bytes=MAX_PENDING_BYTES - num_bytes)
        self._shards.append((self._executor.submit(write_sequences, path, chunks, *arguments), num_bytes, amount))
        self._num_bytes += num_bytes

    def wait(self, *, max_bytes: int) -> None:
        """Wait for the oldest shards until the others hold at most `max_bytes`, or none is left."""
        while self._shards and self._num_bytes > max_bytes:
            tokenized, num_bytes, amount = self._shards.popleft()
            tokenized.result()
            self._num_bytes -= num_bytes
            self._progress.advance(amount)


def tokenize_corpus(config: CaptureConfig, text: Text, teacher_folder: Path, sequences: Path) -> TokenizedCorpus:
    """Tokenize and pack each record, and write one file per shard into `sequences`.

    This process reads the corpus; others tokenize one shard each. A shard whose file exists is only read past.
    """
    started, num_records, num_shards, end = time.monotonic(), 0, 0, 0
    sizes = [file.stat().st_size for file in text.files]
    starts = dict(zip(text.files, itertools.accumulate(sizes, initial=0), strict=False))
    num_finished = len(list(sequences.iterdir()))
    if num_finished:
        log.info("planning goes on: %d shards were tokenized before", num_finished)
    # the first records of large files end long before the files do
    total, unit = (sum(sizes) // MB, " MB") if text.take is None else (text.take, " records")
    progress = Progress("plan", total=total, unit=unit, log_every_seconds=config.log_every_seconds)
    max_shards = math.inf if text.take is None else math.ceil(text.take / config.records_per_shard)
    with _tokenizing_processes(sum(sizes), max_shards) as executor:
        pending = PendingShards(executor, progress)
        try:
            size, columns = config.records_per_shard, text.read_columns
            for chunks in read_chunks(text.files, size=size, columns=columns, take=text.take):
                path = sequence_file(sequences, num_shards)
                start, end = end, starts[chunks[-1].file] + chunks[-1].position
                first_id, num_shards = num_records, num_shards + 1
                num_records += sum(len(chunk.numbers) for chunk in chunks)
                amount = (end - start) / MB if text.take is None else num_records - first_id
                if path.exists():
                    progress.skip(amount)
                    continue
                trust = config.teacher.trust_remote_code
                pending.submit(chunks, amount, path, text, teacher_folder, trust, config.window, first_id)
            pending.wait(max_bytes=-1)
        except BaseException:
            executor.shutdown(cancel_futures=True)
            raise
        finally:
            progress.close()
    found = _summary(text, num_records, [sequence_file(sequences, index) for index in range(num_shards)])
    log.info("planned %d records in %.1f s", num_records, time.monotonic() - started)
    return found


def _summary(text: Text, num_records: int, paths: Sequence[Path]) -> TokenizedCorpus:
    """The counts of all files, logged; InputError if there is no sequence."""
    files = [open_sequence_file(path) for path in paths]
    skipped, notes = Counter[str](), Counter[str]()
    for file in files:
        skipped.update(file.skipped)
        notes.update(file.notes)
    of_fold = "" if text.fold is None else f" of fold {text.fold}"
    # a fold of a small text may have no sequence; the others have them all
    if not any(file.num_rows for file in files) and (text.fold is None or skipped.total() == num_records):
        raise InputError(
            f"corpus: expected usable records, found none in {', '.join(map(str, text.files))} ({skipped.total()} "
            "malformed); check the files and corpus.columns"
        )
    log_counts(text.what, skipped, notes)
    if num_answered := sum(file.num_answered for file in files):
        log.warning(
            "corpus: %d of %d records have a known answer beside their prompt, and the cache stores it: %s. From an "
            "unlabeled corpus leave the answers out: remove them, or let their columns go unread with "
            "corpus.columns.completion=unused corpus.columns.answer=unused",
            *(num_answered, num_records, ANSWER_READ.get(text.targets, ANSWER_READ["all"])),
        )
    log.info("corpus: %d sequences%s", sum(file.num_rows for file in files), of_fold)
    return TokenizedCorpus(num_records=num_records, skipped=dict(skipped), notes=dict(notes))


def _tokenizing_processes(corpus_bytes: int, max_shards: float) -> Executor:
    """One process for each core, if the corpus is large enough; else a thread."""
    num_processes = min(len(os.sched_getaffinity(0)), math.ceil(corpus_bytes / CORPUS_BYTES_PER_PROCESS), max_shards)
    if num_processes > 1:
        return ProcessPoolExecutor(int(num_processes), mp_context=get_context("spawn"), initializer=_end_with_parent)
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
    """Tokenize and pack the records of a shard into one file, whose footer says which records were skipped and why."""
    tokenizer = cached_tokenizer(teacher_folder, trust_remote_code)
    malformed = MalformedRecords(skip=text.skip_malformed)
    packed = read_sequences(raw_records(chunks), text, tokenizer, malformed, window=window, first_id=first_id)
    plan_rows: list[int] = []
    write_sequence_file(
        path,
        packed if text.fold is None else _of_fold(packed, text.fold, plan_rows),
        summary=lambda: {
            "skipped": dict(malformed.reasons),
            "notes": dict(+malformed.notes),
            "answered": {"records": malformed.num_answered},
            **({} if text.fold is None else {"plan_rows": plan_rows}),
        },
    )


def _of_fold(sequences: Iterable[TokenSequence], fold: Fold, plan_rows: list[int]) -> Iterator[TokenSequence]:
    """Those of a fold; their places among all go into `plan_rows`."""
    for row, sequence in enumerate(sequences):
        if fold.holds(sequence.key):
            plan_rows.append(row)
            yield sequence
