"""Sweeps: what is checked before the first job, what each job leaves and prints, and how the command ends."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import read_write

from pipeline.config.outcomes import JobOutcome, Outcome, State, exit_code, read_outcomes, table, write_outcome
from pipeline.config.sweeps import check_search
from pipeline.core.files import RunPaths
from pipeline.core.stopping import Stopped
from pipeline.core.types import Busy, InputError, RunFailed
from pipeline.training.driver import forward_signals

Train = Callable[..., tuple[int, list[int]]]


def job(number: int, state: State, **values: Any) -> JobOutcome:
    return JobOutcome(number=number, label=f"combined seed={number}", outcome=Outcome(state=state, **values))


def outcomes(folder: Path) -> dict[int, JobOutcome]:
    """Those of the only sweep of a folder."""
    (found,) = (path for path in (folder / "runs" / ".multirun").iterdir() if path.is_dir())
    return read_outcomes(found)


def test_an_outcome_is_read_as_it_was_written_and_the_last_one_counts(tmp_path: Path) -> None:
    first = job(3, State.stopped, note="stopped: runs/x", asked_to_stop=True, signals=(12, 15))
    write_outcome(tmp_path, first)
    assert read_outcomes(tmp_path) == {3: first}
    write_outcome(tmp_path, job(3, State.finished, score=0.5, folder="runs/x"))  # requeued
    write_outcome(tmp_path, job(1, State.busy, note="locked"))
    assert [(number, one.outcome.state.name) for number, one in read_outcomes(tmp_path).items()] == [
        (1, "busy"),
        (3, "finished"),
    ]


def test_the_table_has_aligned_columns_and_one_line_of_each_reason() -> None:
    lines = table(
        [
            job(1, State.finished, score=0.5, folder="runs/a"),
            job(10, State.failed, folder="runs/b", note="no room\nTraceback"),
        ]
    ).splitlines()
    assert lines == [
        "2 runs: 1 finished, 1 failed",
        "",
        "    run               outcome    score  folder, or why it has no result",
        " 1  combined seed=1   finished  0.5000  runs/a",
        "10  combined seed=10  failed            no room",
    ]


def test_the_exit_code_asks_for_the_same_command_where_it_would_help() -> None:
    finished, failed, stopped = job(1, State.finished), job(2, State.failed), job(3, State.stopped)
    assert exit_code([finished, job(2, State.busy), job(3, State.to_do)]) == 0
    assert exit_code([finished, failed]) == exit_code([finished, job(2, State.missing)]) == 2
    assert exit_code([failed, stopped, finished]) == 75


def test_all_jobs_are_told_apart_and_listed_at_the_end(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A failing job, a busy one and a fault of the code end nothing but themselves."""

    def body(seed: int) -> float:
        errors = {2: RunFailed("runs/x failed"), 3: Busy("runs/y: locked"), 4: TypeError("a fault")}
        if seed in errors:
            raise errors[seed]
        return seed / 10

    assert train(body, "seed=1,2,3,4,5", "-m") == (2, [1, 2, 3, 4, 5])
    shown = capsys.readouterr()
    assert [line for line in shown.out.splitlines() if line.startswith("==>")] == [
        f"==> [{number}/5] gold_only seed={number}" for number in range(1, 6)
    ]
    assert "    finished; score 0.1000; " in shown.out
    assert shown.err.startswith("error: runs/x failed\nTraceback ")
    counts, _, _, *rows = shown.out[shown.out.index("5 runs: ") :].splitlines()
    assert counts == "5 runs: 2 finished, 2 failed, 1 busy"
    assert [row.split()[:4] for row in rows[:2]] == [
        ["1", "gold_only", "seed=1", "finished"],
        ["2", "gold_only", "seed=2", "failed"],
    ]
    found = outcomes(tmp_path)
    assert [one.outcome.state.name for one in found.values()] == ["finished", "failed", "busy", "failed", "finished"]
    assert found[4].outcome.note == "TypeError: a fault"
    assert found[5].outcome.score == 0.5
    about = (tmp_path / "runs" / ".multirun" / "README.txt").read_text()
    assert about.startswith("What Hydra keeps of the last sweep")


def test_a_wrong_job_is_reported_before_the_first_starts(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    def check(config: Any) -> None:
        if config.loss.lm.weight == 3:
            raise InputError("loss.lm.weight: expected less, found 3; use 2")

    assert train(lambda seed: 0.5, "seed=1,2", "loss.lm.weight=1,3", "-m", check=check) == (2, [])
    assert capsys.readouterr().err == (
        "error: 2 of 4 jobs (2, 4): loss.lm.weight: expected less, found 3; use 2\n"
        "error: expected 4 jobs that can run, found 2 that cannot; none was started\n"
    )


def test_a_search_decides_on_dev_and_never_on_test() -> None:
    check_search("train", "optuna", {"dev": {"files": ["dev.jsonl"]}, "dry_run": False})
    with pytest.raises(InputError, match=r"^dev: expected a held-out text by whose score the search \(optuna\) "):
        check_search("train", "optuna", {"dev": None, "dry_run": False})
    with pytest.raises(InputError, match=r"^dry_run: expected jobs that are known before"):
        check_search("train", "optuna", {"dev": {}, "dry_run": True})


def test_submitit_gets_back_a_job_that_it_asked_to_stop_after_its_checkpoint(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its handler, saved while the run was at work, is called where the outcome is written; it ends the process."""
    events = []

    def of_submitit(number: int, frame: object) -> None:
        events.append(f"requeued after {outcomes(tmp_path)[1].outcome.state.name}")
        raise SystemExit(255)

    def body(seed: int) -> float:
        with read_write(HydraConfig.get()):
            HydraConfig.get().runtime.choices["hydra/launcher"] = "submitit_slurm"
        signal.signal(signal.SIGUSR2, of_submitit)  # as submitit does before it calls the job
        with forward_signals(RunPaths(folder=tmp_path)) as received:
            os.kill(os.getpid(), signal.SIGUSR2)
            events.append("saved")
        raise Stopped("stopped", is_finished=False, signals=tuple(received))

    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    assert train(body, "seed=1,2", "-m") == (255, [1])
    assert events == ["saved", "requeued after stopped"]
    assert outcomes(tmp_path)[1].outcome.signals == (signal.SIGUSR2,)
