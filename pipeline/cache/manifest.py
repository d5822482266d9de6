"""The manifest of a cache and its files: fingerprint, plan, the commit and the check of shards.

A local commit links a finished file to its name, which fails if the name exists. An object store has no links, and nor
have some file systems: there the name holds a part of the content's hash and a random token, so that no file replaces
another, and the ShardInfo, put last, always describes the bytes that it names.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import secrets
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import pyarrow.parquet as pq

from pipeline.cache.plain_manifest import check_same_inputs, check_seal, to_plain
from pipeline.cache.shard_parts import hash_parts, part_ends
from pipeline.core.file_systems import NO_LINKS
from pipeline.core.files import content_hash, file_hash, sync_folder
from pipeline.core.object_store import Location, RemotePath, age_seconds, names, open_location, upload, write_json
from pipeline.core.types import InputError, Manifest, ShardInfo

REQUESTS_AT_ONCE = 16
SHARD_FILE = re.compile(r"\d{5,}(-[0-9a-f]+)*\.parquet")
SHA256 = re.compile(r"[0-9a-f]{64}")


def fingerprint(made_of: dict[str, Any]) -> str:
    """sha256 of all that changes the content of a cache."""
    return content_hash(made_of)


def shard_range(manifest: Manifest, index: int) -> range:
    """The records of a shard; it depends on corpus and configuration only, not on the workers.

    With 25 records a shard, shard 1 holds records 25 to 49.
    """
    first = index * manifest.records_per_shard
    return range(first, min(first + manifest.records_per_shard, manifest.num_records))


def cache_location(manifest: Manifest, *, cache: str | None, caches_dir: str, name: str) -> Location:
    """The location of a cache: exactly `cache`, or in `caches_dir` under its name and fingerprint."""
    return open_location(caches_dir) / f"{name}-{manifest.fingerprint[:12]}" if cache is None else open_location(cache)


def manifest_path(cache: Location) -> Location:
    """The file of a cache's manifest."""
    return cache / "manifest.json"


def shard_file(cache: Location, info: ShardInfo) -> Location:
    """The Parquet file of a committed shard."""
    return cache / "shards" / info.file


def shard_path(cache: Path, index: int) -> Path:
    """The Parquet file of a shard of a local cache, committed or not."""
    return cache / "shards" / f"{index:05d}.parquet"


def info_path(cache: Location, index: int) -> Location:
    """The file of a ShardInfo; it exists only if the shard is complete."""
    return cache / "shards" / f"{index:05d}.json"


def lease_path(cache: Location, index: int) -> Location:
    """The lease of the worker that processes a shard."""
    return cache / "shards" / f".{index:05d}.lease"


def create_cache(cache: Location, manifest: Manifest) -> None:
    """Create a cache, or accept an existing one that was made of the same inputs."""
    if manifest_path(cache).exists():
        check_same_inputs(load_manifest(cache), manifest.made_of, cache)
        return
    try:
        if isinstance(cache, Path):
            (cache / "shards").mkdir(parents=True, exist_ok=True)
        write_json(manifest_path(cache), to_plain(manifest))
    except OSError as error:
        raise InputError(f"{cache}: expected a folder to write into, found {error.strerror}; choose another") from error
    # another process may have created another cache here just now
    check_same_inputs(load_manifest(cache), manifest.made_of, cache)


def load_manifest(cache: Location) -> Manifest:
    """Read a manifest; InputError if there is none."""
    try:
        plain = json.loads(manifest_path(cache).read_text())
    except FileNotFoundError:
        raise InputError(
            f"cache: expected {manifest_path(cache)}, found no such file; capture with scripts/capture.py"
        ) from None
    except NotADirectoryError:
        assert isinstance(cache, Path)
        folder = next((parent for parent in cache.parents if manifest_path(parent).exists()), "the folder of a cache")
        raise InputError(f"cache: expected a folder, found the file {cache}; give {folder}") from None
    manifest = Manifest(**{**plain, "temperatures": tuple(plain["temperatures"])})
    check_seal(manifest, manifest_path(cache))
    return manifest


