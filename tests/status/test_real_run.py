"""A real run of the tiny student, seen at work, stopped, killed, failed and finished."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pipeline.status.runs import find_run
from pipeline.status.values import RunStatus
from support.commands import only, script, start, steps_done, train_arguments, wait_for

STEPS = 60


@pytest.mark.slow
def test_a_run_through_its_states(student: Path, data: Path, cache: Path, tmp_path: Path) -> None:
    def arguments(**changes: Any) -> list[str]:
        return train_arguments(student, data, str(cache), steps=STEPS, checkpoint__every_steps=5, **changes)

    def status() -> RunStatus:
        return find_run(only(tmp_path / "runs"), silent_seconds=600).status

    def at_work(steps: int) -> subprocess.Popen:
        process = start(arguments(), tmp_path)
        wait_for(lambda: steps_done(tmp_path / "runs") >= steps, process)
        return process

    process = at_work(3)
    seen = status()
    assert (seen.state, seen.num_steps, seen.process.split()[1]) == ("running", STEPS, str(process.pid))
    assert seen.step is not None
    assert 3 <= seen.step < STEPS
    assert seen.tokens_per_second is not None
    assert seen.seconds_left is not None
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 75
    stopped = status()
    assert (stopped.state, stopped.checkpoint_step) == ("stopped", stopped.step)
    assert stopped.step is not None

    process = at_work(stopped.step + 2)
    process.kill()
    process.wait()
    assert status().state == "running"  # its ranks hold the lock: they save and end
    wait_for(lambda: status().state != "running")
    killed = status()
    assert killed.state == "failed"
    assert (
        killed.note == f"killed, or the machine restarted; the same command goes on from step {killed.checkpoint_step}"
    )
    assert killed.checkpoint_step is not None
    assert killed.checkpoint_step > stopped.step

    failed = script("train", *arguments(launcher__hang_seconds=0.001), cwd=tmp_path, check=False)
    assert failed.returncode == 2
    assert (status().state, "failed (exit code 1)" in status().note) == ("failed", True)

    script("train", *arguments(), cwd=tmp_path)
    finished = status()
    assert (finished.state, finished.step, finished.num_texts, finished.note) == ("finished", STEPS, 2, "")
    assert finished.score is not None
    assert 0.0 <= finished.score <= 1.0
