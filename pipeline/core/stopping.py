"""Requests to stop: the signals that make one, what a stopped command raises, and its exit code."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import NoReturn

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped on request; the same command continues


class Stopped(Exception):
    """A run was asked to stop: it did so with a checkpoint, or it had no step left and has its result all the same."""

    def __init__(self, message: str, *, is_finished: bool, score: float | None = None) -> None:
        super().__init__(message)
        self.is_finished = is_finished
        self.score = score


@contextlib.contextmanager
def stop_signals_handled_by(handler: Callable[[int, object], None]) -> Iterator[None]:
    """Call `handler` on each signal of STOP_SIGNALS while the body runs."""
    before = {number: signal.signal(number, handler) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def interrupt(number: int, frame: object) -> NoReturn:
    """A signal handler: end the work as Ctrl-C does, so that leases are released and temporary files deleted."""
    for another in {*STOP_SIGNALS} - {signal.SIGINT}:  # the same request again must not break off the clean-up
        signal.signal(another, signal.SIG_IGN)
    raise KeyboardInterrupt(signal.Signals(number).name)
