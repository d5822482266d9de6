"""Signals that ask to stop: a handler for a while, and the old ones afterwards."""

from __future__ import annotations

import os
import signal

import pytest

from pipeline.core.stopping import STOP_SIGNALS, interrupt, stop_signals_handled_by


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_interrupts_the_body_and_the_old_handler_returns(number: signal.Signals) -> None:
    before = [signal.getsignal(one) for one in STOP_SIGNALS]
    with pytest.raises(KeyboardInterrupt, match=f"^{number.name}$"), stop_signals_handled_by(interrupt):
        os.kill(os.getpid(), number)
    assert [signal.getsignal(one) for one in STOP_SIGNALS] == before
