"""Files of tokenized sequences, before the teacher runs: a plan writes them for its workers, a driver for its ranks."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
from pyarrow import ArrowException

from pipeline.cache.schema import decode_sequences, encode_sequences, sequence_schema
from pipeline.core.files import sync_folder
from pipeline.core.types import InputError, TokenSequence

# Sequences are written, and later read, in row groups of at most so many rows, which also end with the sequence that
# reaches so many tokens: memory is bounded for a file of any size and for windows of any length.
ROWS_PER_GROUP, TOKENS_PER_GROUP = 2048, 2 << 20


def write_sequence_file(
    path: Path, sequences: Iterable[TokenSequence], *, summary: Callable[[], Mapping[str, Mapping[str, int]]] = dict
) -> int:
    """Write all sequences; returns their number.

    `summary` is called after the last of them has been read: {"skipped": records by reason, "notes": records by note,
    "answered": {"records": their number}}.

    The file appears as a whole: if the process is killed, there is none, or only a hidden one that ends in .tmp.
    """
    num_rows = 0
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as opened:
            with pq.ParquetWriter(opened, sequence_schema(), compression="zstd", write_page_checksum=True) as file:
                for rows in _row_groups(sequences):
                    file.write_table(encode_sequences(rows))
                    num_rows += len(rows)
                file.add_key_value_metadata({"summary": json.dumps(summary())})
            opened.flush()
            os.fsync(opened.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)
    return num_rows


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
    )


def sequence_file(folder: Path, index: int) -> Path:
    """The file of a shard's sequences in a plan's folder."""
    return folder / f"{index:05d}.parquet"
