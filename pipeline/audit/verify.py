"""Is a cache complete and correct? Every byte of it is checked against the manifest, and every value of its rows.

A finding is one line: where, what was expected, what was found, what to do. Memory holds one row group at a time.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from pipeline.audit.shard_checks import holds_json, verify_shard
from pipeline.cache import manifest as manifests
from pipeline.cache.schema import SCHEMA_VERSION
from pipeline.core.object_store import Location, RemotePath, names
from pipeline.core.progress import Progress
from pipeline.core.types import InputError, Manifest

# fields of the manifest that `made_of` holds too
REPEATED_FIELDS = ("kind", "k", "draws", "draw_seed", "temperatures", "window", "records_per_shard", "schema_version")
INTEGER_FIELDS = (
    *("schema_version", "k", "draws", "draw_seed", "vocabulary_size", "window"),
    *("num_records", "num_shards", "records_per_shard"),
)
RESTORE_MANIFEST = "restore manifest.json from a copy, or capture into another folder"
SHARD_NAME = re.compile(r"(\d{5,})(?:\.json|(?:-[0-9a-f]+)*\.parquet)")


def load_manifest(cache: Location) -> Manifest:
    """The manifest with its fields checked for type and range; InputError if it cannot be read."""
    path = manifests.manifest_path(cache)
    try:
        manifest = manifests.load_manifest(cache)
        _check_fields(manifest)
    except InputError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        raise InputError(
            f"{path}: expected a manifest, found one that cannot be read ({error}); restore it from a copy, "
            "or capture into another folder"
        ) from None
    return manifest


def _check_fields(manifest: Manifest) -> None:
    """ValueError if a field has a type or a value that no manifest can have."""
    wrong = [name for name in INTEGER_FIELDS if type(getattr(manifest, name)) is not int]
    wrong += [name for name in ("fingerprint", "kind") if type(getattr(manifest, name)) is not str]
    if type(manifest.made_of) is not dict:
        wrong.append("made_of")
    if not all(type(T) is float and T > 0 for T in manifest.temperatures):
        wrong.append("temperatures")
    if type(manifest.num_skipped) not in (int, type(None)):
        wrong.append("num_skipped")
    if not wrong:  # else the values cannot be compared
        wrong += ["kind"] if manifest.kind not in ("topk", "sampled", "hybrid") else []
        wrong += ["records_per_shard"] if manifest.records_per_shard < 1 else []
        wrong += ["vocabulary_size"] if manifest.vocabulary_size < 1 else []
        wrong += ["k"] if manifest.k < (1 if manifest.kind == "topk" else 0) else []
        wrong += ["temperatures"] if not manifest.temperatures else []
    if wrong:
        raise ValueError(f"impossible value of {', '.join(wrong)}")


def findings(cache: Location, *, log_every_seconds: float = 10.0) -> list[str]:
    """Everything that is wrong with a cache, one line each; an empty list for a complete and correct cache."""
    manifest = load_manifest(cache)
    # rounded up: 60 records in shards of 25 are 3 shards
    num_planned = max((manifest.num_records + manifest.records_per_shard - 1) // manifest.records_per_shard, 0)
    lines = list(_verify_manifest(cache, manifest, num_planned))
    found = set(names(cache / "shards"))
    files = _committed_files(cache, found, num_planned)
    present = [index for index, file in sorted(files.items()) if file in found]
    lines += _unexpected_files(cache, files, num_planned)
    lines += _missing_shards(cache, present, num_planned)
    num_skipped = 0
    progress = Progress("verify", total=len(present), unit=" shards", log_every_seconds=log_every_seconds)
    for index in present:
        lines_of_shard, num_skipped_of_shard = verify_shard(cache, manifest, index, files[index])
        lines += lines_of_shard
        num_skipped += num_skipped_of_shard
        progress.advance(1, findings=len(lines))
    progress.close()
    if len(present) == num_planned and manifest.num_skipped not in (None, num_skipped):
        lines.append(
            f"{manifests.manifest_path(cache)}: num_skipped: expected {num_skipped} (sum over the shards), found "
            f"{manifest.num_skipped}; {RESTORE_MANIFEST}"
        )
    return lines


# ------------------------------------------------------------------------------ the manifest and the files


def _verify_manifest(cache: Location, manifest: Manifest, num_planned: int) -> Iterator[str]:
    """Whether the manifest agrees with itself; its bytes are compared too, so that a change of any byte is found."""
    path = manifests.manifest_path(cache)
    expected_hash = manifests.fingerprint(manifest.made_of)
    if manifest.fingerprint != expected_hash:
        yield (
            f"{path}: fingerprint: expected {expected_hash[:12]} (hash of made_of), found {manifest.fingerprint[:12]}; "
            f"{RESTORE_MANIFEST}"
        )
    for name in REPEATED_FIELDS:
        value = getattr(manifest, name)
        value = list(value) if isinstance(value, tuple) else value
        if name in manifest.made_of and value != manifest.made_of[name]:
            yield f"{path}: {name}: expected {manifest.made_of[name]} (made_of), found {value}; {RESTORE_MANIFEST}"
    if manifest.schema_version != SCHEMA_VERSION:
        yield (
            f"{path}: schema_version: expected {SCHEMA_VERSION}, found {manifest.schema_version}; "
            "use the version of this project that captured it"
        )
    if manifest.num_shards != num_planned:
        yield (
            f"{path}: num_shards: expected {num_planned} (num_records / records_per_shard), found "
            f"{manifest.num_shards}; {RESTORE_MANIFEST}"
        )
    if manifest.num_skipped is None:
        yield f"{path}: num_skipped: expected a number, found null: the capture is not finished; run it again"
    if not holds_json(path, manifest):
        yield f"{path}: expected the bytes that capture writes, found other bytes; {RESTORE_MANIFEST}"


def _committed_files(cache: Location, found: set[str], num_planned: int) -> dict[int, str]:
    """Of each shard with a file in `found`: the name of its Parquet file, by its ShardInfo where this can be read."""
    indices = {index for name in found if (index := _planned_index(name, num_planned)) is not None}
    with ThreadPoolExecutor(1 if isinstance(cache, Path) else manifests.REQUESTS_AT_ONCE) as pool:
        return dict(zip(indices, pool.map(partial(_committed_file, cache), indices), strict=True))


def _committed_file(cache: Location, index: int) -> str:
    try:
        info = manifests.shard_info(cache, index)
    except (ValueError, TypeError, KeyError):  # verify_shard names the reason
        info = None
    return f"{index:05d}.parquet" if info is None else info.file


def _planned_index(name: str, num_planned: int) -> int | None:
    """The shard of 00012.json, 00012.parquet or 00012-HASH-TOKEN.parquet; None for any other name."""
    match = SHARD_NAME.fullmatch(name)
    index = int(match[1]) if match else num_planned
    return index if index < num_planned and name.startswith(f"{index:05d}") else None


def _missing_shards(cache: Location, present: list[int], num_planned: int) -> Iterator[str]:
    """One line for each run of missing shards."""
    # present 0, 3 of 5 planned: the neighbours -1 0, 0 3 and 3 5 enclose nothing, the shards 1 and 2, and the shard 4
    for before, after in itertools.pairwise([-1, *present, num_planned]):
        if after - before > 1:
            first, last = cache / "shards" / f"{before + 1:05d}.parquet", f"{after - 1:05d}.parquet"
            where, what = (f"{first} to {last}", f"{after - before - 1} planned shards")
            if first.name == last:
                where, what = str(first), "a planned shard"
            yield (
                f"{where}: expected {what}, found no file; delete the .json beside it if there is one, and run the "
                "same capture again (it continues)"
            )


def _unexpected_files(cache: Location, files: dict[int, str], num_planned: int) -> Iterator[str]:
    """One line for each file that a finished capture does not leave behind.

    A shard under a unique name that no ShardInfo has is expected: another worker had committed the shard meanwhile.
    """
    for place in [folder / name for folder in (cache, cache / "shards") for name in names(folder)]:
        is_file = isinstance(place, RemotePath) or place.is_file()
        if place.parent == cache:
            is_expected = place.name == "shards" or (place.name == "manifest.json" and is_file)
        else:
            index = _planned_index(place.name, num_planned)
            is_expected = is_file and index is not None and place.name in (f"{index:05d}.json", files.get(index))
            is_expected |= is_file and index is not None and "-" in place.name
        if place.parent != cache and place.name.startswith("."):
            yield (
                f"{place}: expected no lease or temporary file, found one; wait for the worker that captures this "
                "shard, or capture again if it has died"
            )
        elif not is_expected:
            yield f"{place}: expected only files of planned shards, found this one; move it elsewhere"
