"""Is one shard complete and correct? Its bytes are checked against its ShardInfo, and every value of its rows."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.audit.row_checks import CheckResult, check_distributions, check_lists, check_sequences
from pipeline.audit.row_groups import distributions, read_row_groups
from pipeline.cache import manifest as manifests
from pipeline.cache.downloads import local_copy
from pipeline.cache.schema import shard_schema
from pipeline.cache.shards import retained_mass_histogram
from pipeline.core.object_store import Location
from pipeline.core.types import Manifest, ShardInfo

REDO = (
    "delete it and the .json beside it, then run the command that made the cache again (only this shard is made again)"
)


def verify_shard(cache: Location, manifest: Manifest, index: int, file: str) -> tuple[list[str], int]:
    """The findings about the shard in a file, and the number of skipped records in its footer."""
    place = cache / "shards" / file
    with local_copy(place) as path:
        try:
            info = dataclasses.replace(manifests.describe_shard(path, index), file=file)
        except (ValueError, OSError, KeyError, TypeError, AttributeError, pa.ArrowException) as error:
            return [f"{place}: expected a complete Parquet file, found it damaged ({_one_line(error)}); {REDO}"], 0
        lines = list(_verify_info(cache, info))
        if lines:  # these are not the bytes that were committed: there is no use in checking their content
            return lines, info.num_skipped
        try:
            findings = list(_verify_footer(path, manifest)) or list(_verify_rows(path, manifest, info))
        except (ValueError, OSError, KeyError, pa.ArrowException) as error:
            findings = [f"expected readable rows, found them damaged ({_one_line(error)})"]
        return [f"{place}: {finding}; {REDO}" for finding in findings], info.num_skipped


def holds_json(place: Location, value: Manifest | ShardInfo) -> bool:
    """Whether a file has exactly the bytes that `write_json` writes of a value."""
    expected = json.dumps(manifests.to_plain(value), indent=2) + "\n"
    # a local file as bytes, because reading text changes the ends of lines
    return place.read_bytes() == expected.encode() if isinstance(place, Path) else place.read_text() == expected


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _verify_info(cache: Location, info: ShardInfo) -> Iterator[str]:
    """Whether the recorded ShardInfo has exactly the bytes of `info`, which describes the shard as it is now."""
    path, info_path = manifests.shard_file(cache, info), manifests.info_path(cache, info.index)
    if not info_path.exists():
        yield (
            f"{info_path}: expected the ShardInfo of a committed shard, found no file; run the same capture again "
            "(it writes the file)"
        )
        return
    try:
        recorded = manifests.shard_info(cache, info.index)
        assert recorded is not None
        if not (recorded.part_ends or recorded.part_hashes):  # an older cache
            info = dataclasses.replace(info, part_ends=(), part_hashes=())
        if holds_json(info_path, info):
            return
    except (ValueError, TypeError, KeyError) as error:
        yield f"{info_path}: expected a ShardInfo, found one that cannot be read ({_one_line(error)}); {REDO}"
        return
    if recorded.sha256 != info.sha256:
        yield (f"{path}: expected sha256 {recorded.sha256[:12]} ({info_path.name}), found {info.sha256[:12]}; {REDO}")
    for name in (field.name for field in dataclasses.fields(info) if field.name != "sha256"):
        expected, found = getattr(info, name), getattr(recorded, name)
        if found != expected:
            yield f"{info_path}: {name}: expected {expected} (as in the shard), found {found}; {REDO}"
    if recorded == info:
        yield f"{info_path}: expected the bytes that capture writes, found other bytes; {REDO}"


def _verify_footer(path: Path, manifest: Manifest) -> Iterator[str]:
    """Whether the Parquet footer has the columns, types and metadata that belong to the manifest."""
    found = pq.read_schema(path)
    expected = shard_schema(manifest)
    for name in sorted({*expected.names, *found.names}):
        expected_field = expected.field(name) if name in expected.names else "no such column"
        found_field = found.field(name) if name in found.names else "no such column"
        if expected_field != found_field:
            yield f"columns: expected {expected_field}, found {found_field}"
    if expected.names != found.names and sorted(expected.names) == sorted(found.names):
        yield f"columns: expected the order {expected.names}, found {found.names}"
    metadata = {key.decode(): value.decode(errors="replace") for key, value in (found.metadata or {}).items()}
    for name in ("fingerprint", "schema_version", "vocabulary_size"):
        value = str(getattr(manifest, name))
        if metadata.get(name) != value:
            yield f"{name}: expected {value[:12]} (as in the manifest), found {metadata.get(name, 'none')[:12]}"


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
            yield _row_finding(result, first_row)
        ids = group.values["record_ids"]
        is_present[ids[(ids >= records.start) & (ids < records.stop)] - records.start] = True
        num_targets += len(group.values["target_positions"])
        first_row += group.num_rows
    num_present = int(is_present.sum())
    if "only_fold" in manifest.made_of:  # the sequences of other folds hold the other records
        yield from _verify_plan_rows(path, info)
    elif num_present + info.num_skipped != len(records):
        yield (f"records: expected all {len(records)} planned ones, found {num_present} and {info.num_skipped} skipped")
    yield from _verify_totals(info, num_targets=num_targets, histogram=histogram)


def _verify_plan_rows(path: Path, info: ShardInfo) -> Iterator[str]:
    """Whether the footer of a shard of one fold tells where its rows stand among those of all folds."""
    found = json.loads((pq.read_metadata(path).metadata or {}).get(b"plan_rows", b"[]"))
    if len(found) != info.rows or found != sorted({*found}):
        yield f"plan_rows: expected {info.rows} ascending places (its footer), found {len(found)} or others"


def _row_finding(result: CheckResult, first_row: int) -> str:
    expectation, rows = result
    more = f" and {len(rows) - 1} more of its row group" if len(rows) > 1 else ""
    return f"row {first_row + int(rows[0])}{more}: {expectation}, found otherwise"


def _verify_totals(info: ShardInfo, *, num_targets: int, histogram: torch.Tensor) -> Iterator[str]:
    if num_targets != info.targets:
        yield f"targets: expected {info.targets} (its footer), found {num_targets}"
    recorded = torch.tensor(info.retained_mass_histogram)
    # a mass at the edge of two bins may fall on either side where exponentials are rounded differently
    if recorded.shape != histogram.shape or (recorded - histogram).abs().sum() > 2 + math.ceil(num_targets / 1000):
        yield f"retained_mass_histogram: expected {histogram.tolist()}, found {recorded.tolist()}"
