"""What a cache of strangers may not do; what is not a cache, or no longer; commits without hard links."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.audit.verify import findings
from pipeline.cache import manifest as manifests
from pipeline.cache.shards import shard_writer
from pipeline.core.files import file_hash
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


# -------------------------------------------------------------------------------- without hard links


def without_shard_1(cache: Path, tmp_path: Path) -> Path:
    copy = shutil.copytree(cache, tmp_path / "cache")
    for path in (copy / "shards").glob("00001.*"):
        path.unlink()
    return copy


def no_links(number: int) -> Any:
    def link(source: Path, target: Path) -> None:
        raise OSError(number, os.strerror(number))

    return link


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK])
def test_a_commit_where_there_are_no_links(
    number: int, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shard gets a name of its own, which its ShardInfo has; a second commit, with other bytes, changes nothing."""
    copy = without_shard_1(cache, tmp_path)
    temporary = copy / "shards" / ".00001.1.abc.tmp"
    monkeypatch.setattr(os, "link", no_links(number))
    shutil.copy(cache / "shards" / "00001.parquet", temporary)
    manifests.commit_shard(copy, temporary, 1)
    info = manifests.shard_info(copy, 1)
    assert info is not None
    assert re.fullmatch(rf"00001-{info.sha256[:12]}-[0-9a-f]{{8}}\.parquet", info.file)
    assert dataclasses.replace(info, file="00001.parquet") == manifests.shard_info(cache, 1)
    assert (copy / "shards" / info.file).read_bytes() == (cache / "shards" / "00001.parquet").read_bytes()
    assert findings(copy) == []
    before = sorted(path.name for path in (copy / "shards").iterdir())
    shutil.copy(cache / "shards" / "00002.parquet", temporary)
    manifests.commit_shard(copy, temporary, 1)
    assert manifests.shard_info(copy, 1) == info
    assert sorted(path.name for path in (copy / "shards").iterdir()) == before


@pytest.mark.parametrize("before", ["the file has its name", "the ShardInfo is written"])
def test_two_commits_at_once_without_links(
    before: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second commit, with other bytes, comes complete before a step of the first; the ShardInfo fits its file."""
    copy = without_shard_1(cache, tmp_path)
    waiting = [copy / "shards" / ".second.tmp"]
    shutil.copy(cache / "shards" / "00001.parquet", copy / "shards" / ".first.tmp")
    shutil.copy(cache / "shards" / "00002.parquet", waiting[0])
    rename, write_json = Path.rename, manifests.write_json

    def commit_second() -> None:
        if waiting:
            manifests.commit_shard(copy, waiting.pop(), 1)

    def renamed(path: Path, target: Path) -> Path:
        if before == "the file has its name":
            commit_second()
        return rename(path, target)

    def written(place: Path, value: Any) -> None:
        if before == "the ShardInfo is written":
            commit_second()
        write_json(place, value)

    monkeypatch.setattr(os, "link", no_links(errno.EPERM))
    monkeypatch.setattr(Path, "rename", renamed)
    monkeypatch.setattr(manifests, "write_json", written)
    manifests.commit_shard(copy, copy / "shards" / ".first.tmp", 1)
    assert not waiting
    info = manifests.shard_info(copy, 1)
    assert info is not None
    assert file_hash(copy / "shards" / info.file) == info.sha256
    assert len(list((copy / "shards").glob("00001-*.parquet"))) == 2  # the other one stays, and harms nothing
    assert not list((copy / "shards").glob(".*"))


def test_what_is_stale_is_measured_by_the_clock_of_the_file_system(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This machine's clock is an hour ahead: what other workers are writing stays."""
    copy = tmp_path / "cache"
    shutil.copytree(cache, copy)
    (copy / "shards" / ".00001.1.abc.tmp").write_bytes(b"half")
    (copy / "shards" / ".00002.2.def.tmp").write_bytes(b"half")
    os.utime(copy / "shards" / ".00002.2.def.tmp", (0, 0))
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 3600)
    manifests.finalize_cache(copy, manifests.load_manifest(copy), stale_seconds=60)
    assert [path.name for path in (copy / "shards").glob(".*")] == [".00001.1.abc.tmp"]


def test_a_link_that_fails_for_another_reason_is_an_error(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = without_shard_1(cache, tmp_path)
    monkeypatch.setattr(os, "link", no_links(errno.EIO))
    message = "expected to write shard 1, found Input/output error"
    with pytest.raises(InputError, match=message), shard_writer(copy, manifests.load_manifest(copy), 1) as writer:
        writer.commit(num_skipped=0)
    assert manifests.shard_info(copy, 1) is None


# ------------------------------------------------------------------- what is not a cache, or no longer


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
