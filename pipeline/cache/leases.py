"""Leases: which worker processes which shard. They only avoid double work; correctness never depends on them.

A lease is a small file or object that its holder renews; one that was not renewed for `lease_seconds` (an option, see
config/schema.py) is stale, and another worker may take it over. In which order a worker tries the shards is in
capture/claims.py. Its age is measured against a file written just now in the same folder, so the clocks
of two machines are never compared. A lease whose holder ran on this machine and has ended is taken over at once.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

from pipeline.core.object_store import Location, RemotePath, age_seconds, sibling
from pipeline.core.runtime import process_exists
from pipeline.core.types import InputError

RENEWALS_PER_LEASE = 4
UNKNOWN = "?"


@contextlib.contextmanager
def hold_lease(place: Location, *, lease_seconds: float) -> Iterator[bool]:
    """Hold the lease at `place` while the body runs, renewed by a thread; yields False if another worker holds it."""
    owner = " ".join([socket.gethostname(), _machine(), str(os.getpid()), _started(os.getpid()), secrets.token_hex(8)])
    if not _create(place, owner) and not _take_over(place, _stale_owner(place, lease_seconds), owner):
        yield False
        return
    done = threading.Event()

    def keep_renewing() -> None:
        while not done.wait(lease_seconds / RENEWALS_PER_LEASE):
            with contextlib.suppress(OSError, InputError):  # the store may answer at the next renewal
                if place.read_text() != owner:
                    return
                _renew(place, owner)

    thread = threading.Thread(target=keep_renewing, daemon=True)
    thread.start()
    try:
        yield True
    finally:
        done.set()
        thread.join()
        with contextlib.suppress(OSError, InputError):  # a lease that cannot be released goes stale
            if (
                place.read_text() == owner
            ):  # a holder that was frozen for too long must not release its successor's lease
                place.unlink(missing_ok=True)


def holder(place: Location) -> str:
    """The process that holds a lease, for a message; empty if it has been released."""
    try:
        fields = place.read_text().split()
        host, pid = fields[0], fields[2 if len(fields) == 5 else 1]  # earlier versions wrote no machine
    except (FileNotFoundError, IndexError):  # released, or being written just now
        return ""
    return f"process {pid} on {host}"


def _stale_owner(place: Location, lease_seconds: float) -> str | None:
    """What stands in a lease that may be taken over; None if it may not."""
    try:
        found = place.read_text()
        return found if age_seconds(place) > lease_seconds or _has_ended(found.split()) else None
    except FileNotFoundError:  # released meanwhile
        return None


def _has_ended(owner: list[str]) -> bool:
    """Whether the process that wrote a lease is known to have ended: only if it ran where this process runs.

    A PID alone is not enough: containers on one machine, and machines that share a disk, have the same ones, and a
    machine gives them again.
    """
    if len(owner) != 5 or UNKNOWN in owner or owner[1] != _machine():
        return False
    pid, started = int(owner[2]), owner[3]
    return not process_exists(pid) or _started(pid) not in (UNKNOWN, started)


def _machine() -> str:
    """What all processes share that see each other's PIDs: the boot of a machine and a PID namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # not Linux
        return UNKNOWN


def _started(pid: int) -> str:
    """When an existing process started, in ticks since the boot."""
    try:
        # the second field is the program's name in brackets, which may contain anything
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return UNKNOWN
    return "ended" if state in "ZX" else fields[18]  # a zombie does no more work


def _create(place: Location, owner: str) -> bool:
    if isinstance(place, RemotePath):
        return not place.exists() and _put(place, owner)
    try:
        descriptor = os.open(place, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
        return False
    except FileNotFoundError:
        raise InputError(
            f"{place.parent}: expected a folder, found none there any more: it was moved or deleted; put it back, or "
            "run the same command again to start anew"
        ) from None
    with os.fdopen(descriptor, "w") as file:
        file.write(owner)
    return True


def _put(place: RemotePath, owner: str) -> bool:
    """Of two workers that put at once, the last one holds the lease; the first may miss that, and both do the work."""
    place.write_text(owner)
    try:
        return place.read_text() == owner
    except FileNotFoundError:  # the other worker has released it already
        return False


def _renew(place: Location, owner: str) -> None:
    if isinstance(place, RemotePath):
        place.write_text(owner)
    else:
        os.utime(place)


def _take_over(place: Location, stale_owner: str | None, owner: str) -> bool:
    """Two workers that try at once may both succeed; then both do the work, and the second commit finds it done.

    In a file system only the lease that was found stale is taken: one that another worker has just taken is put back.
    """
    if stale_owner is None:
        return False
    if isinstance(place, RemotePath):
        return _put(place, owner)
    stale = Path(str(sibling(place, "stale")))
    try:
        place.rename(stale)
    except FileNotFoundError:
        return False
    is_same = stale.read_text() == stale_owner
    if not is_same:
        with contextlib.suppress(OSError):  # without links it is lost, which costs double work
            os.link(stale, place)
    stale.unlink(missing_ok=True)
    return is_same and _create(place, owner)
