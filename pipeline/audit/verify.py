"""Is a cache whole and right? Every byte of it, and what the bytes say, against what the manifest promises.

A finding is one line: where, what was expected, what was found, what to do. Memory holds one row group at a time.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.audit.row_checks import Wrong, wrong_distributions, wrong_lists, wrong_sequences
from pipeline.audit.row_groups import distributions, read_groups
from pipeline.cache import manifest as manifests
from pipeline.cache.schema import SCHEMA_VERSION, shard_schema
from pipeline.cache.shards import retained_mass_histogram
from pipeline.core.progress import Progress
from pipeline.core.types import InputError, Manifest, ShardInfo

PROMISED = ("kind", "k", "draws", "draw_seed", "temperatures", "window", "records_per_shard", "schema_version")
NUMBERS = (
    *("schema_version", "k", "draws", "draw_seed", "vocabulary_size", "window"),
    *("num_records", "num_shards", "records_per_shard"),
)
REDO = "delete it and the .json beside it, then capture again (only it is redone)"


def load_manifest(cache: Path) -> Manifest:
    """A manifest whose fields are what they should be; InputError if it cannot be read at all."""
    path = manifests.manifest_path(cache)
    try:
        manifest = manifests.load_manifest(cache)
        wrong = [name for name in NUMBERS if type(getattr(manifest, name)) is not int]
        wrong += [name for name in ("fingerprint", "kind") if type(getattr(manifest, name)) is not str]
        wrong += [] if type(manifest.made_of) is dict else ["made_of"]
        wrong += [] if all(type(T) is float and T > 0 for T in manifest.temperatures) else ["temperatures"]
        wrong += [] if type(manifest.num_skipped) in (int, type(None)) else ["num_skipped"]
        if wrong or manifest.records_per_shard < 1 or manifest.kind not in ("topk", "sampled", "hybrid"):
            raise ValueError(f"{', '.join(wrong) or 'kind or records_per_shard'} cannot be")
        if manifest.vocabulary_size < 1 or manifest.k < (manifest.kind == "topk") or not manifest.temperatures:
            raise ValueError("vocabulary_size, k or temperatures cannot be")
    except InputError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        raise InputError(
            f"{path}: expected a manifest, found one that cannot be read ({error}); restore it from a copy, "
            "or capture into another folder"
        ) from None
    return manifest


def findings(cache: Path, *, log_every_seconds: float = 10.0) -> list[str]:
    """All that is wrong with a cache, one line each; none if it is whole and right."""
    manifest = load_manifest(cache)
    planned = max(-(-manifest.num_records // manifest.records_per_shard), 0)
    found = list(_promise(cache, manifest, planned))
    present = sorted(index for index in _indices(cache) if index < planned)
    found += [*_strays(cache, planned), *_gaps(cache, present, planned)]
    num_skipped, total = 0, sum(manifests.shard_path(cache, index).stat().st_size for index in present)
    progress = Progress("verify", total=total, unit=" bytes", log_every_seconds=log_every_seconds)
    for index in present:
        wrong, skipped = check_shard(cache, manifest, index)
        found += wrong
        num_skipped += skipped
        progress.advance(manifests.shard_path(cache, index).stat().st_size, findings=len(found))
    progress.close()
    if len(present) == planned and manifest.num_skipped not in (None, num_skipped):
        found.append(
            f"{manifests.manifest_path(cache)}: num_skipped: expected {num_skipped} (the shards'), found "
            f"{manifest.num_skipped}; {RESTORE}"
        )
    return found


# ---------------------------------------------------------------------------------------- the promise

RESTORE = "restore manifest.json from a copy, or capture into another folder"


def _promise(cache: Path, manifest: Manifest, planned: int) -> Iterator[str]:
    """What the manifest says of itself; its text is compared too, so that no byte of it may differ."""
    path = cache / "manifest.json"
    if manifest.fingerprint != manifests.fingerprint(manifest.made_of):
        right = manifests.fingerprint(manifest.made_of)[:12]
        yield f"{path}: fingerprint: expected {right} (hash of made_of), found {manifest.fingerprint[:12]}; {RESTORE}"
    for name in PROMISED:
        value = getattr(manifest, name)
        value = list(value) if isinstance(value, tuple) else value
        if name in manifest.made_of and value != manifest.made_of[name]:
            yield f"{path}: {name}: expected {manifest.made_of[name]} (made_of), found {value}; {RESTORE}"
    if manifest.schema_version != SCHEMA_VERSION:
        yield f"{path}: schema_version: expected {SCHEMA_VERSION}, found {manifest.schema_version}; use its version"
    if manifest.num_shards != planned:
        yield f"{path}: num_shards: expected {planned} (the plan), found {manifest.num_shards}; {RESTORE}"
    if manifest.num_skipped is None:
        yield f"{path}: num_skipped: expected a number, found null: the capture is not finished; run it again"
    if path.read_bytes() != _written(manifest):
        yield f"{path}: expected the bytes that capture writes, found others that mean the same; {RESTORE}"


def _written(value: Any) -> bytes:
    """The bytes of a value as `files.write_json` leaves them."""
    return (json.dumps(dataclasses.asdict(value), indent=2) + "\n").encode()


# ------------------------------------------------------------------------------------------- the plan


def _indices(cache: Path) -> list[int]:
    """The shards that have a Parquet file."""
    files = (cache / "shards").glob("*.parquet")
    found = [int(path.stem) for path in files if re.fullmatch(r"\d{5,}", path.stem) and path.is_file()]
    return [index for index in found if manifests.shard_path(cache, index).exists()]


def _gaps(cache: Path, present: list[int], planned: int) -> Iterator[str]:
    """One line a run of missing shards."""
    edges = [-1, *present, planned]
    for before, after in itertools.pairwise(edges):
        if after - before > 1:
            first, last = manifests.shard_path(cache, before + 1), manifests.shard_path(cache, after - 1)
            where = str(first) if first == last else f"{first} to {last.name}"
            missing = "a shard" if first == last else f"{after - before - 1} shards"
            yield f"{where}: expected {missing} of the plan, found no file; capture again (it goes on)"


def _strays(cache: Path, planned: int) -> Iterator[str]:
    """Whatever a finished capture does not leave."""
    for path in sorted([*cache.iterdir(), *(cache / "shards").glob("*"), *(cache / "shards").glob(".*")]):
        is_shard = re.fullmatch(r"\d{5,}\.(parquet|json)", path.name) and int(path.stem) < planned
        is_own = path.name == "manifest.json" and path.is_file()
        if path.parent == cache and (is_own or path.name == "shards"):
            continue
        if path.parent != cache and is_shard and path.is_file() and path.stem == f"{int(path.stem):05d}":
            continue
        if path.name.startswith(".") and path.parent != cache:
            yield f"{path}: expected no claim or temporary file, found one; a worker is at work or died: capture again"
        else:
            yield f"{path}: expected only files of the plan, found this one; move it elsewhere"


# ------------------------------------------------------------------------------------------ one shard


def check_shard(cache: Path, manifest: Manifest, index: int) -> tuple[list[str], int]:
    """What is wrong with one shard, and the records that it says were left out."""
    path = manifests.shard_path(cache, index)
    try:
        info = manifests.describe_shard(path, index)
    except (ValueError, OSError, KeyError, TypeError, AttributeError, pa.ArrowException) as error:
        return [f"{path}: expected a whole Parquet file, found it damaged ({_line(error)}); {REDO}"], 0
    wrong = list(_vouched(cache, info))
    if wrong:  # its bytes are not those that were committed: what they say is not worth a look
        return wrong, info.num_skipped
    try:
        wrong = list(_footer(path, manifest)) or list(_content(path, manifest, info))
    except (ValueError, OSError, KeyError, pa.ArrowException) as error:
        wrong = [f"{path}: expected readable rows, found them damaged ({_line(error)}); {REDO}"]
    return wrong, info.num_skipped


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _vouched(cache: Path, info: ShardInfo) -> Iterator[str]:
    """The shard's ShardInfo, byte for byte what describes the shard as it is now."""
    path, beside = manifests.shard_path(cache, info.index), manifests.info_path(cache, info.index)
    if not beside.exists():
        yield f"{beside}: expected the ShardInfo of a committed shard, found no file; capture again, it is mended"
        return
    assert isinstance(beside, Path)
    if beside.read_bytes() == _written(info):
        return
    try:
        said = manifests.shard_info(cache, info.index)
        assert said is not None
    except (ValueError, TypeError, KeyError) as error:
        yield f"{beside}: expected a ShardInfo, found one that cannot be read ({_line(error)}); {REDO}"
        return
    if said.sha256 != info.sha256:
        yield f"{path}: expected sha256 {said.sha256[:12]} ({beside.name}), found {info.sha256[:12]}; {REDO}"
    fields = [field.name for field in dataclasses.fields(said) if field.name != "sha256"]
    for name in fields:
        if getattr(said, name) != getattr(info, name):
            yield f"{beside}: {name}: expected {getattr(info, name)} (the shard's), found {getattr(said, name)}; {REDO}"
    if said == info:
        yield f"{beside}: expected the bytes that capture writes, found others that mean the same; {REDO}"


