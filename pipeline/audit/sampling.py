"""Sequences of a cache with their captured distributions: chosen at random or by record."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.cache import manifest as manifests
from pipeline.cache.schema import decode
from pipeline.core.types import Captured, InputError, Manifest, TokenSequence

Sample = tuple[TokenSequence, Captured]


def random_samples(cache: Path, manifest: Manifest, *, rows: int, seed: int) -> list[Sample]:
    """`rows` different sequences (all of them if there are fewer) in the order of the cache; the seed decides which."""
    infos = manifests.committed_shards(cache, manifest)
    groups = [(info, index, size) for info in infos for index, size in enumerate(info.row_groups)]
    ends = np.cumsum([size for _, _, size in groups])
    total = int(ends[-1]) if len(ends) else 0
    chosen = np.sort(np.random.default_rng(seed).choice(total, min(rows, total), replace=False))
    # row groups of 3, 4 and 2 rows end at 3, 7, 9: row 5 of the cache is in group 1, where it is row 5 - (7 - 4) = 2
    group_of_chosen = np.searchsorted(ends, chosen, side="right")
    samples: list[Sample] = []
    for group in np.unique(group_of_chosen):
        info, index, size = groups[group]
        manifests.check_shard_hash(cache, info)
        table = pq.ParquetFile(manifests.shard_path(cache, info.index)).read_row_group(index)
        first = ends[group] - size
        samples += _decode_rows(table, chosen[group_of_chosen == group] - first, manifest)
    return samples


def samples_of_record(cache: Path, manifest: Manifest, record: int) -> list[Sample]:
    """The sequences that hold a segment of a record; InputError if the cache does not hold the record."""
    if not 0 <= record < manifest.num_records:
        raise InputError(
            f"record: expected 0 to {manifest.num_records - 1} (the corpus of {cache}), found {record}; choose another"
        )
    info = manifests.committed_shards(cache, manifest)[record // manifest.records_per_shard]
    manifests.check_shard_hash(cache, info)
    file = pq.ParquetFile(manifests.shard_path(cache, info.index))
    samples: list[Sample] = []
    for index in range(file.num_row_groups):
        ids_of_rows = file.read_row_group(index, columns=["record_ids"]).column(0).to_pylist()
        rows = [row for row, record_ids in enumerate(ids_of_rows) if record in record_ids]
        if rows:
            samples += _decode_rows(file.read_row_group(index), rows, manifest)
    if not samples:
        raise InputError(
            f"record: expected one that {cache} holds, found {record}, which was skipped as malformed; choose another"
        )
    return samples


def _decode_rows(table: pa.Table, rows: Sequence[int] | np.ndarray, manifest: Manifest) -> list[Sample]:
    return decode(table.take(pa.array(rows, pa.int64())), temperatures=manifest.temperatures)
