"""What a cache promises and how it is kept: fingerprint, plan, the commit and the check of shards."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

from pipeline.files import content_hash, file_hash, sync_folder, write_json
from pipeline.schema import describe
from pipeline.types import InputError, Manifest, ShardInfo


def fingerprint(made_of: dict[str, Any]) -> str:
    """sha256 of all that changes the content of a cache."""
    return content_hash(made_of)


def shard_range(manifest: Manifest, index: int) -> range:
    """The records of a shard: a pure function of corpus and configuration, never of who does the work."""
    first = index * manifest.records_per_shard
    return range(first, min(first + manifest.records_per_shard, manifest.num_records))


def manifest_path(cache: Path) -> Path:
    """Where a cache's promise is written."""
    return cache / "manifest.json"


def shard_path(cache: Path, index: int) -> Path:
    """The Parquet file of a shard."""
    return cache / "shards" / f"{index:05d}.parquet"


def info_path(cache: Path, index: int) -> Path:
    """The ShardInfo of a shard; it exists only if the shard is whole."""
    return cache / "shards" / f"{index:05d}.json"


def claim_path(cache: Path, index: int) -> Path:
    """Who is at work on a shard."""
    return cache / "shards" / f".{index:05d}.claim"


def start(cache: Path, manifest: Manifest) -> None:
    """Create a cache folder, or accept the one that is there if it makes the same promise."""
    if manifest_path(cache).exists():
        check_same(load(cache), manifest.made_of, cache)
        return
    try:
        (cache / "shards").mkdir(parents=True, exist_ok=True)
        write_json(manifest_path(cache), dataclasses.asdict(manifest))
    except OSError as error:
        raise InputError(f"{cache}: expected a folder to write into, found {error.strerror}; choose another") from error


def load(cache: Path) -> Manifest:
    """Read a manifest."""
    if not manifest_path(cache).exists():
        raise InputError(f"cache: expected {manifest_path(cache)}, found no such file; capture with scripts/capture.py")
    plain = json.loads(manifest_path(cache).read_text())
    return Manifest(**{**plain, "temperatures": tuple(plain["temperatures"])})


def check_same(found: Manifest, made_of: dict[str, Any], cache: Path) -> None:
    """Refuse a cache made of something else, naming the fields that differ."""
    differing = sorted(
        key for key in made_of.keys() | found.made_of.keys() if made_of.get(key) != found.made_of.get(key)
    )
    if differing:
        lines = [f"  {key}: expected {made_of.get(key)!r}, found {found.made_of.get(key)!r}" for key in differing]
        raise InputError(
            f"{cache} was made of something else; capture into another folder or delete it:\n" + "\n".join(lines)
        )


def committed(cache: Path, index: int) -> ShardInfo | None:
    """The ShardInfo of a committed shard, or None."""
    if not info_path(cache, index).exists():
        return None
    plain = json.loads(info_path(cache, index).read_text())
    for name in ("row_groups", "retained_mass_histogram"):
        plain[name] = tuple(plain[name])
    return ShardInfo(**plain)


def commit(cache: Path, temporary: Path, index: int) -> None:
    """Publish a finished temporary file as a shard: whole and durable, or not at all; never over another.

    The data is on disk before its name is, and its name before the ShardInfo that vouches for both. A shard that
    somebody else has published meanwhile stays as it is.
    """
    try:
        info = describe(temporary, index)
        os.link(temporary, shard_path(cache, index))
    except FileExistsError:
        adopt(cache, index)
    except FileNotFoundError:  # taken for a dead worker's and swept away
        if committed(cache, index) is None:
            raise
    else:
        sync_folder(cache / "shards")
        write_json(info_path(cache, index), dataclasses.asdict(info))
    temporary.unlink(missing_ok=True)


def adopt(cache: Path, index: int) -> bool:
    """Vouch for a shard that has its name but, by a crash just then, no ShardInfo; False if there is none."""
    path = shard_path(cache, index)
    if not path.exists():
        return False
    if committed(cache, index) is None:
        try:
            info = describe(path, index)
        except ValueError as error:
            raise InputError(f"{path}: expected a whole shard, found it damaged ({error}); delete it") from None
        write_json(info_path(cache, index), dataclasses.asdict(info))
    return True


def finish(cache: Path, manifest: Manifest, *, stale_seconds: float) -> Manifest:
    """Write the totals into the manifest once every shard is committed, and sweep out what dead workers left."""
    infos = whole(cache, manifest)
    finished = dataclasses.replace(manifest, num_skipped=sum(info.num_skipped for info in infos))
    if load(cache) != finished:
        write_json(manifest_path(cache), dataclasses.asdict(finished))
    for left in (cache / "shards").glob(".*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - left.stat().st_mtime > stale_seconds:
                left.unlink()
    return finished


def whole(cache: Path, manifest: Manifest) -> list[ShardInfo]:
    """The ShardInfo of every shard of the plan; refuses a cache that is not finished."""
    infos = [committed(cache, index) for index in range(manifest.num_shards)]
    present = [info for info in infos if info is not None]
    if len(present) != manifest.num_shards:
        maker = "scripts/capture.py" if manifest.tail == "exact" else "scripts/import.py"
        raise InputError(
            f"{cache}: expected {manifest.num_shards} committed shards, found {len(present)}; "
            f"run the same {maker} again, it goes on where it stopped"
        )
    return present


def check_shard(cache: Path, info: ShardInfo) -> None:
    """Refuse a shard whose bytes are not those that were committed."""
    path = shard_path(cache, info.index)
    found = file_hash(path) if path.exists() else "no file"
    if found != info.sha256:
        raise InputError(
            f"{path}: expected sha256 {info.sha256[:12]}, found {found[:12]}; the shard is damaged: "
            f"delete it and {info_path(cache, info.index).name} beside it, then make it again (only it is redone)"
        )
