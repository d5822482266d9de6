"""A name on the hub is resolved to a commit once, and every process reads that commit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from pipeline.config.schema import ModelConfig, StudentConfig
from pipeline.models import paths
from pipeline.models.paths import model_folder, pinned

FIRST, SECOND = "a" * 40, "b" * 40


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """A hub whose `main` moves to another commit after each download; the revisions that were asked for."""
    asked: list[str | None] = []

    def download(name: str, *, revision: str | None, **others: Any) -> str:
        asked.append(revision)
        commit = revision if revision in (FIRST, SECOND) else (FIRST, SECOND)[min(len(asked), 2) - 1]
        return str(tmp_path / "snapshots" / commit)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    paths._downloaded.cache_clear()
    return asked


def test_a_pinned_name_stays_at_its_commit(hub: list[str | None]) -> None:
    config = pinned(StudentConfig(path="owner/name"))
    assert config == StudentConfig(path="owner/name", revision=FIRST)
    paths._downloaded.cache_clear()  # as in another process
    assert model_folder("owner/name").name == SECOND
    assert model_folder(config.path, revision=config.revision).name == FIRST
    assert pinned(config) == config


def test_a_process_resolves_a_name_once(hub: list[str | None]) -> None:
    assert [model_folder("owner/name").name for _ in range(3)] == [FIRST] * 3
    assert hub == [None]


def test_a_folder_has_no_commit(tmp_path: Path) -> None:
    config = ModelConfig(path=str(tmp_path))
    assert pinned(config) == config
