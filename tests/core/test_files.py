"""Writes that survive a crash, hashes of content, and patterns that must match one path."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.core.files import content_hash, file_hash, one_path, write_atomically, write_json
from pipeline.core.types import InputError
from pipeline.monitoring.metrics import MetricsFile


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", fail)
        with pytest.raises(OSError, match="No space left"):
            write_atomically(path, "new")
    assert path.read_text() == '{\n  "old": 1\n}\n'


def test_metrics_after_the_checkpoint_and_an_incomplete_line_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    metrics = MetricsFile(path, keep_steps=2)
    metrics.append({"step": 3, "again": True})
    assert MetricsFile.read(path) == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]


def test_hashes_depend_on_content_and_not_on_the_order_of_keys(tmp_path: Path) -> None:
    assert content_hash({"a": 1, "b": 2}) == content_hash({"b": 2, "a": 1}) != content_hash({"a": 2, "b": 1})
    (tmp_path / "a").write_bytes(b"x" * 3_000_000)
    (tmp_path / "b").write_bytes(b"x" * 2_999_999 + b"y")
    assert file_hash(tmp_path / "a") != file_hash(tmp_path / "b")


def test_a_pattern_must_match_exactly_one_path(tmp_path: Path) -> None:
    (tmp_path / "run-1").touch()
    assert one_path(f"{tmp_path}/run-*", "teacher") == tmp_path / "run-1"
    (tmp_path / "run-2").touch()
    with pytest.raises(InputError, match=r"teacher: expected .* to match one path, found .*run-1, .*run-2"):
        one_path(f"{tmp_path}/run-*", "teacher")
    with pytest.raises(InputError, match="found nothing"):
        one_path(f"{tmp_path}/nothing", "teacher")
