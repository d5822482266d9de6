"""A row group of a shard as flat arrays, for whoever reads a whole cache: no Python object a row.

R rows (sequences) of the row group, E kept entries of all its positions, one after the other; N, K, S and C as in
`types`. A column of lists is its values end to end and the number of them in each row.
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
class Columns:
    """One row group."""

    keys: list[bytes]
    values: Mapping[str, np.ndarray]
    """Every list column, its rows end to end."""
    lengths: Mapping[str, np.ndarray]
    """How many of them are in each row: [R] int64."""

    @property
    def num_rows(self) -> int:
        """R."""
        return len(self.keys)

    def starts(self, name: str) -> np.ndarray:
        """Where each row begins in a column: [R]."""
        return np.cumsum(self.lengths[name]) - self.lengths[name]

    def rows(self, name: str) -> np.ndarray:
        """The row of each value of a column."""
        return np.repeat(np.arange(self.num_rows), self.lengths[name])


def read_groups(path: Path) -> Iterator[Columns]:
    """The row groups of a shard, one after the other; ValueError where a value is missing."""
    file = pq.ParquetFile(path)
    for group in range(file.num_row_groups):
        yield read_group(file, group)


def column_bytes(path: Path) -> Counter[str]:
    """Bytes of each column as they lie in a shard, compressed."""
    metadata, found = pq.read_metadata(path), Counter[str]()
    for group in range(metadata.num_row_groups):
        for column in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(column)
            found[chunk.path_in_schema.split(".")[0]] += chunk.total_compressed_size
    return found


def read_group(file: pq.ParquetFile, group: int) -> Columns:
    """Read one row group; ValueError where a value is missing."""
    table = file.read_row_group(group).combine_chunks()
    values, lengths = {}, {}
    for name in table.column_names:
        array = table.column(name).chunk(0) if table.num_rows else pa.array([], table.schema.field(name).type)
        if array.null_count or (name != "key" and array.flatten().null_count):
            raise ValueError(f"{name} has missing values")
        if name != "key":
            values[name] = array.flatten().to_numpy(zero_copy_only=False)
            lengths[name] = np.diff(array.offsets.to_numpy()).astype(np.int64)
    return Columns(keys=table.column("key").to_pylist(), values=values, lengths=lengths)


def distributions(columns: Columns, manifest: Manifest) -> TopK:
    """The captured distributions of all N positions of a row group."""
    ids_E = torch.from_numpy(columns.values["topk_ids"].astype(np.int64))
    relative_E = torch.from_numpy(columns.values["relative_logits"].copy())
    if "kept_counts" in columns.values:
        counts_N = torch.from_numpy(columns.values["kept_counts"].astype(np.int64))
        ids_NK, relative_NK = pad_entries(ids_E, relative_E, counts_N)
    else:
        ids_NK, relative_NK = ids_E.reshape(-1, manifest.k), relative_E.reshape(-1, manifest.k)
    return TopK(
        ids_NK=ids_NK,
        relative_logits_NK=relative_NK,
        log_tail_NC=torch.from_numpy(columns.values["log_tail"].copy()).reshape(-1, len(manifest.temperatures)),
        temperatures=manifest.temperatures,
    )


def sequence_keys(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[bytes]:
    """`corpus.sequence_key` of every row at once, from the (values, lengths) of the arrays it is made of."""
    sizes_R = sum(lengths + 1 for _, lengths in parts)
    first_R = np.cumsum(sizes_R) - sizes_R
    joined, at_R = np.empty(int(np.sum(sizes_R)), dtype="<i8"), first_R.copy()
    for values, lengths in parts:
        joined[at_R] = lengths
        before_R = np.cumsum(lengths) - lengths
        joined[np.repeat(at_R + 1 - before_R, lengths) + np.arange(len(values))] = values
        at_R += lengths + 1
    data, ends = memoryview(joined.tobytes()), (8 * at_R).tolist()
    blake2b = hashlib.blake2b
    return [blake2b(data[a:b], digest_size=16).digest() for a, b in zip((8 * first_R).tolist(), ends, strict=True)]
