"""Files of tokenized sequences, without a teacher: a plan writes them for its workers, a driver for its ranks.

Workers read a file from its beginning to its end, so theirs are Parquet. Ranks read single rows in the order of the
training, so theirs is an Arrow file that is mapped into memory: its pages are shared by all ranks of a machine, and the
system drops them when it needs the room.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import secrets
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import ArrowException

from pipeline.cache.schema import KeysAndTargets, decode_sequences, encode_sequences, keys_and_targets, sequence_schema
from pipeline.core.files import sync_folder
from pipeline.core.types import InputError, TokenSequence

# Sequences are written, and later read, in row groups of at most so many rows, which also end with the sequence that
# reaches so many tokens: memory is bounded for a file of any size and for windows of any length.
ROWS_PER_GROUP, TOKENS_PER_GROUP = 2048, 2 << 20


def write_sequence_file(
    path: Path, sequences: Iterable[TokenSequence], *, summary: Callable[[], Mapping[str, Any]] = dict
) -> int:
    """Write all sequences; returns their number.

    `summary` is called after the last of them has been read: {"skipped": records by reason, "notes": records by note,
    "answered": {"records": their number}, "plan_rows": see `SequenceFile`}.

    The file appears as a whole: if the process is killed, there is none, or only a hidden one that ends in .tmp.
    """
    num_rows = 0
    with (
        _appearing_whole(path) as opened,
        pq.ParquetWriter(opened, sequence_schema(), compression="zstd", write_page_checksum=True) as file,
    ):
        for rows in _row_groups(sequences):
            file.write_table(encode_sequences(rows))
            num_rows += len(rows)
        file.add_key_value_metadata({"summary": json.dumps(summary())})
    return num_rows


@contextlib.contextmanager
def _appearing_whole(path: Path) -> Iterator[BinaryIO]:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as opened:
            yield opened
            opened.flush()
            os.fsync(opened.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def _row_groups(sequences: Iterable[TokenSequence]) -> Iterator[list[TokenSequence]]:
    rows: list[TokenSequence] = []
    num_tokens = 0
    for sequence in sequences:
        rows.append(sequence)
        num_tokens += len(sequence.input_ids_S)
        if len(rows) == ROWS_PER_GROUP or num_tokens >= TOKENS_PER_GROUP:
            yield rows
            rows, num_tokens = [], 0
    if rows:
        yield rows


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceFile:
    """The sequences of one file; iterating reads one row group at a time."""

    path: Path
    num_rows: int
    skipped: Mapping[str, int]
    """Malformed records that were skipped, by reason."""
    notes: Mapping[str, int]
    """Records that were not tokenized as they stand, by what was done."""
    num_answered: int
    """Records with a known answer beside a prompt."""
    plan_rows: tuple[int, ...] | None
    """Of a fold: the place of each sequence among those of all folds in this shard, ascending; None: all are here."""

    @property
    def num_skipped(self) -> int:
        """The number of skipped records."""
        return sum(self.skipped.values())

    def __iter__(self) -> Iterator[TokenSequence]:
        try:
            with pq.ParquetFile(self.path, page_checksum_verification=True) as file:
                for group in range(file.num_row_groups):
                    yield from decode_sequences(file.read_row_group(group))
        except (OSError, ArrowException) as error:
            raise InputError(
                f"{self.path}: expected the tokenized text, found it damaged ({error}); delete {self.path.parent} "
                "and run the same command again"
            ) from error


def open_sequence_file(path: Path) -> SequenceFile:
    """Read the footer of a file of sequences; FileNotFoundError if there is no file."""
    metadata = pq.read_metadata(path)
    summary = json.loads(metadata.metadata[b"summary"])
    return SequenceFile(
        path=path,
        num_rows=metadata.num_rows,
        skipped=summary.get("skipped", {}),
        notes=summary.get("notes", {}),
        num_answered=summary.get("answered", {}).get("records", 0),
        plan_rows=tuple(summary["plan_rows"]) if "plan_rows" in summary else None,
    )


def sequence_file(folder: Path, index: int) -> Path:
    """The file of a shard's sequences in a plan's folder."""
    return folder / f"{index:05d}.parquet"


# ------------------------------------------------------------------------------------- mapped into memory


def write_mapped_sequences(path: Path, sequences: Iterable[TokenSequence]) -> None:
    """Write all sequences for `MappedSequences`; the file appears as a whole."""
    with _appearing_whole(path) as opened, pa.ipc.new_file(opened, sequence_schema()) as file:
        for rows in _row_groups(sequences):
            (batch,) = encode_sequences(rows).to_batches()
            file.write_batch(batch, custom_metadata={"checksum": _checksum(batch)})


class MappedSequences:
    """The sequences of a file, each read where it is used; the checksum of its part of the file is checked before."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._checked: set[int] = set()
        with self._damage_named():
            file = pa.ipc.open_file(pa.memory_map(str(path)))
            self._batches = [file.get_batch_with_custom_metadata(number) for number in range(file.num_record_batches)]
        self._ends = list(itertools.accumulate(found.batch.num_rows for found in self._batches))

    @property
    def num_targets(self) -> int:
        """Supervised positions of all sequences."""
        offsets = [found.batch.column("target_ids").offsets for found in self._batches]
        return sum(ends[-1].as_py() - ends[0].as_py() for ends in offsets)

    def keys_and_targets(self) -> Iterator[KeysAndTargets]:
        """Of one part of the file after another: the key of each sequence, and its number of supervised positions."""
        for number in range(len(self._batches)):
            with self._damage_named():
                batch = self._checked_batch(number)
            yield keys_and_targets(batch)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def row(self, row: int) -> TokenSequence:
        """The sequence at an index."""
        number = bisect_right(self._ends, row)
        begin = self._ends[number - 1] if number else 0
        with self._damage_named():
            return decode_sequences(self._checked_batch(number).slice(row - begin, 1))[0]

    def _checked_batch(self, number: int) -> pa.RecordBatch:
        found = self._batches[number]
        if number not in self._checked and _checksum(found.batch) != found.custom_metadata["checksum"].decode():
            raise OSError("its checksum is another one")
        self._checked.add(number)
        return found.batch

    @contextlib.contextmanager
    def _damage_named(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ArrowException) as error:
            raise InputError(
                f"{self._path}: expected the tokenized text, found it damaged ({error}); run the same command again"
            ) from error


def _checksum(batch: pa.RecordBatch) -> str:
    """CRC-32 over the buffers of all columns."""
    checksum = 0
    for buffer in (buffer for column in batch.columns for buffer in column.buffers() if buffer is not None):
        checksum = zlib.crc32(buffer, checksum)
    return f"{checksum:08x}"
