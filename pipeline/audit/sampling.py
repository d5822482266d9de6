"""Sequences of a cache by chance or by record, with all that was captured about them."""

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
    """That many different sequences (all, if there are fewer), a function of the seed, in the order of the cache."""
    infos = manifests.committed_shards(cache, manifest)
    places = [(info, group, size) for info in infos for group, size in enumerate(info.row_groups)]
    ends = np.cumsum([size for _, _, size in places])
    total = int(ends[-1]) if len(ends) else 0
    chosen = np.sort(np.random.default_rng(seed).choice(total, min(rows, total), replace=False))
    found: list[Sample] = []
    in_block = np.searchsorted(ends, chosen, side="right")
    for block in np.unique(in_block):
        info, group, size = places[block]
        manifests.check_shard_hash(cache, info)
        table = pq.ParquetFile(manifests.shard_path(cache, info.index)).read_row_group(group)
        found += _decoded(table, chosen[in_block == block] - (ends[block] - size), manifest)
    return found


def samples_of_record(cache: Path, manifest: Manifest, record: int) -> list[Sample]:
    """The sequences that hold a part of a record; refuses one that the cache does not hold."""
    if not 0 <= record < manifest.num_records:
        raise InputError(f"record: expected 0 to {manifest.num_records - 1} (the corpus of {cache}), found {record}")
    info = manifests.committed_shards(cache, manifest)[record // manifest.records_per_shard]
    manifests.check_shard_hash(cache, info)
    file = pq.ParquetFile(manifests.shard_path(cache, info.index))
    found: list[Sample] = []
    for group in range(file.num_row_groups):
        ids = file.read_row_group(group, columns=["record_ids"]).column(0)
        rows = [row for row, inside in enumerate(ids.to_pylist()) if record in inside]
        if rows:
            found += _decoded(file.read_row_group(group), rows, manifest)
    if not found:
        raise InputError(f"record: expected one that {cache} holds, found {record} skipped as malformed; take another")
    return found


def _decoded(table: pa.Table, rows: Sequence[int] | np.ndarray, manifest: Manifest) -> list[Sample]:
    return decode(table.take(pa.array(rows, pa.int64())), temperatures=manifest.temperatures)
