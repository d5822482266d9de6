"""What a file system can do is found out by trying: refusals injected, and real file systems that lack something."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.core import file_systems
from pipeline.core.file_systems import FolderAbilities, check_folder, lock, probe_folder
from pipeline.core.types import InputError
from support.commands import mounted, needs_root
from support.file_systems import mounted_vfat, mounted_without


def abilities(found: FolderAbilities) -> set[str]:
    return {name for name, value in dataclasses.asdict(found).items() if value is True}


ALL = {"exclusive", "rename_over", "rename_folder", "touch", "links", "locks", "sync_folder"}


def raising(number: int) -> Callable[..., Any]:
    def call(*args: Any, **named: Any) -> None:
        raise OSError(number, os.strerror(number))

    return call


def inject(ability: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the call of the operating system on which an ability rests fail."""
    fail = raising(number)
    really_open, really_fsync, really_rename = os.open, os.fsync, Path.rename
    if ability == "exclusive":

        def opened(path: Any, flags: int, *rest: Any, **named: Any) -> int:
            return (fail if flags & os.O_EXCL else really_open)(path, flags, *rest, **named)

        monkeypatch.setattr(os, "open", opened)
    elif ability == "sync_folder":
        monkeypatch.setattr(
            os, "fsync", lambda file: (fail if Path(f"/dev/fd/{file}").is_dir() else really_fsync)(file)
        )
    elif ability == "rename_folder":
        monkeypatch.setattr(Path, "rename", lambda old, new: (fail if old.is_dir() else really_rename)(old, new))
    elif ability == "rename_over":  # files that are written anew still get their name, so that this is what is found
        really_replace = Path.replace
        monkeypatch.setattr(Path, "replace", lambda old, new: (fail if new.exists() else really_replace)(old, new))
    else:
        module, name = {"links": (os, "link"), "locks": (fcntl, "flock"), "touch": (os, "utime")}[ability]
        monkeypatch.setattr(module, name, fail)


def test_a_usual_file_system_can_do_everything_and_nothing_is_left(tmp_path: Path) -> None:
    started = time.monotonic()
    found = probe_folder(tmp_path)
    assert time.monotonic() - started < 1
    assert abilities(found) == ALL
    assert abs(found.clock_skew_seconds) < 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("ability", "number"),
    [
        *(("links", number) for number in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)),
        *(("locks", number) for number in (errno.ENOLCK, errno.ENOSYS, errno.EPERM, errno.EOPNOTSUPP)),
        *(("sync_folder", number) for number in (errno.EINVAL, errno.ENOTSUP)),
    ],
)
def test_what_is_done_without_is_logged(
    ability: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    inject(ability, number, monkeypatch)
    logging.getLogger("pipeline").propagate = True
    with caplog.at_level(logging.INFO):
        assert abilities(check_folder(tmp_path, "runs_dir")) == ALL - {ability}
    (line,) = caplog.messages
    assert line.startswith(f"{tmp_path}: its file system has no ")
    assert {"links": "hard links", "locks": "file locks", "sync_folder": "fsync of folders"}[ability] in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("ability", "number", "reason"),
    [
        ("exclusive", errno.EINVAL, r"\(O_EXCL\)"),
        ("rename_over", errno.EEXIST, "renames a file over another"),
        ("rename_over", errno.EPERM, "renames a file over another"),
        ("rename_folder", errno.ENOSYS, "renames a folder"),
        ("touch", errno.EPERM, r"\(utime\)"),
    ],
)
def test_what_is_needed_is_refused_with_the_reason(
    ability: str, number: int, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inject(ability, number, monkeypatch)
    message = rf"runs_dir: expected a file system that .*{reason}.* found that the one of {tmp_path} does not; choose"
    with pytest.raises(InputError, match=message):
        check_folder(tmp_path, "runs_dir")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("ability", ["links", "rename_folder", "sync_folder", "exclusive"])
def test_an_error_of_the_disk_is_no_missing_ability(
    ability: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_systems, "check_writable", lambda folder, option: None)
    inject(ability, number, monkeypatch)
    with pytest.raises(InputError, match=f"cache: expected to create.*found {os.strerror(number)}; .* with cache="):
        check_folder(tmp_path, "cache")


def test_exclusive_creation_that_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really_open = os.open

    def opened(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        return really_open(path, flags & ~os.O_EXCL, *rest, **named)

    monkeypatch.setattr(os, "open", opened)
    assert abilities(probe_folder(tmp_path)) == ALL - {"exclusive"}


def test_a_lock_that_excludes_nobody_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", lambda file, operation: None)
    assert abilities(probe_folder(tmp_path)) == ALL - {"locks"}


def test_a_lock_excludes_until_the_file_is_closed(tmp_path: Path) -> None:
    with (tmp_path / "lock").open("a") as file, (tmp_path / "lock").open("a") as other:
        assert lock(file)
        assert lock(file)  # again, as a driver does that waits for the lease
        with pytest.raises(BlockingIOError):
            lock(other)
        file.close()
        assert lock(other)


def test_the_clock_of_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now - 3600)
    found = probe_folder(tmp_path)
    assert 3599 < found.clock_skew_seconds < 3660
    (way,) = file_systems.ways_around(found)
    assert way.startswith("a clock +36")


# ----------------------------------------------------------------------------------- real file systems


@needs_root
def test_memory_and_a_disk_that_is_read_only_or_full(tmp_path: Path) -> None:
    with mounted(tmp_path / "memory", "size=1m") as disk:
        assert abilities(check_folder(disk, "cache")) == ALL
        (disk / "all").write_bytes(bytes((1 << 20) - 4096 * 2))
        (disk / "rest").write_bytes(bytes(4096))
        with pytest.raises(InputError, match="cache: .* found No space left on device"):
            check_folder(disk, "cache")
        assert {path.name for path in disk.iterdir()} == {"all", "rest"}
    with (
        mounted(tmp_path / "fixed", "size=1m,ro") as disk,
        pytest.raises(InputError, match="cache: .* found Read-only file system"),
    ):
        check_folder(disk, "cache")


def test_vfat(tmp_path: Path) -> None:
    with mounted_vfat(tmp_path / "stick") as disk:
        assert abilities(check_folder(disk, "cache")) == ALL - {"links"}


def test_a_folder_through_fuse(tmp_path: Path) -> None:
    with mounted_without(tmp_path / "fuse") as folder:
        assert abilities(check_folder(folder, "cache")) == ALL
    with mounted_without(tmp_path / "little", "links", "locks", "sync_folder") as folder:
        assert abilities(check_folder(folder, "cache")) == ALL - {"links", "locks", "sync_folder"}
        assert list(folder.iterdir()) == []
    with mounted_without(tmp_path / "less", "rename_over", "rename_folder", "touch") as folder:
        assert abilities(probe_folder(folder)) == ALL - {"rename_over", "rename_folder", "touch"}
        with pytest.raises(InputError, match=r"renames a file over another and renames a folder .* and sets the time"):
            check_folder(folder, "cache")
