"""A cache in an object store, and a local copy of one, are audited like the folder of the same capture."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from pipeline.audit import commands
from pipeline.audit.verify import findings
from pipeline.cache import manifest as manifests
from pipeline.capture.driver import run
from pipeline.config.commands import AuditConfig
from pipeline.config.schema import ModelConfig
from pipeline.core import object_store
from pipeline.core.object_store import RemotePath
from pipeline.core.types import InputError
from support.commands import config_of
from support.damage import copy_cache


@pytest.fixture(scope="module")
def local(teacher: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = run(config_of(teacher, data / "corpus.jsonl", tmp_path_factory.mktemp("local"), batch_sequences=4))
    assert isinstance(made, Path)
    return made


@pytest.fixture(scope="module")
def stored(teacher: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> RemotePath:
    """The same capture in a store that lives in this process."""
    plans = str(tmp_path_factory.mktemp("plans"))
    config = config_of(teacher, data / "corpus.jsonl", plans, batch_sequences=4, plans_dir=plans)
    made = run(dataclasses.replace(config, caches_dir="fsspec+memory://audit"))
    assert isinstance(made, RemotePath)
    return made


def synced(stored: RemotePath, folder: Path) -> Path:
    """A copy of all objects under their names, as `aws s3 sync` makes it."""
    copy = folder / stored.name
    (copy / "shards").mkdir(parents=True)
    object_store.download(stored / "manifest.json", copy / "manifest.json")
    for name in object_store.names(stored / "shards"):
        object_store.download(stored / "shards" / name, copy / "shards" / name)
    return copy


def printed(action: str, config: AuditConfig, capsys: pytest.CaptureFixture[str]) -> str:
    """What an action prints about a cache, without the cache's own name."""
    assert commands.run(action, config) == 0
    return capsys.readouterr().out.replace(config.cache, "CACHE")


@pytest.mark.parametrize("action", ["verify", "summary", "replay", "show"])
def test_every_action_prints_the_same(
    action: str,
    local: Path,
    stored: RemotePath,
    teacher: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    copy = synced(stored, tmp_path)
    assert not list(copy.glob("shards/00000.parquet"))
    texts = []
    for place in (local, stored, copy):
        config = AuditConfig(cache=str(place), teacher=ModelConfig(path=str(teacher)), rows=20, out=None)
        texts.append(printed(action, config, capsys))
        record = dataclasses.replace(config, record=31)
        texts[-1] += printed("show", record, capsys) if action == "show" else ""
    assert texts[0]
    assert texts[0] == texts[1] == texts[2]


def test_a_summary_of_a_store_is_written_here(stored: RemotePath, tmp_path: Path) -> None:
    assert commands.run("summary", AuditConfig(cache=str(stored), out=str(tmp_path))) == 0
    assert (tmp_path / "summary.json").exists()


def test_damage_in_a_store_is_found_where_it_is(stored: RemotePath, tmp_path: Path) -> None:
    info = manifests.shard_info(stored, 1)
    assert info is not None
    shard, recorded = stored / "shards" / info.file, manifests.info_path(stored, 1)
    object_store.download(shard, tmp_path / "intact")
    content, text = (tmp_path / "intact").read_bytes(), recorded.read_text()
    place = object_store.open_location("fsspec+memory://audit/damaged")
    for name in ["manifest.json", *(f"shards/{name}" for name in object_store.names(stored / "shards"))]:
        object_store.download(stored / name, tmp_path / "object")
        object_store.upload(tmp_path / "object", place / name)
    assert findings(place) == []
    damaged_shard, damaged_info = place / "shards" / info.file, manifests.info_path(place, 1)
    (tmp_path / "object").write_bytes(content[:1000] + bytes([content[1000] ^ 1]) + content[1001:])
    object_store.upload(tmp_path / "object", damaged_shard)
    assert any(line.startswith(f"{damaged_shard}: expected sha256 {info.sha256[:12]}") for line in findings(place))
    with pytest.raises(InputError, match="the shard is damaged"):
        commands.run("summary", AuditConfig(cache=str(place)))
    damaged_shard.unlink()
    assert any("00001.parquet: expected a planned shard, found no file" in line for line in findings(place))
    object_store.upload(tmp_path / "intact", damaged_shard)
    damaged_info.write_text(text.replace('"rows": ', '"rows": 1'))
    (line,) = findings(place)
    assert line.startswith(f"{damaged_info}: rows: expected {info.rows}")
    damaged_info.write_text(text)
    (place / "notes.txt").write_text("x")
    (line,) = findings(place)
    assert line.startswith(f"{place}/notes.txt: expected only files of planned shards")


def test_an_upload_that_was_not_used_is_no_finding(stored: RemotePath, tmp_path: Path) -> None:
    copy = synced(stored, tmp_path)
    (copy / "shards" / "00001-0123456789ab-01234567.parquet").write_bytes(b"a part of a shard")
    assert findings(copy) == []
    (copy / "shards" / "00007-0123456789ab-01234567.parquet").write_bytes(b"of no planned shard")
    assert len(findings(copy)) == 1


def test_a_file_under_the_plain_name_that_no_shard_info_has(local: Path, stored: RemotePath, tmp_path: Path) -> None:
    copy = synced(stored, tmp_path)
    (copy / "shards" / "00001.parquet").write_bytes((local / "shards" / "00001.parquet").read_bytes())
    (line,) = findings(copy)
    assert "00001.parquet: expected only files of planned shards" in line
    assert findings(copy_cache(local, tmp_path / "other")) == []
