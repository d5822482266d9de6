"""Requests to stop: the signals that make one, what a stopped command raises, and its exit code."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any, NoReturn

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
SLURM_ENDS_SECONDS = 600.0  # within this time after SIGTERM it ends a job that it preempts or cancels
EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped on request; the same command continues


class Stopped(Exception):
    """A run was asked to stop: it did so with a checkpoint, or it had no step left and has its result all the same."""

    def __init__(
        self, message: str, *, is_finished: bool, score: float | None = None, signals: tuple[int, ...] = ()
    ) -> None:
        super().__init__(message)
        self.is_finished = is_finished
        self.score = score
        self.signals = signals
        """Those that asked, in their order; none where a time limit did."""


@contextlib.contextmanager
def stop_signals_handled_by(handler: Callable[[int, object], None]) -> Iterator[None]:
    """Call `handler` on each signal of STOP_SIGNALS while the body runs; what it raises always reaches the body."""
    before = {number: signal.signal(number, handler) for number in STOP_SIGNALS}
    hook = sys.unraisablehook
    sys.unraisablehook = functools.partial(_ask_again, handler, hook)
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for number, earlier in before.items():
            signal.signal(number, earlier)


def interrupt(number: int, frame: object) -> NoReturn:
    """A signal handler: end the work as Ctrl-C does, so that leases are released and temporary files deleted."""
    for another in {*STOP_SIGNALS} - {signal.SIGINT}:  # the same request again must not break off the clean-up
        signal.signal(another, signal.SIG_IGN)
    raise KeyboardInterrupt(signal.Signals(number).name)


def _ask_again(handler: Callable[[int, object], None], otherwise: Callable[[Any], object], ignored: Any) -> None:
    """A hook for exceptions that Python ignores, those in destructors: a request to stop is sent again after it."""
    name = str(ignored.exc_value)
    if ignored.exc_type is not KeyboardInterrupt or name not in signal.Signals.__members__:
        otherwise(ignored)
        return
    number = signal.Signals[name]
    signal.signal(number, handler)  # which `interrupt` has taken away
    threading.Timer(0.01, os.kill, (os.getpid(), number)).start()


# ---------------------------------------------------------------------------------- jobs of submitit


def hand_over(signals: Collection[int]) -> None:
    """Of a job that has saved and would end: leave it to whoever wants to start it again, where there is somebody.

    submitit asks with a signal of its own. Its handler saves the job's arguments, has SLURM requeue the job and ends
    this process; while a run was at work, that handler was replaced by one that lets it save first. Where SLURM alone
    asks, with SIGTERM, it requeues the job itself, if it ends the job: so this waits for that.
    """
    executor = os.environ.get("SUBMITIT_EXECUTOR")
    if executor is None:
        return
    number = signal.Signals["SIG" + os.environ.get("SUBMITIT_PREEMPT_SIGNAL", "USR2")]
    handler = signal.getsignal(number)
    if number in signals and callable(handler):
        handler(number, None)
    elif signal.SIGTERM in signals and executor == "slurm":
        time.sleep(SLURM_ENDS_SECONDS)
