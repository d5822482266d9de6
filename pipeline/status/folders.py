"""What a folder shows of the process that works in it: its lock, the age of its files, the end of its metrics.

Nothing is written. Ages compare the times of files with the clock of this machine: where a file server's clock differs
from it, all ages are wrong by that difference, and an age below 0 counts as 0.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.core.types import InputError

TAIL_BYTES = 1 << 16  # of metrics.jsonl, so many are read
LAST_STEPS = 20  # and so many of the steps in them


def is_locked(lock: Path) -> bool | None:
    """Whether a process holds a lock (flock); None where that cannot be found out.

    The probe asks for a shared lock, without waiting, and gives it back at once. A driver that starts in this instant
    finds the lock held and tries again after two seconds; two probes do not meet.
    """
    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    except OSError:  # no locks on this file system, or no right to read the file
        return None
    return False


def age_of(seconds: float) -> float:
    """The age of something that happened at a time, in seconds."""
    return max(time.time() - seconds, 0.0)


def trouble(folder: Path, error: Exception) -> str:
    """Why a folder cannot be read, in one line; an InputError explains itself."""
    if not folder.exists():
        return "deleted while it was read"
    kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
    return " ".join(f"{kind}{error}".split())


def newest_write(folder: Path, *, deep: bool = False) -> float:
    """The time of the newest file or folder directly in a folder; with `deep`, at any depth.

    Leases do not count: a thread renews them, also where the work hangs.
    """
    return max(_times(folder, deep=deep), default=0.0)


def _times(folder: Path, *, deep: bool) -> Iterator[float]:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        yield folder.stat().st_mtime
        with os.scandir(folder) as entries:
            for entry in (entry for entry in entries if not entry.name.endswith("lease")):
                with contextlib.suppress(FileNotFoundError):  # a temporary file
                    yield entry.stat(follow_symlinks=False).st_mtime
                    if deep and entry.is_dir(follow_symlinks=False):
                        yield from _times(Path(entry.path), deep=True)


def last_rows(metrics: Path) -> tuple[list[dict[str, Any]], str]:
    """The last complete lines of metrics.jsonl, and what is wrong with them, if anything.

    A line without an end is being written, or was cut by a crash. The first line of what is read may have lost its
    beginning.
    """
    try:
        with metrics.open("rb") as file:
            start = max(file.seek(0, os.SEEK_END) - TAIL_BYTES, 0)
            file.seek(start)
            lines = file.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return [], ""
    rows, num_damaged = [], 0
    for line in (lines[1:] if start else lines)[-LAST_STEPS:]:
        try:
            row = json.loads(line)
            rows.append({**row, "step": int(row["step"])})
        except (ValueError, TypeError, KeyError):
            num_damaged += 1
    return rows, f"{metrics.name}: {num_damaged} damaged lines" if num_damaged else ""