def shard_info(cache: Location, index: int) -> ShardInfo | None:
    """The ShardInfo of a committed shard, or None."""
    try:
        plain = json.loads(info_path(cache, index).read_text())
    except FileNotFoundError:
        return None
    for name in ("row_groups", "retained_mass_histogram", "part_ends", "part_hashes"):
        plain[name] = tuple(plain.get(name, ()))
    info = ShardInfo(**{"file": f"{index:05d}.parquet", **plain})  # older caches do not hold the name
    _check_names(info, info_path(cache, index))
    return info


def _check_names(info: ShardInfo, path: Location) -> None:
    """Refuse a ShardInfo whose file or hash is more than a name: both become parts of local paths."""
    if not SHARD_FILE.fullmatch(info.file):
        raise InputError(
            f"{path}: file: expected the plain name of a shard, found {info.file!r}; do not use this cache"
        )
    if not SHA256.fullmatch(info.sha256):
        raise InputError(f"{path}: sha256: expected 64 hex digits, found {info.sha256!r}; do not use this cache")


def missing_shards(cache: Location, indices: Iterable[int]) -> list[int]:
    """The shards that are not committed; one listing of the folder, however many shards there are."""
    present = set(names(cache / "shards"))
    return [index for index in indices if info_path(cache, index).name not in present]


def commit_shard(cache: Location, temporary: Path, index: int) -> None:
    """Publish a finished temporary file as a shard: complete and durable, or not at all; never over an existing one.

    The data is durable before it gets its name, and the ShardInfo is written last. A shard that another worker has
    published meanwhile stays as it is.
    """
    try:
        info = describe_shard(temporary, index)
        if isinstance(cache, RemotePath):
            _commit_unlinked(cache, temporary, info)
        else:
            _commit_local(cache, temporary, info)
    except FileNotFoundError:  # another process took it for a dead worker's and deleted it
        if shard_info(cache, index) is None:
            raise
    temporary.unlink(missing_ok=True)


def _commit_local(cache: Path, temporary: Path, info: ShardInfo) -> None:
    try:
        os.link(temporary, shard_path(cache, info.index))
    except FileExistsError:
        adopt_orphan(cache, info.index)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        _commit_unlinked(cache, temporary, info)
    else:
        sync_folder(cache / "shards")
        write_json(info_path(cache, info.index), to_plain(info))


def _commit_unlinked(cache: Location, temporary: Path, info: ShardInfo) -> None:
    """Commit without links, under a name that no other commit gives.

    Two workers that commit at once leave two files and one ShardInfo that describes one of them. The other file stays:
    the worker that put it may be about to write its ShardInfo. A random token is in the name, because an upload that
    breaks off may leave a part of an object, which must not replace a complete one.
    """
    info = dataclasses.replace(info, file=f"{info.index:05d}-{info.sha256[:12]}-{secrets.token_hex(4)}.parquet")
    if info_path(cache, info.index).exists():
        return
    place = shard_file(cache, info)
    if isinstance(place, RemotePath):
        upload(temporary, place)
    else:
        temporary.rename(place)
        sync_folder(place.parent)
    if not info_path(cache, info.index).exists():
        write_json(info_path(cache, info.index), to_plain(info))


def footer_totals(*, targets: int, num_skipped: int, histogram: Sequence[int]) -> dict[str, str]:
    """What a writer adds to the metadata in a shard's footer, so that a ShardInfo can be made from the file alone."""
    return {"totals": json.dumps({"targets": targets, "num_skipped": num_skipped, "histogram": list(histogram)})}


