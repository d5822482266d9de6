"""A bar on a terminal, plain lines elsewhere; requests to stop."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path

from support.commands import ROOT

SHOW = """
import time
from pipeline.core.progress import Progress, start_logging
start_logging()
progress = Progress("train", total=4, unit=" steps", log_every_seconds=0.15)
for step in range(4):
    time.sleep(0.1)
    progress.advance(1, loss=0.5)
progress.close()
"""


def test_a_bar_on_a_terminal() -> None:
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    subprocess.run([sys.executable, "-c", SHOW], cwd=ROOT, stderr=child, check=True)
    os.set_blocking(parent, False)
    shown = os.read(parent, 100_000).decode()
    assert "\r" in shown
    assert "4/4" in shown
    assert "loss 0.5" in shown


def test_plain_lines_elsewhere() -> None:
    done = subprocess.run([sys.executable, "-c", SHOW], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = done.stderr.splitlines()
    assert "\r" not in done.stderr
    assert 2 <= len(lines) <= 3  # every 0.15 s of 0.4 s, and the last
    assert "train 4/4 steps" in lines[-1]
    assert "s left  loss 0.5" in lines[-1]


def test_every_way_to_ask_for_a_stop(tmp_path: Path) -> None:
    """A stop file, each signal, and a driver that died; nothing else."""
    code = """
import os, sys
from pathlib import Path
from pipeline.core.runtime import StopRequest
stop = StopRequest(Path(sys.argv[1]))
assert not stop
if sys.argv[2] == "file":
    Path(sys.argv[1]).touch()
elif sys.argv[2] != "driver":
    os.kill(os.getpid(), int(sys.argv[2]))
else:
    stop = StopRequest(Path(sys.argv[1])) if os.environ.update(PIPELINE_DRIVER_PID="999999999") is None else None
assert stop
"""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
    for way in ("file", "driver", *(str(int(number)) for number in numbers)):
        arguments = [sys.executable, "-c", code, str(tmp_path / f"stop-{way}"), way]
        subprocess.run(arguments, cwd=ROOT, check=True)
