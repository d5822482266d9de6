"""Health figures of a run, what ends a run or logs a warning, evaluation on dev while training."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.config.schema import EarlyStoppingConfig, ExportConfig, ExportedStep, Tracker
from pipeline.config.validate_train import check_train
from pipeline.core.types import InputError
from pipeline.monitoring import health
from pipeline.monitoring.health import GradientMonitor, ModelSize, model_flops, model_size, throughput
from pipeline.training import dev_evaluation
from pipeline.training.run import TrainState
from support.commands import (
    composed,
    prepare_run,
    run_ranks,
    script,
    start,
    train_arguments,
    wait_for_steps,
)


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------ FLOPs and rates


def test_model_flops_equal_a_count_by_hand() -> None:
    size = ModelSize(body=1000, head=500, attention=3 * 8)  # three layers, all heads of eight numbers together
    assert model_flops(size, tokens=100, supervised=100, window=10) == 6 * 1500 * 100 + 12 * 3 * 8 * 10 * 100
    assert model_flops(size, tokens=100, supervised=0, window=10) == 6 * 1000 * 100 + 12 * 3 * 8 * 10 * 100


def test_model_flops_equal_those_that_torch_counts(student: Path) -> None:
    """A forward and a backward of a real model under torch's own counter: 2 N and 4 L H Q T a token, times three.

    In torch too the first layer has the products of a forward and of its weights' gradients; only its input needs none.
    """
    from torch.utils.flop_counter import FlopCounterMode

    model = AutoModelForCausalLM.from_pretrained(student, attn_implementation="eager")
    ids_BS = torch.arange(48).reshape(2, 24)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids_BS).logits.sum().backward()
    ours = model_flops(model_size(model), tokens=48, supervised=48, window=24)
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_the_size_of_a_model_counts_the_head_and_leaves_out_the_input_embeddings(student: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(student)
    size = model_size(model)
    assert size.head == model.lm_head.weight.numel()
    assert size.body + size.head == sum(p.numel() for p in model.parameters())
    assert size.attention == 3 * 32


def test_rates_and_no_mfu_without_a_known_peak() -> None:
    figures = {"seconds": 3.0, "data_wait_seconds": 1.0, "tokens": 400, "model_flops": 8e12}
    assert throughput(figures, world_size=2, peak=None) == {"tokens_per_second": 100.0, "data_wait_fraction": 0.25}
    assert throughput(figures, world_size=2, peak=10e12)["mfu"] == pytest.approx(0.1)
    assert health.peak_flops(torch.device("cpu"), "bfloat16") is None


# ------------------------------------------------------------------------------------ gradient norms


def step_of(step: int, norm: float, skipped: int = 0) -> dict[str, Any]:
    return {"step": step, "grad_norm": norm, "skipped_steps": skipped, "exploding_steps": 0}


@pytest.mark.parametrize("norm", [float("nan"), float("inf"), -1.0])
def test_a_gradient_norm_that_is_not_finite_ends_the_run(norm: float) -> None:
    monitor = GradientMonitor(max_skipped_steps=5, warn_grad_norm=10.0)
    with pytest.raises(FloatingPointError, match=r"step 1: expected a finite gradient norm, found .*; lower the"):
        monitor.check(step_of(1, norm))


def test_steps_skipped_in_a_row_end_the_run_and_others_do_not() -> None:
    monitor = GradientMonitor(max_skipped_steps=3, warn_grad_norm=10.0)
    for step, skipped in enumerate([1, 2, 2, 3, 4, 4], start=1):  # twice two in a row
        monitor.check(step_of(step, -1.0 if skipped in (1, 3) else 1.0, skipped))
    monitor.check(step_of(7, -1.0, 5))
    monitor.check(step_of(8, -1.0, 6))
    with pytest.raises(FloatingPointError, match="step 9: expected fewer than 3 optimizer steps in a row"):
        monitor.check(step_of(9, -1.0, 7))


def test_steps_skipped_before_a_resume_are_not_counted_again() -> None:
    monitor = GradientMonitor(max_skipped_steps=1, warn_grad_norm=10.0, skipped_steps=4)
    assert monitor.check(step_of(5, 1.0, 4)) == {"exploding_steps": 0}


def test_an_exploding_gradient_is_warned_of_once_counted_always_and_kept_over_a_resume(
    caplog: pytest.LogCaptureFixture,
) -> None:
    logging.getLogger("pipeline").propagate = True
    rows: list[dict[str, Any]] = []
    norms = (
        [1.0, 50.0] + [1.0] * 10 + [9.9, 10.1, 500.0, 1.0]
    )  # the second comes before there are enough norms for a median
    with caplog.at_level(logging.WARNING):
        monitor = GradientMonitor(max_skipped_steps=5, warn_grad_norm=10.0)
        for step, norm in enumerate(norms, start=1):
            rows.append(step_of(step, norm) | monitor.check(step_of(step, norm)))
    assert [row["exploding_steps"] for row in rows] == [0] * 13 + [1, 2, 2]
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("step 14: expected a gradient norm of at most 10 times its recent median 1, found 10.1;")
    resumed = GradientMonitor(max_skipped_steps=5, warn_grad_norm=10.0, rows=rows)
    assert resumed.check(step_of(17, 30.0)) == {"exploding_steps": 3}


# ------------------------------------------------------------------------------------ dev during training


def test_the_best_score_is_kept_and_patience_ends() -> None:
    options, state = EarlyStoppingConfig(patience=2, min_delta=0.1), TrainState()
    after_each_step = []
    for step, score in enumerate([0.5, 0.55, 0.7, 0.75, 0.79], start=1):
        state = dev_evaluation.with_score(dataclasses.replace(state, step=step), score, min_delta=options.min_delta)
        after_each_step.append(
            (state.best_score, state.best_step, state.evaluations_since_best, dev_evaluation.is_over(options, state))
        )
    assert after_each_step == [
        (0.5, 1, 0, False),
        (0.5, 1, 1, False),
        (0.7, 3, 0, False),
        (0.7, 3, 1, False),
        (0.7, 3, 2, True),
    ]
    without = EarlyStoppingConfig(patience=0)
    assert not dev_evaluation.is_over(without, dataclasses.replace(state, evaluations_since_best=99))


def test_a_score_that_is_not_finite_is_never_the_best() -> None:
    state = dev_evaluation.with_score(TrainState(step=1, best_score=-3.0), float("nan"), min_delta=0.0)
    assert (state.best_score, state.evaluations_since_best) == (-3.0, 1)
    first = dev_evaluation.with_score(TrainState(step=1), float("nan"), min_delta=0.0)
    second = dev_evaluation.with_score(dataclasses.replace(first, step=2), float("nan"), min_delta=0.0)
    assert (second.best_step, second.evaluations_since_best) == (1, 1)
    assert dev_evaluation.with_score(dataclasses.replace(second, step=3), -9.0, min_delta=0.0).best_step == 3


EARLY: dict[str, Any] = {
    "evaluate_every_steps": 3,
    "early_stopping.patience": 2,
    "early_stopping.min_delta": 1.0,  # of accuracy: nothing is ever better
    "trackers": "[tensorboard]",
}


def early(student: Path, data: Path, cache: Path, **more: Any) -> list[str]:
    arguments = train_arguments(student, data, str(cache), **more)
    return arguments + [f"{name}={value}" for name, value in EARLY.items()]


@pytest.mark.slow
def test_early_stopping_with_tensorboard_and_a_resume_that_stops_at_the_same_step(
    student: Path, data: Path, cache: Path, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    script("train", *early(student, data, cache, steps=5000, runs_dir="undisturbed", seed=3), cwd=tmp_path)
    (run,) = (tmp_path / "undisturbed").iterdir()
    rows, result = rows_of(run), json.loads((run / "result.json").read_text())
    assert [row["step"] for row in rows if "dev_accuracy" in row] == [3, 6, 9]
    assert [row["evaluations_since_best"] for row in rows if "best_step" in row] == [0, 1, 2]
    assert (result["best_step"], result["stopped_early_at"], result["decided_by"]) == (3, 9, "dev_accuracy")
    assert result["steps"] == len(rows) == 9
    # the exported model is the one that the last evaluation on dev scored
    assert result["dev"]["accuracy"] == rows[-1]["dev_accuracy"]
    assert result["dev"]["nll"] == pytest.approx(rows[-1]["dev_nll"], rel=1e-5)
    for row in rows:
        seconds = row["seconds"] + row["data_wait_seconds"]
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / seconds)
        assert row["data_wait_fraction"] == pytest.approx(row["data_wait_seconds"] / seconds)
        assert 50e6 < row["peak_memory_bytes"] < 50e9
        assert row["exploding_steps"] == 0
        assert ("mfu" in row) == torch.cuda.is_available()
        assert row["model_flops"] > 0
    assert in_tensorboard(run) == numbers(rows)

    arguments = early(student, data, cache, steps=5000, seed=3, checkpoint__every_steps=2)
    process = start(arguments, tmp_path)
    wait_for_steps(tmp_path / "runs", 4, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    script("train", *arguments, cwd=tmp_path)
    (resumed,) = (tmp_path / "runs").iterdir()
    resumed_rows = rows_of(resumed)
    for name in ("step", "loss", "dev_accuracy", "dev_nll", "best_step", "evaluations_since_best", "stopped_early"):
        assert [row.get(name) for row in resumed_rows] == [row.get(name) for row in rows], name
    assert in_tensorboard(resumed) == numbers(resumed_rows)


def numbers(rows: list[dict[str, Any]]) -> dict[str, dict[int, float]]:
    """Every number of metrics.jsonl by name and step, as a float32 holds it."""
    by_name: dict[str, dict[int, float]] = {}
    for row in rows:
        for name, value in row.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool) and name != "step":
                by_name.setdefault(name, {})[row["step"]] = torch.tensor(value, dtype=torch.float32).item()
    return by_name


def in_tensorboard(run: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard reads from its event files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    steps = [tag for tag in events.Tags()["scalars"] if not tag.startswith("final_")]  # the scores, which have no step
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in steps}


@pytest.mark.slow
def test_dev_scores_under_every_zero_stage_equal_those_of_one_rank(
    student: Path, data: Path, cache: Path, tmp_path: Path
) -> None:
    folders = []
    for stage in range(4):
        changes = {"steps": 4, "micro_batch": 1, "evaluate_every_steps": 2, "deepspeed__zero_stage": stage}
        folders.append(prepare_run(tmp_path / f"zero{stage}", train_arguments(student, data, str(cache), **changes)))
    run_ranks(1, folders[:1])
    run_ranks(2, folders[1:])
    expected = [row for row in rows_of(folders[0]) if "dev_nll" in row]
    assert [row["step"] for row in expected] == [2, 4]
    assert expected[0]["dev_nll"] != expected[1]["dev_nll"]
    for stage in (1, 2, 3):
        rows = [row for row in rows_of(folders[stage]) if "dev_nll" in row]
        for row, expected_row in zip(rows, expected, strict=True):
            assert row["dev_nll"] == pytest.approx(expected_row["dev_nll"], rel=1e-4), stage
            assert row["dev_accuracy"] == expected_row["dev_accuracy"], stage
        assert sum(row["tokens"] for row in rows_of(folders[stage])) == sum(r["tokens"] for r in rows_of(folders[0]))


# ------------------------------------------------------------------------------------ rejected options


def test_contradictory_options_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    base = composed("train", "study=demo", "experiment=combined")
    patient = EarlyStoppingConfig(patience=3)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"evaluate_every_steps": 5, "dev": None}, "evaluate_every_steps=5: expected dev"),
        ({"early_stopping": patient}, "early_stopping.patience=3: expected evaluate_every_steps of 1 or more, found 0"),
        (
            {"export": ExportConfig(what=ExportedStep.best)},
            "export.what=best: expected dev and evaluate_every_steps of 1",
        ),
        (
            {"trackers": [Tracker.wandb]},
            "trackers: expected the package wandb for wandb, found none; pip install wandb",
        ),
    ]
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    for changes, message in cases:
        with pytest.raises(InputError, match=re.escape(message)):
            check_train(dataclasses.replace(base, **changes))
