"""The parts of a shard that are read, downloaded and checked each alone: its row groups, and its footer behind them."""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass
from pathlib import Path

from pyarrow.parquet import FileMetaData, RowGroupMetaData

from pipeline.core.types import InputError, ShardInfo

HASH_DIGITS = 16  # of sha256, for each part; a shard has more than a hundred
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A stretch of a shard's bytes."""

    name: str
    """The shard's sha256, and the number of the part; of a shard that is one part, its sha256 alone."""
    start: int
    end: int
    sha256: str
    """Of its bytes; the first digits."""


def parts_of(info: ShardInfo) -> tuple[Part, ...]:
    """One part for each row group, the bytes before the first one included, and the footer; in order, without gaps.

    A shard of an older cache is one part as a whole: of its row groups no hash was recorded.
    """
    if not info.part_ends:
        return (Part(name=info.sha256, start=0, end=info.bytes, sha256=info.sha256),)
    starts_and_ends = list(itertools.pairwise((0, *info.part_ends)))
    are_in_order = all(start < end for start, end in starts_and_ends) and info.part_ends[-1] == info.bytes
    if not are_in_order or not len(info.part_ends) == len(info.part_hashes) == len(info.row_groups) + 1:
        raise InputError(
            f"{info.file}: part_ends: expected the ends of {len(info.row_groups)} row groups and of the footer, the "
            f"last one {info.bytes}, found {info.part_ends}; restore the ShardInfo, or delete it and capture again"
        )
    return tuple(
        Part(name=f"{info.sha256}-{number}", start=start, end=end, sha256=sha256)
        for number, ((start, end), sha256) in enumerate(zip(starts_and_ends, info.part_hashes, strict=True))
    )


def part_ends(metadata: FileMetaData, num_bytes: int) -> tuple[int, ...]:
    """The ends of the parts of a shard with this footer and so many bytes."""
    groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
    begins = [min(begin for begin, _ in _chunks(group)) for group in groups[1:]]
    last = [max(end for _, end in _chunks(group)) for group in groups[-1:]]
    return (*begins, *last, num_bytes)


def _chunks(group: RowGroupMetaData) -> list[tuple[int, int]]:
    """From where to where the bytes of each column of a row group lie."""
    columns = [group.column(number) for number in range(group.num_columns)]
    begins = [column.dictionary_page_offset or column.data_page_offset for column in columns]
    return [(begin, begin + column.total_compressed_size) for begin, column in zip(begins, columns, strict=True)]


def hash_parts(path: Path, ends: tuple[int, ...]) -> tuple[str, tuple[str, ...]]:
    """sha256 of a file, and the first digits of that of each part, in one pass."""
    whole, hashes = hashlib.sha256(), []
    with path.open("rb") as file:
        for start, end in itertools.pairwise((0, *ends)):
            digest = hashlib.sha256()
            for left in range(end - start, 0, -CHUNK_BYTES):
                if not (chunk := file.read(min(left, CHUNK_BYTES))):  # the ends of a damaged footer may lie anywhere
                    break
                digest.update(chunk)
                whole.update(chunk)
            hashes.append(digest.hexdigest()[:HASH_DIGITS])
    return whole.hexdigest(), tuple(hashes)
