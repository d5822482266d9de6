"""One command trains a run: it locks a file of the run folder and holds a lease beside it.

The lock (flock) is exact between the processes of one machine, and the ranks inherit it, so it outlives a driver that
is killed. Between machines it says little: some file systems have no locks, and others keep them within one machine
without a word (Lustre with localflock, most of FUSE). The lease excludes other machines everywhere. The driver and the
first rank renew it, so it is held while any of them works; one that was not renewed for LEASE_SECONDS is taken over.
A rank that finds it taken over, because its machine was frozen for longer, ends at once and saves nothing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TextIO

from pipeline.cache.leases import hold_lease, share_lease
from pipeline.core.file_systems import lock
from pipeline.core.files import RunPaths
from pipeline.core.progress import log

LEASE_SECONDS = 45.0  # less than the driver waits for a free run folder


def take(paths: RunPaths, file: TextIO, held: contextlib.ExitStack) -> None:
    """Lock the open lock file of a run and hold its lease until `held` is closed; BlockingIOError if another has it."""
    # with the lock, no process of this machine works on the run: the lease of one that has ended means nothing
    is_locked = lock(file)
    lease = hold_lease(paths.lease, lease_seconds=LEASE_SECONDS, ends_with_holder=is_locked)
    if not held.enter_context(lease):
        raise BlockingIOError(f"{paths.lease} is held by another process")


@contextlib.contextmanager
def renewed_by_rank(paths: RunPaths) -> Iterator[None]:
    """In the first rank: renew the driver's lease while the body runs, also when the driver was killed.

    The process exits if the lease is taken over.
    """

    def leave() -> None:
        log.error("%s: another command has taken over this run, because this one was frozen; leaving", paths.folder)
        os._exit(1)

    with share_lease(paths.lease, lease_seconds=LEASE_SECONDS, on_loss=leave):
        yield
