"""Signals that ask to stop: a handler for a while, and the old ones afterwards."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest

from pipeline.core.stopping import SLURM_ENDS_SECONDS, STOP_SIGNALS, hand_over, interrupt, stop_signals_handled_by


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_interrupts_the_body_and_the_old_handler_returns(number: signal.Signals) -> None:
    before = [signal.getsignal(one) for one in STOP_SIGNALS]
    with pytest.raises(KeyboardInterrupt, match=f"^{number.name}$"), stop_signals_handled_by(interrupt):
        os.kill(os.getpid(), number)
    assert [signal.getsignal(one) for one in STOP_SIGNALS] == before


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_request_during_a_destructor_is_not_lost(number: signal.Signals, capsys: pytest.CaptureFixture[str]) -> None:
    """Python prints and drops what a destructor raises: it once dropped a worker's SIGTERM, and the worker went on."""
    ended = []

    class Dropped:
        def __del__(self) -> None:
            signal.raise_signal(number)
            ended.append("destructor")

    def work() -> None:
        Dropped()
        time.sleep(60)

    hook = sys.unraisablehook
    with pytest.raises(KeyboardInterrupt, match=f"^{number.name}$"), stop_signals_handled_by(interrupt):
        work()
    assert ended == []  # it was interrupted, as anything else is
    assert capsys.readouterr().err == ""
    assert sys.unraisablehook is hook


def test_other_errors_of_destructors_are_shown_as_ever() -> None:
    class Dropped:
        def __del__(self) -> None:
            raise KeyboardInterrupt("of somebody else")

    shown: list[object] = []
    before, sys.unraisablehook = sys.unraisablehook, lambda ignored: shown.append(str(ignored.exc_value))
    try:
        with stop_signals_handled_by(interrupt):
            Dropped()
    finally:
        sys.unraisablehook = before
    assert shown == ["of somebody else"]


def test_a_job_is_left_to_whoever_asked_it_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[object] = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: called.append(number))
    monkeypatch.setattr(time, "sleep", called.append)
    try:
        monkeypatch.delenv("SUBMITIT_EXECUTOR", raising=False)
        hand_over((signal.SIGUSR2, signal.SIGTERM))
        assert called == []  # nobody is there
        monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
        hand_over(())  # a time limit of ours
        assert called == []
        hand_over((signal.SIGTERM, signal.SIGUSR2))
        assert called == [signal.SIGUSR2]
        hand_over((signal.SIGTERM,))  # SLURM requeues the job when it ends it
        assert called == [signal.SIGUSR2, SLURM_ENDS_SECONDS]
        monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
        hand_over((signal.SIGTERM,))
        assert called == [signal.SIGUSR2, SLURM_ENDS_SECONDS]
    finally:
        signal.signal(signal.SIGUSR2, before)
