"""Claims: who is at work on which shard. They only save work; correctness never depends on them.

A claim is a small file that its holder touches; one that was not touched for a lease may be taken over. Ages are
taken against a file touched just now in the same folder, so the clocks of two machines are never compared.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

BEATS_PER_LEASE = 4


@contextlib.contextmanager
def claim(path: Path, *, lease_seconds: float) -> Iterator[bool]:
    """Hold `path` while the body runs and keep it fresh from a thread; yields False if somebody else holds it."""
    owner = f"{socket.gethostname()} {os.getpid()} {secrets.token_hex(8)}"
    if not _create(path, owner) and not (_is_stale(path, lease_seconds) and _take_over(path, owner)):
        yield False
        return
    done = threading.Event()

    def beat() -> None:
        while not done.wait(lease_seconds / BEATS_PER_LEASE) and _owner(path) == owner:
            with contextlib.suppress(OSError):
                os.utime(path)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield True
    finally:
        done.set()
        thread.join()
        if _owner(path) == owner:  # a holder that was frozen past its lease leaves its successor's claim alone
            path.unlink(missing_ok=True)


def _create(path: Path, owner: str) -> bool:
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "w") as file:
        file.write(owner)
    return True


def _owner(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None


def _is_stale(path: Path, lease_seconds: float) -> bool:
    now = path.with_name(f".{path.name}.{secrets.token_hex(4)}.now")
    try:
        now.touch()
        return now.stat().st_mtime - path.stat().st_mtime > lease_seconds
    except FileNotFoundError:  # released meanwhile
        return False
    finally:
        now.unlink(missing_ok=True)


def _take_over(path: Path, owner: str) -> bool:
    """Two that try at once may both succeed; then both do the work, and the second commit finds it done."""
    stale = path.with_name(f".{path.name}.{secrets.token_hex(4)}.stale")
    try:
        path.rename(stale)
    except FileNotFoundError:
        return False
    stale.unlink(missing_ok=True)
    return _create(path, owner)
