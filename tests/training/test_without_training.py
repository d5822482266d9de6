"""Runs without training (steps=0): the student is scored as it is, and nothing else is read, loaded or written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from pipeline.config.schema import TrainConfig
from pipeline.config.validate_train import check_train
from pipeline.core.files import RunPaths
from pipeline.core.types import InputError
from pipeline.evaluation.scoring import score
from pipeline.models.loading import load_model
from pipeline.training import driver, scorer
from pipeline.training.driver import prepare
from support.commands import ROOT, composed, labeled, only, script
from support.scoring import exam_of, scored


def arguments_of(student: Path, data: Path, **changes: Any) -> list[str]:
    chosen: dict[str, Any] = {
        "experiment": "zero_shot",
        "student.path": student,
        "student.dtype": "float32",
        "student.attention": "sdpa",
        "runs_dir": "runs",
        **labeled("dev", data),
        **labeled("test", data),
        **{name.replace("__", "."): value for name, value in changes.items()},
    }
    return [f"{name}={value}" for name, value in chosen.items()]


def in_this_process(config: TrainConfig, paths: RunPaths, num_ranks: int, lock: int) -> int:
    """In place of `driver.run_ranks`: starting a process takes seconds."""
    assert num_ranks == 1
    scorer.run(paths.folder)
    return 0


@pytest.mark.slow
def test_a_process_without_an_engine_scores_the_student(student: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "deepspeed.py").write_text("raise SystemExit('nothing here needs an engine')")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    script("train", *arguments_of(student, data), cwd=tmp_path, env=environment)
    run = only(tmp_path / "runs")
    assert {path.name for path in run.iterdir()} == {
        *("config.yaml", "environment.json", "identity.json", "lock", "log.txt"),
        *("predictions-dev.parquet", "predictions-test.parquet", "result.json", "state.json"),
    }
    expected, _ = scored(student, data / "test.jsonl", end_token=False)
    found = json.loads((run / "result.json").read_text())
    assert found["test"]["nll"] == pytest.approx(expected.nll, rel=1e-6)
    assert found["test"]["accuracy"] == expected.accuracy


def test_the_student_is_scored_as_it_is(
    student: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With as many layers as asked for, once, and with what a result has to have."""
    monkeypatch.setattr(driver, "run_ranks", in_this_process)
    config = composed("train", *arguments_of(student, data, runs_dir=tmp_path, student__num_layers=2))
    objective = driver.run(config)
    run = only(tmp_path)
    result = json.loads((run / "result.json").read_text())
    assert (result["steps"], result["train_seconds"], result["exported_step"]) == (0, 0.0, 0)
    assert objective == result["dev"]["accuracy"]
    table = pl.read_parquet(run / "predictions-test.parquet")
    assert table["correct"].mean() == result["test"]["accuracy"]
    model = load_model(student, dtype="float32", device=torch.device("cpu"), num_layers=2)
    exam = exam_of(student, data / "test.jsonl", end_token=False)
    expected, _ = score(model, exam, batch_tokens=4096, teacher_predictions=None, log_every_seconds=60)
    assert result["test"]["nll"] == pytest.approx(expected.nll, rel=1e-6)
    monkeypatch.setattr(driver, "run_ranks", None)  # nothing is started again
    assert driver.run(config) == objective


def test_nothing_of_data_is_read(student: Path, data: Path) -> None:
    """Neither options nor files of training matter: not those that training would refuse either."""
    base = prepare(composed("train", *arguments_of(student, data)))
    assert not base.inputs.gold
    assert base.num_ranks == 1
    changed = {"cache": "no-cache", "launcher__num_processes": 3, "global_batch": 4, "gold_fraction": 0.5}
    changed |= {"loss__kd__weight": -1, "window": 100_000, "evaluate_every_steps": 5, "export__what": "best"}
    found = prepare(composed("train", *arguments_of(student, data, **changed)))
    assert found.num_ranks == 1
    assert found.identity.keys() == base.identity.keys()


def test_a_teacher_that_is_ready_made(student: Path, data: Path) -> None:
    config = composed("train", *arguments_of(student, data, experiment="teacher_as_is"))
    check_train(config)
    assert config.role is not None
    assert (config.name, config.role.name, config.steps) == ("teacher", "teacher", 0)
    with pytest.raises(InputError, match="expected dev, test or more_tests, because the student is scored as it is"):
        check_train(composed("train", "experiment=teacher_as_is", "student.path=x"))
