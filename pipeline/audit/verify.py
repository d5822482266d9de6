"""Is a cache complete and correct? Every byte of it is checked against the manifest, and every value of its rows.

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

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.audit.row_checks import CheckResult, check_distributions, check_lists, check_sequences
from pipeline.audit.row_groups import distributions, read_row_groups
from pipeline.cache import manifest as manifests
from pipeline.cache.schema import SCHEMA_VERSION, shard_schema
from pipeline.cache.shards import retained_mass_histogram
from pipeline.core.progress import Progress
from pipeline.core.types import InputError, Manifest, ShardInfo

# fields of the manifest that `made_of` holds too
REPEATED_FIELDS = ("kind", "k", "draws", "draw_seed", "temperatures", "window", "records_per_shard", "schema_version")
INTEGER_FIELDS = (
    *("schema_version", "k", "draws", "draw_seed", "vocabulary_size", "window"),
    *("num_records", "num_shards", "records_per_shard"),
)
RESTORE_MANIFEST = "restore manifest.json from a copy, or capture into another folder"
REDO_SHARD = "delete it and the .json beside it, then capture again (only this shard is captured again)"


def load_manifest(cache: Path) -> Manifest:
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


def findings(cache: Path, *, log_every_seconds: float = 10.0) -> list[str]:
    """Everything that is wrong with a cache, one line each; an empty list for a complete and correct cache."""
    manifest = load_manifest(cache)
    # rounded up: 60 records in shards of 25 are 3 shards
    num_planned = max((manifest.num_records + manifest.records_per_shard - 1) // manifest.records_per_shard, 0)
    lines = list(_verify_manifest(cache, manifest, num_planned))
    present = sorted(index for index in _shard_indices(cache) if index < num_planned)
    lines += _unexpected_files(cache, num_planned)
    lines += _missing_shards(cache, present, num_planned)
    sizes = {index: manifests.shard_path(cache, index).stat().st_size for index in present}
    num_skipped = 0
    progress = Progress("verify", total=sum(sizes.values()), unit=" bytes", log_every_seconds=log_every_seconds)
    for index in present:
        lines_of_shard, num_skipped_of_shard = verify_shard(cache, manifest, index)
        lines += lines_of_shard
        num_skipped += num_skipped_of_shard
        progress.advance(sizes[index], findings=len(lines))
    progress.close()
    if len(present) == num_planned and manifest.num_skipped not in (None, num_skipped):
        lines.append(
            f"{manifests.manifest_path(cache)}: num_skipped: expected {num_skipped} (sum over the shards), found "
            f"{manifest.num_skipped}; {RESTORE_MANIFEST}"
        )
    return lines


# ------------------------------------------------------------------------------ the manifest and the files


def _verify_manifest(cache: Path, manifest: Manifest, num_planned: int) -> Iterator[str]:
    """Whether the manifest agrees with itself; its bytes are compared too, so that a change of any byte is found."""
    path = manifests.manifest_path(cache)
    assert isinstance(path, Path)
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
    if path.read_bytes() != _json_bytes(manifest):
        yield f"{path}: expected the bytes that capture writes, found other bytes; {RESTORE_MANIFEST}"


def _json_bytes(value: Manifest | ShardInfo) -> bytes:
    """The bytes that `files.write_json` writes."""
    return (json.dumps(manifests.to_plain(value), indent=2) + "\n").encode()


def _shard_indices(cache: Path) -> list[int]:
    """The indices of the shards whose Parquet file exists."""
    files = (cache / "shards").glob("*.parquet")
    indices = [int(path.stem) for path in files if re.fullmatch(r"\d{5,}", path.stem) and path.is_file()]
    return [index for index in indices if manifests.shard_path(cache, index).exists()]


def _missing_shards(cache: Path, present: list[int], num_planned: int) -> Iterator[str]:
    """One line for each run of missing shards."""
    # present 0, 3 of 5 planned: the neighbours -1 0, 0 3 and 3 5 enclose nothing, the shards 1 and 2, and the shard 4
    for before, after in itertools.pairwise([-1, *present, num_planned]):
        if after - before > 1:
            first, last = manifests.shard_path(cache, before + 1), manifests.shard_path(cache, after - 1)
            where = str(first) if first == last else f"{first} to {last.name}"
            missing = "a planned shard" if first == last else f"{after - before - 1} planned shards"
            yield f"{where}: expected {missing}, found no file; run the same capture again (it continues)"


def _unexpected_files(cache: Path, num_planned: int) -> Iterator[str]:
    """One line for each file that a finished capture does not leave behind."""
    shards = cache / "shards"
    for path in sorted([*cache.iterdir(), *shards.glob("*")]):
        if path.parent == cache:
            is_expected = path == shards or (path.name == "manifest.json" and path.is_file())
            is_temporary = False
        else:
            is_expected = path.is_file() and _is_planned_shard(path, num_planned)
            is_temporary = path.name.startswith(".")
        if is_temporary:
            yield (
                f"{path}: expected no lease or temporary file, found one; wait for the worker that captures this "
                "shard, or capture again if it has died"
            )
        elif not is_expected:
            yield f"{path}: expected only files of planned shards, found this one; move it elsewhere"


def _is_planned_shard(path: Path, num_planned: int) -> bool:
    """Whether a name is 00012.parquet or 00012.json with an index below `num_planned`."""
    if not re.fullmatch(r"\d{5,}\.(parquet|json)", path.name):
        return False
    index = int(path.stem)
    return index < num_planned and path.stem == f"{index:05d}"


# ------------------------------------------------------------------------------------------ one shard


def verify_shard(cache: Path, manifest: Manifest, index: int) -> tuple[list[str], int]:
    """The findings about one shard, and the number of skipped records in its footer."""
    path = manifests.shard_path(cache, index)
    try:
        info = manifests.describe_shard(path, index)
    except (ValueError, OSError, KeyError, TypeError, AttributeError, pa.ArrowException) as error:
        return [f"{path}: expected a complete Parquet file, found it damaged ({_one_line(error)}); {REDO_SHARD}"], 0
    lines = list(_verify_info(cache, info))
    if lines:  # these are not the bytes that were committed: there is no use in checking their content
        return lines, info.num_skipped
    try:
        lines = list(_verify_footer(path, manifest)) or list(_verify_rows(path, manifest, info))
    except (ValueError, OSError, KeyError, pa.ArrowException) as error:
        lines = [f"{path}: expected readable rows, found them damaged ({_one_line(error)}); {REDO_SHARD}"]
    return lines, info.num_skipped


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _verify_info(cache: Path, info: ShardInfo) -> Iterator[str]:
    """Whether the recorded ShardInfo has exactly the bytes of `info`, which describes the shard as it is now."""
    path, info_path = manifests.shard_path(cache, info.index), manifests.info_path(cache, info.index)
    if not info_path.exists():
        yield (
            f"{info_path}: expected the ShardInfo of a committed shard, found no file; run the same capture again "
            "(it writes the file)"
        )
        return
    assert isinstance(info_path, Path)
    if info_path.read_bytes() == _json_bytes(info):
        return
    try:
        recorded = manifests.shard_info(cache, info.index)
        assert recorded is not None
    except (ValueError, TypeError, KeyError) as error:
        yield f"{info_path}: expected a ShardInfo, found one that cannot be read ({_one_line(error)}); {REDO_SHARD}"
        return
    if recorded.sha256 != info.sha256:
        yield (
            f"{path}: expected sha256 {recorded.sha256[:12]} ({info_path.name}), found {info.sha256[:12]}; {REDO_SHARD}"
        )
    for name in (field.name for field in dataclasses.fields(info) if field.name != "sha256"):
        expected, found = getattr(info, name), getattr(recorded, name)
        if found != expected:
            yield f"{info_path}: {name}: expected {expected} (as in the shard), found {found}; {REDO_SHARD}"
    if recorded == info:
        yield f"{info_path}: expected the bytes that capture writes, found other bytes; {REDO_SHARD}"


def _verify_footer(path: Path, manifest: Manifest) -> Iterator[str]:
    """Whether the Parquet footer has the columns, types and metadata that belong to the manifest."""
    found = pq.read_schema(path)
    expected = shard_schema(manifest)
    for name in sorted({*expected.names, *found.names}):
        expected_field = expected.field(name) if name in expected.names else "no such column"
        found_field = found.field(name) if name in found.names else "no such column"
        if expected_field != found_field:
            yield f"{path}: columns: expected {expected_field}, found {found_field}; {REDO_SHARD}"
    if expected.names != found.names and sorted(expected.names) == sorted(found.names):
        yield f"{path}: columns: expected the order {expected.names}, found {found.names}; {REDO_SHARD}"
    metadata = {key.decode(): value.decode(errors="replace") for key, value in (found.metadata or {}).items()}
    for name in ("fingerprint", "schema_version", "vocabulary_size"):
        value = str(getattr(manifest, name))
        if metadata.get(name) != value:
            yield (
                f"{path}: {name}: expected {value[:12]} (as in the manifest), found "
                f"{metadata.get(name, 'none')[:12]}; {REDO_SHARD}"
            )


def _verify_rows(path: Path, manifest: Manifest, info: ShardInfo) -> Iterator[str]:
    """Whether every row is valid and the totals of all rows are those of the ShardInfo."""
    records = manifests.shard_range(manifest, info.index)
    is_present = np.zeros(len(records), dtype=bool)
    num_targets, histogram, first_row = 0, torch.zeros(10, dtype=torch.int64), 0
    for group in read_row_groups(path):
        failed = [result for result in check_lists(group, manifest) if len(result[1])]
        if not failed:
            results = [*check_sequences(group, manifest, records), *check_distributions(group, manifest)]
            failed = [result for result in results if len(result[1])]
            histogram += retained_mass_histogram(distributions(group, manifest))
        for result in failed:
            yield _row_finding(path, result, first_row)
        ids = group.values["record_ids"]
        is_present[ids[(ids >= records.start) & (ids < records.stop)] - records.start] = True
        num_targets += len(group.values["target_positions"])
        first_row += group.num_rows
    num_present = int(is_present.sum())
    if num_present + info.num_skipped != len(records):
        yield (
            f"{path}: records: expected all {len(records)} planned ones, found {num_present} and {info.num_skipped} "
            f"skipped; {REDO_SHARD}"
        )
    yield from _verify_totals(path, info, num_targets=num_targets, histogram=histogram)


def _row_finding(path: Path, result: CheckResult, first_row: int) -> str:
    expectation, rows = result
    more = f" and {len(rows) - 1} more of its row group" if len(rows) > 1 else ""
    return f"{path}: row {first_row + int(rows[0])}{more}: {expectation}, found otherwise; {REDO_SHARD}"


def _verify_totals(path: Path, info: ShardInfo, *, num_targets: int, histogram: torch.Tensor) -> Iterator[str]:
    if num_targets != info.targets:
        yield f"{path}: targets: expected {info.targets} (its footer), found {num_targets}; {REDO_SHARD}"
    recorded = torch.tensor(info.retained_mass_histogram)
    # a mass at the edge of two bins may fall on either side where exponentials are rounded differently
    if recorded.shape != histogram.shape or (recorded - histogram).abs().sum() > 2 + math.ceil(num_targets / 1000):
        yield (
            f"{path}: retained_mass_histogram: expected {histogram.tolist()}, found {recorded.tolist()}; {REDO_SHARD}"
        )
