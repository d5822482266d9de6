"""What a cache of strangers may not do: its names become parts of local paths; what is not a cache, or no longer."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from pipeline.cache import manifest as manifests
from pipeline.cache.shards import shard_writer
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


@pytest.mark.parametrize("file", ["manifest.json", "shards/00001.parquet", "shards/00001.json"])
def test_a_file_of_a_cache_is_refused_with_its_folder(file: str, cache: Path) -> None:
    expected = f"cache: expected a folder, found the file {cache / file}; give {cache}"
    with pytest.raises(InputError, match=f"^{re.escape(expected)}$"):
        manifests.load_manifest(cache / file)


def test_a_shard_that_is_gone_and_a_cache_that_is_gone(cache: Path, tmp_path: Path) -> None:
    copy = tmp_path / "cache"
    shutil.copytree(cache, copy)
    info = manifests.shard_info(copy, 1)
    assert info is not None
    (copy / "shards" / info.file).unlink()
    with pytest.raises(InputError, match=r"00001.parquet: expected a shard, found no such file; .* delete 00001.json"):
        manifests.check_shard_hash(copy, info)
    copy.rename(tmp_path / "moved")
    with pytest.raises(InputError, match="cache: expected a cache, found none there any more: it was moved"):
        manifests.check_shard_hash(copy, info)


def test_a_cache_deleted_while_a_shard_is_written(cache: Path, tmp_path: Path) -> None:
    copy = tmp_path / "cache"
    shutil.copytree(cache, copy)

    def write() -> None:
        with shard_writer(copy, manifests.load_manifest(copy), 0) as writer:
            shutil.rmtree(copy)
            writer.commit(num_skipped=0)

    with pytest.raises(InputError, match="the cache moved or deleted meanwhile; .* same command again") as refused:
        write()
    assert "no committed shard is lost" not in str(refused.value)
