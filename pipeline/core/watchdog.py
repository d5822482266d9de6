"""A watchdog: work that makes no progress for too long ends this process, and prints where each thread waits.

Where one rank hangs, the others would wait in a collective, and DeepSpeed's own groups know no other limit.
"""

from __future__ import annotations

import contextlib
import faulthandler
import sys
from collections.abc import Iterator

_limits: list[float] = []  # seconds, of the blocks that are watched now; faulthandler has one timer for the process


@contextlib.contextmanager
def watched(limit_seconds: float) -> Iterator[None]:
    """End the process where two calls of `made_progress` in this block lie more than `limit_seconds` apart."""
    _limits.append(limit_seconds)
    made_progress()
    try:
        yield
    finally:
        _limits.pop()
        faulthandler.cancel_dump_traceback_later()
        made_progress()


def made_progress() -> None:
    """Start the watchdog's time again: called after each step, batch or file; without effect where nothing watches."""
    if _limits:
        faulthandler.dump_traceback_later(_limits[-1], exit=True, file=sys.__stderr__ or sys.stderr)