def describe_shard(path: Path, index: int) -> ShardInfo:
    """The ShardInfo of a complete file, with its name in a local cache; ValueError if the file is not complete."""
    metadata = pq.read_metadata(path)
    totals = json.loads((metadata.metadata or {}).get(b"totals", b"null"))
    if totals is None:
        raise ValueError("no totals in its footer")
    row_groups = tuple(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
    ends = part_ends(metadata, path.stat().st_size)
    sha256, part_hashes = hash_parts(path, ends)
    return ShardInfo(
        index=index,
        file=f"{index:05d}.parquet",
        rows=metadata.num_rows,
        row_groups=row_groups,
        targets=totals["targets"],
        bytes=ends[-1],
        sha256=sha256,
        num_skipped=totals["num_skipped"],
        retained_mass_histogram=tuple(totals["histogram"]),
        part_ends=ends,
        part_hashes=part_hashes,
    )


def adopt_orphan(cache: Location, index: int) -> bool:
    """Write the missing ShardInfo of a shard whose worker died just before that; False if there is no shard."""
    if isinstance(cache, RemotePath):  # an object there may be a part of an upload
        return False
    path = shard_path(cache, index)
    if not path.exists():
        return False
    if shard_info(cache, index) is None:
        try:
            info = describe_shard(path, index)
        except ValueError as error:
            raise InputError(f"{path}: expected a complete shard, found it damaged ({error}); delete it") from None
        write_json(info_path(cache, index), to_plain(info))
    return True


def finalize_cache(cache: Location, manifest: Manifest, *, stale_seconds: float) -> Manifest:
    """Write the totals into the manifest once every shard is committed, and delete what dead workers left."""
    infos = committed_shards(cache, manifest)
    finished = dataclasses.replace(manifest, num_skipped=sum(info.num_skipped for info in infos))
    if load_manifest(cache) != finished:
        write_json(manifest_path(cache), to_plain(finished))
    _delete_stale_files(cache / "shards", stale_seconds)
    return finished


def _delete_stale_files(shards: Location, stale_seconds: float) -> None:
    """Delete the leases and temporary files that were not written for `stale_seconds`."""
    for place in [shards / name for name in names(shards) if name.startswith(".")]:
        with contextlib.suppress(FileNotFoundError):
            if age_seconds(place) > stale_seconds:
                place.unlink()


def committed_shards(cache: Location, manifest: Manifest) -> list[ShardInfo]:
    """The ShardInfo of every shard of the plan; InputError if the cache is not complete."""
    with ThreadPoolExecutor(1 if isinstance(cache, Path) else REQUESTS_AT_ONCE) as pool:
        infos = list(pool.map(partial(shard_info, cache), range(manifest.num_shards)))
    present = [info for info in infos if info is not None]
    if len(present) != manifest.num_shards:
        script = "pool" if "pool" in manifest.made_of else "capture" if manifest.tail == "exact" else "import"
        raise InputError(
            f"{cache}: expected {manifest.num_shards} committed shards, found {len(present)}; "
            f"run the same scripts/{script}.py again, it continues where it stopped"
        )
    return present


def check_shard_hash(cache: Location, info: ShardInfo, path: Path | None = None) -> None:
    """Raise InputError for a shard whose bytes are not the committed ones; `path` is a download of it."""
    path = cache / "shards" / info.file if path is None and isinstance(cache, Path) else path
    assert path is not None
    if not path.exists():
        refuse_missing(cache, info)
    check_hash(cache, info, found=file_hash(path), expected=info.sha256)


def check_hash(cache: Location, info: ShardInfo, *, found: str, expected: str) -> None:
    """Raise InputError if the sha256 of a shard, or of a part of it, does not begin with the committed digits."""
    if not found.startswith(expected):
        raise InputError(
            f"{shard_file(cache, info)}: expected sha256 {expected[:12]}, found {found[:12]}; the shard is damaged: "
            f"delete it and {info_path(cache, info.index).name} beside it, then run the command that made "
            "the cache again (only this shard is redone)"
        )


def refuse_missing(cache: Location, info: ShardInfo) -> NoReturn:
    """Raise InputError for a committed shard that is no longer there: it alone, or the cache with it."""
    if not manifest_path(cache).exists():
        raise InputError(
            f"{cache}: expected a cache, found none there any more: it was moved or deleted; put it back or give its "
            "new place, or make it again"
        )
    raise InputError(
        f"{shard_file(cache, info)}: expected a shard, found no such file; put it back, or delete "
        f"{info_path(cache, info.index).name} beside it and run its command again (only this shard is redone)"
    )