def _footer(path: Path, manifest: Manifest) -> Iterator[str]:
    """Columns, types and promises in the Parquet footer."""
    found = pq.read_schema(path)
    expected = shard_schema(manifest)
    for name in sorted({*expected.names, *found.names}):
        sides = [schema.field(name) if name in schema.names else "no such column" for schema in (expected, found)]
        if sides[0] != sides[1]:
            yield f"{path}: columns: expected {sides[0]}, found {sides[1]}; {REDO}"
    if expected.names != found.names and sorted(expected.names) == sorted(found.names):
        yield f"{path}: columns: expected the order {expected.names}, found {found.names}; {REDO}"
    said = {key.decode(): value.decode(errors="replace") for key, value in (found.metadata or {}).items()}
    promised = {"fingerprint": manifest.fingerprint, "schema_version": str(manifest.schema_version)}
    promised["vocabulary_size"] = str(manifest.vocabulary_size)
    for name, value in promised.items():
        if said.get(name) != value:
            yield f"{path}: {name}: expected {value[:12]} (the manifest's), found {said.get(name, 'none')[:12]}; {REDO}"


def _content(path: Path, manifest: Manifest, info: ShardInfo) -> Iterator[str]:
    """The rows, one row group at a time, and what they add up to."""
    records = manifests.shard_range(manifest, info.index)
    seen = np.zeros(len(records), dtype=bool)
    targets, histogram, first = 0, torch.zeros(10, dtype=torch.int64), 0
    for columns in read_groups(path):
        wrong = [item for item in wrong_lists(columns, manifest) if len(item[1])]
        if not wrong:
            checks = (*wrong_sequences(columns, manifest, records), *wrong_distributions(columns, manifest))
            wrong = [item for item in checks if len(item[1])]
            histogram += retained_mass_histogram(distributions(columns, manifest))
        yield from (_told(path, item, first) for item in wrong)
        ids = columns.values["record_ids"]
        seen[ids[(ids >= records.start) & (ids < records.stop)] - records.start] = True
        targets, first = targets + len(columns.values["target_positions"]), first + columns.num_rows
    yield from _totals(path, info, num_records=len(records), seen=int(seen.sum()), targets=targets, histogram=histogram)


def _told(path: Path, wrong: Wrong, first: int) -> str:
    what, rows = wrong
    more = f" and {len(rows) - 1} more of its row group" if len(rows) > 1 else ""
    return f"{path}: row {first + int(rows[0])}{more}: {what}, found otherwise; {REDO}"


def _totals(
    path: Path, info: ShardInfo, *, num_records: int, seen: int, targets: int, histogram: torch.Tensor
) -> Iterator[str]:
    if seen + info.num_skipped != num_records:
        yield (
            f"{path}: records: expected all {num_records} of the plan, found {seen} and {info.num_skipped} skipped; "
            f"{REDO}"
        )
    if targets != info.targets:
        yield f"{path}: targets: expected {info.targets} (its footer), found {targets}; {REDO}"
    said = torch.tensor(info.retained_mass_histogram)
    # a mass at the edge of two bins may fall on either side where exponentials are rounded otherwise
    if said.shape != histogram.shape or (said - histogram).abs().sum() > 2 + math.ceil(targets / 1000):
        yield f"{path}: retained_mass_histogram: expected {histogram.tolist()}, found {said.tolist()}; {REDO}"
