"""A row group of a shard as flat arrays, for code that reads a complete cache: no Python object per row.

R is the number of rows (sequences) of the row group, E the number of kept entries of all its positions together. N, K
and C are those of `pipeline/core/types.py`. A column of lists is stored as the values of all its rows, one row after
another, and the number of values in each row.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.cache.schema import pad_entries
from pipeline.core.types import Manifest, TopK


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowGroup:
    """The columns of one row group."""

    keys: list[bytes]
    """The key of each row."""
    values: Mapping[str, np.ndarray]
    """Column name -> the values of all rows, one row after another."""
    lengths: Mapping[str, np.ndarray]
    """Column name -> the number of values in each row: [R] int64."""

    @property
    def num_rows(self) -> int:
        """R."""
        return len(self.keys)

    def row_starts(self, name: str) -> np.ndarray:
        """The index of each row's first value in a column: [R] int64. Lengths 3, 1, 2 start at 0, 3, 4."""
        return np.cumsum(self.lengths[name]) - self.lengths[name]

    def row_indices(self, name: str) -> np.ndarray:
        """The row that each value of a column belongs to. Lengths 3, 1, 2 give 0, 0, 0, 1, 2, 2."""
        return np.repeat(np.arange(self.num_rows), self.lengths[name])

    def row_sums(self, name: str) -> np.ndarray:
        """The sum of a column's values in each row: [R] int64."""
        # values 5, 6, 7, 8 in rows of 3 and 1: sums before each value 0, 5, 11, 18, 26; row 0 is 18 - 0, row 1 26 - 18
        sums_before = np.concatenate([[0], np.cumsum(self.values[name], dtype=np.int64)])
        starts_R = self.row_starts(name)
        return sums_before[starts_R + self.lengths[name]] - sums_before[starts_R]


def read_row_groups(path: Path) -> Iterator[RowGroup]:
    """The row groups of a shard in order; ValueError where a value is missing."""
    file = pq.ParquetFile(path)
    for index in range(file.num_row_groups):
        yield _read_row_group(file, index)


def _read_row_group(file: pq.ParquetFile, index: int) -> RowGroup:
    table = file.read_row_group(index).combine_chunks()
    values, lengths = {}, {}
    for name in table.column_names:
        array = table.column(name).chunk(0) if table.num_rows else pa.array([], table.schema.field(name).type)
        if array.null_count or (name != "key" and array.flatten().null_count):
            raise ValueError(f"{name} has missing values")
        if name != "key":
            values[name] = array.flatten().to_numpy(zero_copy_only=False)
            lengths[name] = np.diff(array.offsets.to_numpy()).astype(np.int64)
    return RowGroup(keys=table.column("key").to_pylist(), values=values, lengths=lengths)


def column_bytes(path: Path) -> Counter[str]:
    """The compressed bytes of each column of a shard."""
    metadata, sizes = pq.read_metadata(path), Counter[str]()
    for group in range(metadata.num_row_groups):
        for column in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(column)
            sizes[chunk.path_in_schema.split(".")[0]] += chunk.total_compressed_size
    return sizes


def distributions(group: RowGroup, manifest: Manifest) -> TopK:
    """The captured distributions of all N positions of a row group."""
    ids_E = torch.from_numpy(group.values["topk_ids"].astype(np.int64))
    relative_E = torch.from_numpy(group.values["relative_logits"].copy())
    if "kept_counts" in group.values:
        counts_N = torch.from_numpy(group.values["kept_counts"].astype(np.int64))
        ids_NK, relative_NK = pad_entries(ids_E, relative_E, counts_N)
    else:
        ids_NK, relative_NK = ids_E.reshape(-1, manifest.k), relative_E.reshape(-1, manifest.k)
    return TopK(
        ids_NK=ids_NK,
        relative_logits_NK=relative_NK,
        log_tail_NC=torch.from_numpy(group.values["log_tail"].copy()).reshape(-1, len(manifest.temperatures)),
        temperatures=manifest.temperatures,
    )


def sequence_keys(columns: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[bytes]:
    """The keys of all rows at once, as `data.packing.sequence_key` computes them one by one.

    `columns` holds (values, lengths) of each column that the key is made of. A key is the hash of int64 numbers: for
    each column its length in this row, then its values in this row.
    """
    # Example: column a = [7], [8, 9] (values 7, 8, 9; lengths 1, 2) and column b = [5], [] (values 5; lengths 1, 0).
    #   row 0 hashes 1 7 1 5, row 1 hashes 2 8 9 0:   numbers = 1 7 1 5 | 2 8 9 0,   row_starts_R = 0, 4
    #   column a: lengths go to 0, 4 (next_R); its rows start at 0, 1 among its own values (starts_R);
    #   value 0 moves by 0 + 1 - 0 = 1 to 1, values 1 and 2 move by 4 + 1 - 1 = 4 to 5 and 6; next_R becomes 2, 7
    row_sizes_R = sum(lengths + 1 for _, lengths in columns)
    row_starts_R = np.cumsum(row_sizes_R) - row_sizes_R
    numbers = np.empty(int(np.sum(row_sizes_R)), dtype="<i8")
    next_R = row_starts_R.copy()  # where the next number of each row is written
    for values, lengths in columns:
        numbers[next_R] = lengths
        starts_R = np.cumsum(lengths) - lengths
        moves = np.repeat(next_R + 1 - starts_R, lengths)
        numbers[np.arange(len(values)) + moves] = values
        next_R += lengths + 1
    data = memoryview(numbers.tobytes())
    first_bytes, end_bytes = (8 * row_starts_R).tolist(), (8 * next_R).tolist()
    return [
        hashlib.blake2b(data[first:end], digest_size=16).digest()
        for first, end in zip(first_bytes, end_bytes, strict=True)
    ]
