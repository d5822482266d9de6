"""Files of tokenized sequences, before the teacher runs: a plan writes them for its workers, a driver for its ranks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
from pyarrow import ArrowException

from pipeline.cache.schema import decode_sequences, encode_sequences, sequence_schema
from pipeline.core.types import InputError, TokenSequence

ROWS_PER_GROUP = 2048  # sequences written, and later read, at once: bounds the memory for a file of any size


def write_sequence_file(path: Path, sequences: Iterable[TokenSequence], *, num_skipped: Callable[[], int]) -> int:
    """Write all sequences; returns their number. `num_skipped` is called after the last of them has been read."""
    num_rows, remaining = 0, iter(sequences)
    with pq.ParquetWriter(path, sequence_schema(), compression="zstd", write_page_checksum=True) as file:
        while rows := list(itertools.islice(remaining, ROWS_PER_GROUP)):
            file.write_table(encode_sequences(rows))
            num_rows += len(rows)
        file.add_key_value_metadata({"num_skipped": str(num_skipped())})
    return num_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceFile:
    """The sequences of one file; iterating reads one row group at a time."""

    path: Path
    num_rows: int
    num_skipped: int
    """Malformed records that were skipped."""

    def __iter__(self) -> Iterator[TokenSequence]:
        try:
            with pq.ParquetFile(self.path, page_checksum_verification=True) as file:
                for batch in file.iter_batches(ROWS_PER_GROUP):
                    yield from decode_sequences(batch)
        except (OSError, ArrowException) as error:
            raise InputError(
                f"{self.path}: expected the tokenized text, found it damaged ({error}); delete {self.path.parent} "
                "and run the same command again"
            ) from error


def open_sequence_file(path: Path) -> SequenceFile:
    """Read the footer of a file of sequences; FileNotFoundError if there is no file."""
    metadata = pq.read_metadata(path)
    return SequenceFile(path=path, num_rows=metadata.num_rows, num_skipped=int(metadata.metadata[b"num_skipped"]))


def sequence_file(folder: Path, index: int) -> Path:
    """The file of a shard's sequences in a plan's folder."""
    return folder / f"{index:05d}.parquet"
