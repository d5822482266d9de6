"""The watchdog tells long work from work that hangs."""

from __future__ import annotations

import subprocess
import sys

import pytest

from support.commands import ROOT

BEGIN = "import time; from pipeline.core.watchdog import made_progress, watched\n"


def run(code: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", BEGIN + code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def test_work_longer_than_the_limit_goes_on_while_it_makes_progress() -> None:
    done = run("with watched(1.5):\n for _ in range(8): time.sleep(0.4); made_progress()\ntime.sleep(2)\nprint('end')")
    assert (done.returncode, done.stdout) == (0, "end\n"), done.stderr


@pytest.mark.parametrize(
    "code",
    [
        "with watched(1): time.sleep(30)",
        "with watched(1):\n made_progress(); time.sleep(30)",
        "with watched(1):\n with watched(20): time.sleep(2)\n time.sleep(30)",  # an inner block gives its time back
    ],
)
def test_work_that_hangs_ends_with_the_place(code: str) -> None:
    done = run(code)
    assert done.returncode == 1
    assert "Timeout (0:00:01)!" in done.stderr
    assert "line 2" in done.stderr or "line 3" in done.stderr or "line 4" in done.stderr


def test_progress_outside_of_a_watched_block_starts_nothing() -> None:
    assert run("made_progress()\nwith watched(0.5): pass\nmade_progress(); time.sleep(1.5)").returncode == 0
