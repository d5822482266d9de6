"""Leases: which worker processes which shard. They only avoid double work; correctness never depends on them.

A lease is a small file or object that its holder renews; one that was not renewed for `lease_seconds` (an option, see
config/schema.py) is stale, and another worker may take it over. In which order a worker tries the shards is in
capture/claims.py. Its age is measured against a file written just now in the same folder, so the clocks
of two machines are never compared. A lease whose holder ran on this machine and has ended is taken over at once.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from pipeline.core.object_store import Location, RemotePath, age_seconds, sibling
from pipeline.core.processes import description, has_ended, this_process
from pipeline.core.types import InputError

RENEWALS_PER_LEASE = 4


@contextlib.contextmanager
def hold_lease(place: Location, *, lease_seconds: float, ends_with_holder: bool = True) -> Iterator[bool]:
    """Hold the lease at `place` while the body runs, renewed by a thread; yields False if another worker holds it.

    With `ends_with_holder=False` a lease whose holder has ended is not free before it is stale: processes that the
    holder started may go on, and renew it (`share_lease`).
    """
    owner, done, may_hold = f"{this_process()} {secrets.token_hex(8)}", threading.Event(), True
    thread = threading.Thread(target=_keep_renewing, args=(place, owner, lease_seconds, done), daemon=True)

    def release() -> None:
        done.set()
        if thread.ident is not None:
            thread.join()
        # a holder that was frozen for too long must not release its successor's lease
        with contextlib.suppress(OSError, InputError):  # a lease that cannot be released goes stale
            if may_hold and place.read_text() == owner:
                place.unlink(missing_ok=True)

    try:  # from here on, because a request to stop may arrive between any two lines
        if not _create(place, owner):
            stale_owner = _stale_owner(place, lease_seconds, ends_with_holder=ends_with_holder)
            may_hold = _take_over(place, stale_owner, owner)
        if may_hold:
            thread.start()
        yield may_hold
    finally:
        try:
            release()
        except KeyboardInterrupt:  # it comes once
            release()
            raise


@contextlib.contextmanager
def share_lease(place: Path, *, lease_seconds: float, on_loss: Callable[[], None]) -> Iterator[None]:
    """Renew the lease that another process holds, while the body runs; does nothing where there is no lease.

    `on_loss` is called, in a thread, once a third process has taken the lease over.
    """
    try:
        owner = place.read_text()
    except FileNotFoundError:
        yield
        return
    done = threading.Event()

    def keep() -> None:
        _keep_renewing(place, owner, lease_seconds, done)
        if not done.is_set():
            on_loss()

    threading.Thread(target=keep, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _keep_renewing(place: Location, owner: str, lease_seconds: float, done: threading.Event) -> None:
    """Renew a lease until `done`, or until somebody else holds it or has released it."""
    num_missing = 0
    while not done.wait(lease_seconds / RENEWALS_PER_LEASE):
        try:
            if place.read_text() != owner:
                return
            _renew(place, owner)
            num_missing = 0
        except FileNotFoundError:  # once: it may be taken over just now
            num_missing += 1
            if num_missing == 2:
                return
        except (OSError, InputError):  # the disk or store may answer at the next renewal
            continue


def process_of(owner: str) -> str:
    """The process that wrote a lease, as `core.processes.this_process` names it: all but the random last word."""
    return owner.rpartition(" ")[0]


def holder(place: Location) -> str:
    """The process that holds a lease, for a message; empty if it has been released, or is being written just now."""
    try:
        return description(place.read_text())
    except FileNotFoundError:
        return ""


def _stale_owner(place: Location, lease_seconds: float, *, ends_with_holder: bool) -> str | None:
    """What stands in a lease that may be taken over; None if it may not."""
    try:
        found = place.read_text()
        is_free = age_seconds(place) > lease_seconds or (ends_with_holder and has_ended(process_of(found)))
        return found if is_free else None
    except FileNotFoundError:  # released meanwhile; of an object store it has no errno
        return None
    except OSError as error:
        if error.errno != errno.ESTALE:  # NFS's word for the same
            raise
        return None


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
    except OSError as error:
        raise _unwritten(place, error) from error
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(owner)
    except OSError as error:  # a full disk
        place.unlink(missing_ok=True)
        raise _unwritten(place, error) from error
    return True


def _unwritten(place: Path, error: OSError) -> InputError:
    return InputError(
        f"{place}: expected to write a lease, found {error.strerror or error}; free space or repair the disk, and run "
        "the same command again"
    )


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
