"""Copies of a cache, and changes to them that leave every hash consistent."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.cache import manifest as manifests
from pipeline.core.files import write_json

ChangeOfList = Callable[[list[Any]], list[Any]]


def copy_cache(cache: Path, folder: Path) -> Path:
    return Path(shutil.copytree(cache, folder / cache.name))


def change_json(path: Path, **fields: Any) -> None:
    write_json(path, {**json.loads(path.read_text()), **fields})


def rewrite_first_row(cache: Path, index: int, **changes: ChangeOfList) -> None:
    """Change lists of the first row of a shard, then write hashes and sizes that fit the new bytes."""
    path = manifests.shard_path(cache, index)
    table, metadata = pq.read_table(path), pq.read_metadata(path).metadata
    for name, change in changes.items():
        rows = table.column(name).to_pylist()
        rows[0] = change(rows[0])
        field = table.schema.field(name)
        table = table.set_column(table.schema.get_field_index(name), field, pa.array(rows, field.type))
    own_metadata = {name: value for name, value in metadata.items() if name != b"ARROW:schema"}
    pq.write_table(table.replace_schema_metadata(own_metadata), path)
    info = manifests.describe_shard(path, index)
    names = ("bytes", "sha256", "row_groups", "part_ends", "part_hashes")
    change_json(manifests.info_path(cache, index), **{name: getattr(info, name) for name in names})


def without_parts(cache: Path) -> Path:
    """The same cache as it was written before a ShardInfo had the hashes of row groups."""
    for path in (cache / "shards").glob("*.json"):
        plain = json.loads(path.read_text())
        write_json(path, {name: value for name, value in plain.items() if not name.startswith("part_")})
    return cache
