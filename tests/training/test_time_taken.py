"""What a run took beside its steps, of which only those of the same command count; and when its command began."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config.parallel import STARTED_VARIABLE
from pipeline.core.files import RunPaths
from pipeline.training.finish import steps_kept, time_taken
from support.commands import ROOT


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    """A run with four steps of two seconds each, one of which evaluates for three more."""
    found = RunPaths(folder=tmp_path)
    rows = [{"step": step, "seconds": 1.5, "data_wait_seconds": 0.5} for step in range(1, 5)]
    rows[3]["dev_seconds"] = 3.0
    found.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return found


@pytest.mark.parametrize(("kept", "beside"), [(0, "29.0"), (2, "33.0"), (4, "40.0"), (None, "40.0")])
def test_only_steps_of_this_command_are_subtracted(paths: RunPaths, kept: int | None, beside: str) -> None:
    """None: the run was trained before, and this command scored it."""
    assert time_taken(paths, 40.0, kept).startswith(f"40.0 s, {beside} s of them beside its steps (start, ")


def test_all_steps_are_repeated_without_a_checkpoint_and_none_once_the_model_is_there(paths: RunPaths) -> None:
    assert steps_kept(paths) == 0
    paths.model.mkdir()
    assert steps_kept(paths) is None


def test_a_model_scored_as_it_is_has_no_steps(tmp_path: Path) -> None:
    assert time_taken(RunPaths(folder=tmp_path), 6.25, 0).startswith("6.2 s, 6.2 s of them beside")


def test_a_run_of_a_sweep_has_the_time_limit_of_its_command() -> None:
    """launcher.time_limit counts from the start of the sweep's process, not of the run's."""
    code = "import pipeline.training.launch as launch; print(launch.STARTED)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {STARTED_VARIABLE: "1000.5"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["1000.5"]
