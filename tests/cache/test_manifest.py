"""What a cache of strangers may not do: its names become parts of local paths."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pipeline.cache import manifest as manifests
from pipeline.core.types import InputError


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("sha256", "/home/me/thesis.tex", "sha256: expected 64 hex digits, found '/home/me/thesis.tex'"),
        ("sha256", "A" * 64, "sha256: expected 64 hex digits"),
        ("file", "../../other/00000.parquet", "file: expected the plain name of a shard, found '../../other"),
        ("file", "/etc/passwd", "file: expected the plain name of a shard"),
        ("file", ".00000.parquet", "file: expected the plain name of a shard"),
    ],
)
def test_a_shard_info_holds_no_path(field: str, value: str, message: str, cache: Path, tmp_path: Path) -> None:
    shutil.copytree(cache, tmp_path / "cache")
    path = tmp_path / "cache" / "shards" / "00001.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(InputError, match=message):
        manifests.shard_info(tmp_path / "cache", 1)
    with pytest.raises(InputError, match=message):
        manifests.committed_shards(tmp_path / "cache", manifests.load_manifest(tmp_path / "cache"))
