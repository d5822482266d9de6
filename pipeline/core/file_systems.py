"""What the file system of a folder can do. Those of clusters differ, so both stages try it out before long work.

Hard links, locks and flushing a folder are done without where they are missing, which is logged. A folder where files
cannot be created exclusively, renamed over others or touched is refused. Whether a rename is atomic does not show.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from pipeline.core.files import check_writable, sync_folder
from pipeline.core.progress import log
from pipeline.core.types import InputError

# of exFAT, SMB, gcsfuse and others of FUSE; EMLINK where a file has as many names as it may
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
# of Lustre without -o flock, NFS without its lock service, FUSE; EACCES of SMB, where a lock also forbids to read
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.EACCES)
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE)  # they say nothing about an ability
LARGE_SKEW_SECONDS = 2.0  # vfat keeps times to two seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderAbilities:
    """What worked in a folder when it was tried."""

    exclusive: bool
    """A file is created only if there is none (O_EXCL): leases."""
    rename_over: bool
    """A file is renamed over another: every file that is replaced."""
    rename_folder: bool
    """A folder with files in it is renamed: the plan of a capture, the exported model."""
    touch: bool
    """The time of a file is set to now: leases are renewed so."""
    links: bool
    """A file gets a second name (hard link): the commit of a shard."""
    locks: bool
    """A locked file cannot be locked again (flock): the lock of a run, downloads."""
    sync_folder: bool
    """The names in a folder are flushed to disk (fsync): they survive a power loss."""
    clock_skew_seconds: float
    """How far the clock of the file system is ahead of this machine's. Only scripts/status.py compares the two."""


NEEDED = {
    "exclusive": "creates a file only where there is none (O_EXCL)",
    "rename_over": "renames a file over another",
    "rename_folder": "renames a folder with files in it (gcsfuse: --rename-dir-limit)",
    "touch": "sets the time of a file (utime)",
}


def check_folder(folder: Path, option: str) -> FolderAbilities:
    """Create a folder and try out its file system; InputError, which names `option`, if it cannot do what is needed.

    What is done without is logged.
    """
    check_writable(folder, option)
    try:
        found = probe_folder(folder)
    except OSError as error:
        raise InputError(
            f"{option}: expected to create, rename, link and lock files in {folder}, found {error.strerror or error}; "
            f"choose a folder on another file system with {option}=, or repair this one"
        ) from error
    missing = [what for ability, what in NEEDED.items() if not getattr(found, ability)]
    if missing:
        raise InputError(
            f"{option}: expected a file system that {' and '.join(missing)}, found that the one of {folder} does not; "
            f"choose a folder on another file system with {option}="
        )
    ways = ways_around(found)
    if ways:
        log.info("%s: its file system has %s", folder, "; ".join(ways))
    return found


def ways_around(found: FolderAbilities) -> list[str]:
    """What is missing and what is done instead, in words."""
    ways = []
    if not found.links:
        ways.append("no hard links, so each shard has a name of its own")
    if not found.locks:
        ways.append("no file locks (flock), so a lease alone keeps two commands apart")
    if not found.sync_folder:
        ways.append("no fsync of folders, so a power loss may undo the last files")
    if abs(found.clock_skew_seconds) > LARGE_SKEW_SECONDS:
        ways.append(f"a clock {found.clock_skew_seconds:+.1f} s from this machine's, so ages are measured by its own")
    return ways


def probe_folder(folder: Path) -> FolderAbilities:
    """Try out the file system of a folder, in milliseconds, and leave nothing; OSError where nothing can be written."""
    scratch = folder / f".{secrets.token_hex(8)}.probe"  # not a PID: containers on several machines share them
    scratch.mkdir()
    file, other, inner = scratch / "file", scratch / "other", scratch / "inner"
    try:
        file.write_text("new")
        skew = file.stat().st_mtime - time.time()
        other.write_text("old")
        inner.mkdir()
        (inner / "file").write_text("")
        return FolderAbilities(
            exclusive=_is_exclusive(file, scratch / "created"),
            touch=_works(lambda: os.utime(file)),
            links=_works(lambda: os.link(file, scratch / "link"), refused=NO_LINKS),
            locks=_has_locks(scratch / "lock"),
            rename_over=_works(lambda: file.replace(other)) and other.read_text() == "new",
            rename_folder=_works(lambda: inner.rename(scratch / "renamed")),
            sync_folder=sync_folder(scratch),
            clock_skew_seconds=skew,
        )
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def lock(file: TextIO) -> bool:
    """Lock an open file, until it is closed, against everybody; False where the file system has no locks.

    BlockingIOError if another process holds the lock. A lock that does not exclude even this process, which opens the
    file a second time, is none.
    """
    if not flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB):
        return False
    with Path(file.name).open("a") as again:
        try:
            flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    flock(file, fcntl.LOCK_UN)
    return False


def flock(file: TextIO, operation: int) -> bool:
    """The call of the operating system; False where the file system has no locks."""
    try:
        fcntl.flock(file, operation)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True


def _has_locks(path: Path) -> bool:
    with path.open("a") as file:
        return lock(file)


def _create(path: Path) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))


def _is_exclusive(existing: Path, new: Path) -> bool:
    """Whether a new file is created and one that exists is not."""
    try:
        return _works(lambda: _create(new)) and not _works(lambda: _create(existing), refused=(errno.EEXIST,))
    except OSError as error:
        if error.errno in DISK_ERRORS:
            raise
        return False


def _works(action: Callable[[], object], *, refused: Container[int] | None = None) -> bool:
    """Whether an action succeeds. An error of the disk is raised; with `refused`, any that is not among these too."""
    try:
        action()
    except OSError as error:
        if error.errno in DISK_ERRORS or (refused is not None and error.errno not in refused):
            raise
        return False
    return True
