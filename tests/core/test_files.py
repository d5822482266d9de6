"""Writes that survive a crash, hashes of content, and patterns that must match one path."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.core.files import (
    atomic_folder,
    check_writable,
    content_hash,
    explain,
    file_hash,
    matching_paths,
    one_path,
    write_atomically,
    write_json,
)
from pipeline.core.types import InputError
from pipeline.monitoring.metrics import MetricsFile
from support.commands import mounted, needs_root
from support.modes import other_modes


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


def test_a_write_leaves_no_temporary_file_and_uses_a_name_of_its_own(tmp_path: Path) -> None:
    """Processes in containers on several machines may share a PID: the PID alone is no name."""
    names: set[str] = set()
    with pytest.MonkeyPatch.context() as patched:
        replace = Path.replace
        patched.setattr(Path, "replace", lambda path, target: names.add(path.name) or replace(path, target))
        for _ in range(2):
            write_atomically(tmp_path / "a.json", "text")
        patched.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            write_atomically(tmp_path / "a.json", "other")
    assert len(names) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "text"


def test_a_folder_with_subfolders_appears_complete(tmp_path: Path) -> None:
    """As a tokenizer with several chat templates is saved."""
    with atomic_folder(tmp_path / "model") as folder:
        (folder / "additional_chat_templates").mkdir(parents=True)
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text("x")
    assert (tmp_path / "model" / "additional_chat_templates" / "tool_use.jinja").read_text() == "x"


def test_what_exists_is_no_glob(tmp_path: Path) -> None:
    folder = tmp_path / "runs[1]"
    folder.mkdir()
    assert one_path(str(folder), "cache") == folder
    assert matching_paths(f"{tmp_path}/runs*") == [folder]
    with pytest.raises(InputError, match="expected .* to match one path, found nothing"):
        one_path(str(tmp_path / "runs[2]"), "cache")


def test_folders_above_a_glob_that_exist_are_no_globs(tmp_path: Path) -> None:
    """Beside data[v2] lies data2, which the name of the first matches as a pattern."""
    for name in ("data[v2]", "data2"):
        (tmp_path / name / "more").mkdir(parents=True)
        (tmp_path / name / "run-1").touch()
        (tmp_path / name / "more" / "run-2").touch()
    folder = tmp_path / "data[v2]"
    assert matching_paths(f"{folder}/run-*") == [folder / "run-1"]
    assert matching_paths(f"{folder}/**/run-?") == [folder / "more" / "run-2", folder / "run-1"]
    assert matching_paths(f"{folder}/*/") == [folder / "more"]
    assert matching_paths(f"{tmp_path}/data[12]/run-*") == [tmp_path / "data2" / "run-1"]  # nothing has that name


def test_a_glob_below_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "a-1").touch()
    monkeypatch.chdir(tmp_path / "runs")
    assert matching_paths("a-*") == matching_paths("./a-*") == [Path("a-1")]
    assert matching_paths("../run?/a-*") == [Path("../runs/a-1")]


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "folder", "out")
    assert list((tmp_path / "new" / "folder").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="out: expected a folder to write into, found Not a directory"):
        check_writable(tmp_path / "file" / "folder", "out")


@needs_root
def test_a_folder_on_a_full_or_read_only_disk_is_refused(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=16k") as disk:
        check_writable(disk, "out")
        (disk / "all").write_bytes(bytes(16 << 10))
        with pytest.raises(InputError, match=r"out: .* found No space left on device .* or make room"):
            check_writable(disk, "out")
        assert [path.name for path in disk.iterdir() if path.stat().st_size] == ["all"]
    with (
        mounted(tmp_path / "disk", "size=16k,ro") as disk,
        pytest.raises(InputError, match="out: .* found Read-only file system"),
    ):
        check_writable(disk / "new", "out")


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_a_folder_has_the_modes_of_the_umask(umask: int, tmp_path: Path) -> None:
    """Whatever a library gave them: safetensors makes its files for their owner alone."""
    before = os.umask(umask)
    try:
        with atomic_folder(tmp_path / "model") as folder:
            (folder / "inner").mkdir(parents=True)
            for path in (folder / "model.safetensors", folder / "inner" / "weights"):
                path.write_text("weights")
                path.chmod(0o600)
        assert other_modes(tmp_path / "model") == {}
        (tmp_path / "model" / "inner" / "weights").chmod(0o604)
        assert other_modes(tmp_path / "model") == {"inner/weights": "0o604"}
    finally:
        os.umask(before)


def test_an_explanation_is_written_once(tmp_path: Path) -> None:
    explain(tmp_path / ".plans", "what it is for")
    (tmp_path / ".plans" / "README.txt").write_text("changed by its reader")
    explain(tmp_path / ".plans", "what it is for")
    assert (tmp_path / ".plans" / "README.txt").read_text() == "changed by its reader"
