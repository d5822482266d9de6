"""What an epoch downloads of a cache that is larger than the folder of downloads; moto serves S3."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from pipeline.bench import read as bench_read
from pipeline.cache import downloads, shards
from pipeline.cache import manifest as manifests
from pipeline.cache.downloads import Downloads
from pipeline.cache.shards import ShardReader, shard_writer
from pipeline.core import object_store
from pipeline.core.object_store import RemotePath, open_location
from pipeline.core.types import InputError
from pipeline.data.mixture import Mixture
from pipeline.data.sampler import SHUFFLE_BLOCKS, BatchSampler, CacheStream
from support.counted_store import CountedBucket, counted_bucket
from support.damage import without_parts

NUM_SHARDS, ROW_GROUPS, ROWS, K = 100, 6, 2, 16


@pytest.fixture(scope="module")
def store() -> Iterator[CountedBucket]:
    with pytest.MonkeyPatch.context() as patch, counted_bucket(patch) as counted:
        yield counted


def make_cache(folder: Path, num_shards: int) -> Path:
    """Shards of six row groups of two windows, about 45 kB each; shards differ in keys and record ids alone."""
    num_records = num_shards * ROW_GROUPS * ROWS
    manifest = bench_read.make_manifest(num_shards, num_records, k=K, window=bench_read.WINDOW, vocabulary=49_152)
    manifests.create_cache(folder, manifest)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_read, "K", K)
        patch.setattr(shards, "ROW_GROUP_BYTES", ROWS * 4 * bench_read.WINDOW * K)
        rows = [bench_read.random_row(0, torch.Generator().manual_seed(n)) for n in range(ROWS * ROW_GROUPS)]
        for index in range(num_shards):
            with shard_writer(folder, manifest, index) as writer:
                records = manifests.shard_range(manifest, index)
                for record_id, (sequence, captured) in zip(records, rows, strict=True):
                    key = record_id.to_bytes(16, "little")
                    writer.write(dataclasses.replace(sequence, key=key, record_ids=(record_id,)), captured)
                writer.commit(num_skipped=0)
    manifests.finalize_cache(folder, manifest, stale_seconds=60)
    assert ShardReader(folder).blocks == (ROWS,) * ROW_GROUPS * num_shards
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("small") / "cache", 2)


def upload(store: CountedBucket, cache: Path, name: str) -> RemotePath:
    for path in (path for path in cache.rglob("*") if path.is_file()):
        store.bucket.put_object(Key=f"{name}/{path.relative_to(cache)}", Body=path.read_bytes())
    location = open_location(f"s3://bucket/{name}")
    assert isinstance(location, RemotePath)
    return location


def mixtures(cache: RemotePath, folder: Path, limit_bytes: int, num_ranks: int) -> list[Mixture]:
    """What each rank of a machine reads; they share the folder of downloads."""
    found = []
    for _ in range(num_ranks):
        down = Downloads(folder=folder, limit_bytes=limit_bytes)
        reader = ShardReader(cache, downloads=down, cached_blocks=SHUFFLE_BLOCKS + 1)
        stream = CacheStream(weight=Fraction(1), parts=(reader.blocks,))
        order = BatchSampler(seed=1, global_batch=16, gold_fraction=Fraction(0), num_gold=0, corpora=(stream,))
        found.append(Mixture(order=order, gold=[], readers=[reader]))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 4])
def test_an_epoch_of_a_cache_three_times_the_room_is_downloaded_once(
    num_ranks: int, store: CountedBucket, tmp_path: Path
) -> None:
    """100 shards, room for 33. Whole shards were 4.2 times the cache here, and 100 times with 150 row groups each."""
    cache, down = make_cache(tmp_path / "cache", NUM_SHARDS), tmp_path / "down"
    place = upload(store, cache, f"of-{num_ranks}")
    cache_bytes = sum(path.stat().st_size for path in (cache / "shards").glob("*.parquet"))
    ranks = mixtures(place, down, 33 * cache_bytes // NUM_SHARDS, num_ranks)
    before, keys = store.num_bytes, set()
    for step in range(NUM_SHARDS * ROW_GROUPS * ROWS // 16):
        for rank, mixture in enumerate(ranks):
            batches = mixture.micro_batches(step, rank=rank, world_size=num_ranks, micro_batch=4)
            keys |= {key for batch in batches for key in batch.keys_B.tolist()}
    kept = sum(path.stat().st_size for path in down.iterdir())
    assert len(keys) == NUM_SHARDS * ROWS * ROW_GROUPS
    assert cache_bytes <= store.num_bytes - before <= 1.2 * cache_bytes
    assert kept <= 33 * cache_bytes // NUM_SHARDS
    print(f"{num_ranks} ranks: downloaded {(store.num_bytes - before) / cache_bytes:.3f} of the cache")


def test_a_damaged_range_is_downloaded_once_more_and_then_named(
    store: CountedBucket, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, num_tries, num_damaged = upload(store, small, "damaged"), 0, 1

    def damaged(remote: RemotePath, local: Path, start: int, end: int) -> None:
        nonlocal num_tries
        object_store.download(remote, local, start, end)
        if start > 0 and end - start > 20_000:
            num_tries += 1
            if num_tries <= num_damaged:
                local.write_bytes(local.read_bytes()[:-1] + b"?")

    monkeypatch.setattr(downloads, "download", damaged)
    (mixture,) = mixtures(place, tmp_path / "a", 1 << 30, 1)
    expected = ShardReader(small).row(1, 0)[0].key
    assert mixture.readers[0].row(1, 0)[0].key == expected
    assert num_tries == 2
    num_tries, num_damaged = 0, 2
    (mixture,) = mixtures(place, tmp_path / "b", 1 << 30, 1)
    with pytest.raises(InputError, match=r"s3://bucket/damaged/shards/00000.parquet: expected sha256 .*damaged"):
        mixture.readers[0].row(1, 0)
    assert num_tries == 2
    assert not [path for path in (tmp_path / "b").iterdir() if path.name.endswith("-1")]
    assert mixture.readers[0].row(1, 0)[0].key == expected


def test_a_cache_without_hashes_of_row_groups_is_read_by_whole_shards(
    store: CountedBucket, small: Path, tmp_path: Path
) -> None:
    older = without_parts(Path(shutil.copytree(small, tmp_path / "older")))
    expected, (mixture,) = ShardReader(small), mixtures(upload(store, older, "older"), tmp_path / "down", 1 << 30, 1)
    for block in (0, 7, 8):
        assert mixture.readers[0].row(block, 1)[0].key == expected.row(block, 1)[0].key
        assert ShardReader(older).row(block, 1)[0].key == expected.row(block, 1)[0].key
    shard_files = [path for path in (tmp_path / "down").iterdir() if path.suffix != ".lock"]
    assert sorted(path.stat().st_size for path in shard_files) == sorted(
        path.stat().st_size for path in (small / "shards").glob("*.parquet")
    )
