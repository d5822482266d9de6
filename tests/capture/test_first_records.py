"""A capture of the first records of a corpus (`corpus.take`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.cache import manifest as manifests
from pipeline.capture import corpus, driver
from support.commands import config_of
from support.tiny import prompts, write_lines


def once(write: Callable[..., None]) -> Callable[..., None]:
    """A function that works the first time."""
    calls = []

    def write_or_fail(path: Path, *arguments: Any) -> None:
        if calls:
            raise RuntimeError("killed")
        calls.append(path)
        write(path, *arguments)

    return write_or_fail


def test_a_capture_of_the_first_records(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shard by shard the capture of a file with these records alone, in a cache of its own name.

    Its plan is killed between two shards and goes on.
    """
    rows = prompts(60, labeled=False)
    whole = write_lines(tmp_path / "whole.jsonl", rows)
    part = write_lines(tmp_path / "part.jsonl", rows[:30])
    config = config_of(teacher, whole, tmp_path / "caches", records_per_shard=20)
    config.corpus.take = 30
    monkeypatch.setattr(corpus, "write_sequences", once(corpus.write_sequences))
    with pytest.raises(RuntimeError):  # after its first shard; the plan goes on with the second
        driver.run(config)
    monkeypatch.undo()
    taken = driver.run(config)
    alone = driver.run(config_of(teacher, part, tmp_path / "alone", records_per_shard=20))
    made = [manifests.load_manifest(cache) for cache in (taken, alone)]
    assert [manifest.num_records for manifest in made] == [30, 30]
    assert [manifest.num_shards for manifest in made] == [2, 2]
    for index in (0, 1):
        infos = [manifests.shard_info(cache, index) for cache in (taken, alone)]
        files = [manifests.shard_file(cache, info) for cache, info in zip((taken, alone), infos, strict=True)]
        assert pq.read_table(files[0]).equals(pq.read_table(files[1]))
    assert made[0].made_of["take"] == 30
    assert "take" not in made[1].made_of
    assert driver.run(config) == taken  # found again
