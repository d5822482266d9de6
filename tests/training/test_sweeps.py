"""Sweeps of real runs: shared by two commands, through submitit, listed without a start, and without weights."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config.outcomes import State, read_outcomes
from pipeline.config.schema import ExportConfig, ExportedStep
from pipeline.training.options_read import options_read
from support.commands import ROOT, losses_of, merged, script, stop_at, train_arguments


def sweeps_of(folder: Path) -> list[list[str]]:
    """How the jobs ended, for each sweep in the order of its start."""
    places = sorted(path for path in (folder / "runs" / ".multirun").iterdir() if path.is_dir() and path.name[0] != ".")
    return [[one.outcome.state.name for one in read_outcomes(place).values()] for place in places]


@pytest.mark.slow(minutes=2)
def test_two_commands_share_a_sweep(student: Path, data: Path, tmp_path: Path) -> None:
    """Each run is trained once, by one of them, and neither waits for the other."""
    arguments = train_arguments(student, data, "null", experiment="gold_only", gold_fraction=1.0, steps=30)
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), "-m", *arguments, "seed=1,2,3,4"]
    command += ["launcher.if_busy=skip", "loss.head=full"]
    both = [
        subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    shown = [process.communicate(timeout=600) for process in both]
    assert [process.returncode for process in both] == [0, 0], shown
    results = sorted((tmp_path / "runs").glob("*/result.json"))
    assert len(results) == 4
    trained = "".join(err for _, err in shown).count(" starting: ")
    assert trained == 4
    for result in results:
        assert len(losses_of(result.parent)) == 30
    states = [state for sweep in sweeps_of(tmp_path) for state in sweep]
    assert states.count("finished") >= 4
    assert set(states) <= {"finished", "busy"}
    assert len(states) == 8


@pytest.mark.slow
def test_a_dry_run_says_where_each_run_stands_and_starts_none(student: Path, data: Path, tmp_path: Path) -> None:
    arguments = train_arguments(student, data, "null", experiment="gold_only", gold_fraction=1.0, steps=2000)
    stop_at(3, arguments, tmp_path)
    (run,) = (path for path in (tmp_path / "runs").iterdir() if path.name != ".multirun")
    done = script("train", "-m", *arguments, "seed=1,2", "dry_run=true", cwd=tmp_path)
    assert f"to resume at step {len(losses_of(run))}: runs/{run.name}" in done.stdout
    assert sweeps_of(tmp_path) == [[State.to_do.name, State.to_do.name]]
    assert len(list((tmp_path / "runs").glob("*/config.yaml"))) == 1
    alone = script("train", *arguments, "seed=2", "dry_run=true", cwd=tmp_path)
    assert alone.stdout.startswith("to do: runs/gold_only-")


@pytest.mark.slow
def test_a_run_without_weights_keeps_its_scores_and_says_how_to_get_them(
    student: Path, data: Path, tmp_path: Path
) -> None:
    arguments = train_arguments(student, data, "null", experiment="gold_only", gold_fraction=1.0, steps=4)
    script("train", *arguments, "export.what=none", cwd=tmp_path)
    (run,) = (tmp_path / "runs").iterdir()
    assert {"result.json", "predictions-dev.parquet", "predictions-test.parquet"} <= {one.name for one in run.iterdir()}
    assert not list(run.rglob("*.safetensors"))
    again = script("train", *arguments, "export.what=none", cwd=tmp_path)
    assert "is finished; nothing to do" in again.stderr
    with_weights = script("train", *arguments, cwd=tmp_path, check=False)
    assert with_weights.returncode == 2
    assert f"found none, because export.what=none trained this run; delete runs/{run.name} to" in with_weights.stderr
    result = json.loads((run / "result.json").read_text())
    assert result["dev"]["num_records"] == 10
    assert result["test"]["num_records"] == 20


def test_a_run_without_weights_is_the_same_run(student: Path, data: Path) -> None:
    config = merged(train_arguments(student, data, "null", experiment="gold_only", evaluate_every_steps=2))
    config.export = ExportConfig(what=ExportedStep.last)
    last = options_read(config)
    config.export = ExportConfig(what=ExportedStep.none)
    assert options_read(config) == last
    config.export = ExportConfig(what=ExportedStep.best)
    assert options_read(config) != last


@pytest.mark.slow(minutes=2)
@pytest.mark.skipif(importlib.util.find_spec("submitit") is None, reason="the extra slurm is not installed")
def test_submitit_runs_a_sweep_with_one_job_that_fails(student: Path, data: Path, tmp_path: Path) -> None:
    """In three processes at once; the outcome of each reaches the table of the command."""
    (broken := tmp_path / "broken.jsonl").write_text("{\n")  # it exists: only the job that reads it finds out
    arguments = train_arguments(student, data, "null", experiment="gold_only", gold_fraction=1.0, steps=4)
    arguments = [argument for argument in arguments if not argument.startswith("gold.files=")]
    arguments += ["hydra/launcher=submitit_local", f"gold.files=[{data}/gold.jsonl],[{broken}],[{data}/dev.jsonl]"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), "-m", *arguments]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert sweeps_of(tmp_path) == [["finished", "failed", "finished"]], done.stdout + done.stderr
    assert done.returncode == 2
    assert "3 runs: 2 finished, 1 failed" in done.stdout
    assert re.search(r"^2  .* failed .*broken\.jsonl.*expected", done.stdout, re.MULTILINE)
