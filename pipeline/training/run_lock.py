"""The lock of a run folder: two commands never train the same run."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from typing import TextIO

from pipeline.config.schema import IfBusy
from pipeline.core.files import RunPaths
from pipeline.core.progress import log
from pipeline.core.types import Busy, InputError
from pipeline.training import run_lease

LOCK_WAIT_SECONDS = 60.0  # the ranks of a driver that was killed notice it, save and leave within this time
PROBE_SECONDS = 0.2  # scripts/status.py holds a lock for a moment to see whether it is free
SHOW_WAITING_SECONDS = 60.0  # between two lines of a process that waits for a lock


@contextlib.contextmanager
def run_lock(paths: RunPaths, if_busy: IfBusy = IfBusy.fail) -> Iterator[int]:
    """Hold a run folder's lock.

    Where another process holds it: by default waits for ranks whose driver was killed, until they have saved and ended.
    """
    began = shown = time.monotonic()
    with paths.lock.open("a") as file, contextlib.ExitStack() as lease:
        while True:
            try:
                run_lease.take(paths, file, lease)
                break
            except BlockingIOError:
                held = f"{paths.folder}: {paths.lock.read_text().partition(chr(10))[0] or 'locked'}"
                now = time.monotonic()
                if if_busy is IfBusy.skip:
                    if now > began + PROBE_SECONDS:
                        raise Busy(held) from None
                    time.sleep(PROBE_SECONDS)
                    continue
                if if_busy is IfBusy.fail and now > began + LOCK_WAIT_SECONDS:
                    raise InputError(
                        f"{paths.folder}: expected a free run folder, found {paths.lock.name} held by another "
                        f"process for {LOCK_WAIT_SECONDS:.0f} s; wait for that run or stop it, or set "
                        "launcher.if_busy=wait or skip"
                    ) from None
                if now >= shown:
                    log.info("%s; waiting", held)
                    shown = now + SHOW_WAITING_SECONDS
                time.sleep(2.0)
            except OSError as error:
                raise InputError(
                    f"{paths.lock}: expected to lock the run folder, found {error.strerror}; choose another runs_dir"
                ) from error
        try:
            _write_lock(file, f"locked by process {os.getpid()} on {socket.gethostname()} since {time.ctime()}")
            yield file.fileno()
        finally:
            _write_lock(file, f"free since {time.ctime()}")


def _write_lock(file: TextIO, state: str) -> None:
    """What a lock file holds: its state, for people to read; only the lock of the operating system counts."""
    file.truncate(0)
    file.write(f"{state}\nTwo commands must not train the same run: the one that locks this file (flock) trains it.\n")
    file.flush()
