"""Sequences of a cache with their captured distributions: chosen at random or by record."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.cache import manifest as manifests
from pipeline.cache.downloads import local_copy
from pipeline.cache.schema import decode
from pipeline.core.object_store import Location
from pipeline.core.types import Captured, InputError, Manifest, ShardInfo, TokenSequence

Sample = tuple[TokenSequence, Captured]


def random_samples(cache: Location, manifest: Manifest, *, rows: int, seed: int) -> list[Sample]:
    """`rows` different sequences (all of them if there are fewer) in the order of the cache; the seed decides which."""
    infos = manifests.committed_shards(cache, manifest)
    groups = [(info, index, size) for info in infos for index, size in enumerate(info.row_groups)]
    ends = np.cumsum([size for _, _, size in groups])
    total = int(ends[-1]) if len(ends) else 0
    chosen = np.sort(np.random.default_rng(seed).choice(total, min(rows, total), replace=False))
    # row groups of 3, 4 and 2 rows end at 3, 7, 9: row 5 of the cache is in group 1, where it is row 5 - (7 - 4) = 2
    group_of_chosen = np.searchsorted(ends, chosen, side="right")
    samples: list[Sample] = []
    for info, groups_of_shard in itertools.groupby(np.unique(group_of_chosen), key=lambda group: groups[group][0]):
        with _open_shard(cache, info) as file:
            for group in groups_of_shard:
                _, index, size = groups[group]
                first = ends[group] - size
                rows_of_group = chosen[group_of_chosen == group] - first
                samples += _decode_rows(file.read_row_group(index), rows_of_group, manifest)
    return samples


def samples_of_record(cache: Location, manifest: Manifest, record: int) -> list[Sample]:
    """The sequences that hold a segment of a record; InputError if the cache does not hold the record."""
    if not 0 <= record < manifest.num_records:
        raise InputError(
            f"record: expected 0 to {manifest.num_records - 1} (the corpus of {cache}), found {record}; choose another"
        )
    info = manifests.committed_shards(cache, manifest)[record // manifest.records_per_shard]
    samples: list[Sample] = []
    with _open_shard(cache, info) as file:
        for index in range(file.num_row_groups):
            ids_of_rows = file.read_row_group(index, columns=["record_ids"]).column(0).to_pylist()
            rows = [row for row, record_ids in enumerate(ids_of_rows) if record in record_ids]
            if rows:
                samples += _decode_rows(file.read_row_group(index), rows, manifest)
    if not samples:
        or_fold = " or stands in other folds" if "only_fold" in manifest.made_of else ""
        raise InputError(
            f"record: expected one that {cache} holds, found {record}, which was skipped as malformed{or_fold}; choose "
            "another"
        )
    return samples


@contextlib.contextmanager
def _open_shard(cache: Location, info: ShardInfo) -> Iterator[pq.ParquetFile]:
    """A shard with the committed bytes; InputError for others."""
    with local_copy(manifests.shard_file(cache, info)) as path:
        manifests.check_shard_hash(cache, info, path)
        yield pq.ParquetFile(path)


def _decode_rows(table: pa.Table, rows: Sequence[int] | np.ndarray, manifest: Manifest) -> list[Sample]:
    return decode(table.take(pa.array(rows, pa.int64())), temperatures=manifest.temperatures)
