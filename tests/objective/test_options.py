"""The options of the loss in real runs through the scripts: what they read, what they log, what a resume keeps."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from pipeline.cache.shards import ShardReader
from pipeline.core.topk import label_smoothed
from pipeline.core.types import InputError
from pipeline.objective.gates import threshold, top_probability
from pipeline.training import driver
from pipeline.training.builders import open_gate
from support.commands import (
    capture_arguments,
    composed,
    mixture_of,
    script,
    start,
    train_arguments,
    wait_for_steps,
)


def captured(folder: Path, teacher: Path, data: Path, **changes: Any) -> Path:
    script("capture", *capture_arguments(teacher, data, corpus__targets="completion", **changes), cwd=folder)
    (cache,) = folder.glob("caches/tiny-*")
    return cache


@pytest.fixture(scope="module")
def completed(tmp_path_factory: pytest.TempPathFactory, teacher: Path, data: Path) -> Path:
    """A capture of prompts that the teacher completed."""
    changes = {"complete__how": "greedy", "complete__max_new_tokens": 4}
    return captured(tmp_path_factory.mktemp("completed"), teacher, data, **changes)


@pytest.fixture(scope="module")
def gold_cache(tmp_path_factory: pytest.TempPathFactory, teacher: Path, data: Path) -> Path:
    """A capture of the gold set: known targets and the teacher's distributions on them."""
    return captured(tmp_path_factory.mktemp("gold"), teacher, data, corpus__files=f"[{data}/gold.jsonl]")


@pytest.fixture(scope="module")
def predictions_all_wrong(tmp_path_factory: pytest.TempPathFactory, student: Path, data: Path) -> Path:
    """Predictions on dev of a teacher that is always wrong."""
    folder = tmp_path_factory.mktemp("predictions")
    arguments = [f"model.path={student}", f"text.files=[{data}/dev.jsonl]", "text.targets=completion", "out=out"]
    script("evaluate", *arguments, "model.dtype=float32", cwd=folder)
    table = pl.read_parquet(folder / "out" / "predictions.parquet").with_columns(correct=pl.lit(False))
    table.write_parquet(folder / "predictions-dev.parquet")
    return folder / "predictions-dev.parquet"


def all_options(gold_cache: Path, predictions: Path) -> dict[str, Any]:
    return {
        "gold_cache": gold_cache,
        "loss.lm.on": "[gold]",
        "loss.kd.on": "[gold,corpus]",
        "loss.kd.temperature": 2.0,
        "loss.kd.gate.keep_fraction": 0.7,
        "loss.kd.position_weight.by": "margin",
        "loss.kd.adaptive_weight.every_steps": 4,
        "loss.kd.adaptive_weight.teacher_predictions": predictions,
        "loss.hard.weight": 0.5,
        "loss.confidence.weight": 1.0,
        "loss.confidence.choices": "[a,b,c]",
        "loss.confidence.ramp.shape": "linear",
        "loss.confidence.ramp.start_value": 0.0,
        "loss.confidence.ramp.end_value": 0.5,
        "loss.diagnostics_every_steps": 3,
    }


def arguments_of(student: Path, data: Path, cache: Path, changes: dict[str, Any], **more: Any) -> list[str]:
    return [
        *train_arguments(student, data, str(cache), **more),
        *(f"{name}={value}" for name, value in changes.items()),
    ]


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


Rows = list[dict[str, Any]]


def check_hard_labels(rows: Rows) -> None:
    assert all(row["hard"] is not None and row["hard"] > 0 for row in rows)


def check_kd_on_gold(rows: Rows) -> None:
    """lm reads gold alone; a cosine exists only where kd reads the same positions."""
    assert any("grad_cosine" in row for row in rows)


def check_confidence_ramp(rows: Rows) -> None:
    assert all(row["confidence"] is not None for row in rows)
    assert [row["confidence_weight"] for row in rows[::10]] == pytest.approx([0.0, 0.5 / 3, 1.0 / 3])


def check_class_fractions(rows: Rows) -> None:
    for row in rows:
        assert len(row["own_class_fractions"]) == len(row["teacher_class_fractions"]) == 3
        assert sum(row["own_class_fractions"]) == pytest.approx(1.0)
        assert sum(row["teacher_class_fractions"]) == pytest.approx(1.0, abs=1e-3)


def check_adaptive_weight(rows: Rows) -> None:
    """The student is ahead of the teacher at steps 4, 8, ...: the weight is halved after each."""
    assert [row["kd_weight"] for row in rows[:9]] == [1.0] * 4 + [0.5] * 4 + [0.25]


def check_gate(rows: Rows) -> None:
    assert 0.1 < sum(row["gated_away_fraction"] for row in rows) / len(rows) < 0.5


def check_diagnostics(rows: Rows) -> None:
    with_diagnostics = [row for row in rows if "kd_at_T1" in row]
    assert [row["step"] for row in with_diagnostics] == list(range(1, 31, 3))
    for row in with_diagnostics:
        assert 0.0 <= row["agreement"] <= 1.0
        assert 0.0 <= row["teacher_tail"] <= 1.0
        assert row["kd_at_T1"] > 0
        assert row["grad_norm_ratio"] > 0
    assert all(-1.001 <= row.get("grad_cosine", 0.0) <= 1.001 for row in with_diagnostics)


OPTION_CHECKS: dict[str, Callable[[Rows], None]] = {
    "loss.hard.weight": check_hard_labels,
    "loss.kd.on": check_kd_on_gold,
    "loss.confidence.ramp": check_confidence_ramp,
    "loss.confidence.choices": check_class_fractions,
    "loss.kd.adaptive_weight": check_adaptive_weight,
    "loss.kd.gate.keep_fraction": check_gate,
    "loss.diagnostics_every_steps": check_diagnostics,
}


@pytest.mark.slow
def test_each_option_in_one_run_and_a_resume_that_repeats_it(
    student: Path, data: Path, completed: Path, gold_cache: Path, predictions_all_wrong: Path, tmp_path: Path
) -> None:
    """One run serves all checks; those that fail are listed by option. Then the run is stopped and resumed."""
    changes = all_options(gold_cache, predictions_all_wrong)
    script("train", *arguments_of(student, data, completed, changes, steps=30, runs_dir="undisturbed"), cwd=tmp_path)
    (undisturbed,) = (tmp_path / "undisturbed").iterdir()
    rows = metrics(undisturbed)
    failures = {}
    for option, check in OPTION_CHECKS.items():
        try:
            check(rows)
        except (AssertionError, KeyError) as error:
            failures[option] = repr(error)
    assert not failures

    process = start(arguments_of(student, data, completed, changes, steps=30), tmp_path)
    wait_for_steps(tmp_path / "runs", 10, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 75
    done = script("train", *arguments_of(student, data, completed, changes, steps=30), cwd=tmp_path)
    assert int(re.findall(r"step (\d+) of 30", done.stderr)[0]) >= 10
    (run,) = (tmp_path / "runs").iterdir()
    for name in ("loss", "kd_weight", "own_class_fractions"):  # the last two need the dev scores and the thresholds
        assert [row[name] for row in metrics(run)] == [row[name] for row in rows], name  # to the last bit


def test_a_gate_keeps_the_given_fraction(student: Path, data: Path, cache: Path) -> None:
    """Of what the loss reads: under the control `smoothed` the teacher is less sure of its first token."""
    for by, control in (("confidence", "none"), ("entropy", "none"), ("confidence", "smoothed")):
        changes = {"loss.kd.gate.keep_fraction": 0.3, "loss.kd.gate.by": by, "loss.kd.control": control}
        config = composed("train", *arguments_of(student, data, cache, changes))
        reader = ShardReader(cache)
        gate = open_gate(config.loss.kd, [reader])
        rows = [reader.row(b, r)[1] for b, size in enumerate(reader.blocks) for r in range(size)]
        tops = [row.top for row in rows]
        if control == "smoothed":
            size = reader.manifest.vocabulary_size
            tops = [label_smoothed(row.top, row.entropy_N, vocabulary_size=size) for row in rows]
        if by == "confidence":
            kept_N = torch.cat([*map(top_probability, tops)]) >= gate.min_confidence
        else:
            kept_N = torch.cat([row.entropy_N for row in rows]).float() <= gate.max_entropy
        assert float(kept_N.float().mean()) == pytest.approx(0.3, abs=0.02)


def test_a_threshold_over_unknown_entropies_is_rejected() -> None:
    """An imported cache has no entropies: the gate would silently let every position pass."""
    with pytest.raises(InputError, match="expected the teacher's entropy at every position, found a cache without it"):
        threshold(torch.tensor([0.5, torch.nan]), 0.5, largest=False)
    assert threshold(torch.arange(10.0), 0.3, largest=True) == 7.0
    assert threshold(torch.arange(10.0), 0.3, largest=False) == 2.0


def test_a_shuffled_teacher_is_the_same_teacher_at_other_positions(cache: Path) -> None:
    plain, shuffled = ShardReader(cache), ShardReader(cache, shuffle_seed=3)
    assert plain.blocks == shuffled.blocks
    for block, size in enumerate(plain.blocks):
        pairs = [(plain.row(block, r), shuffled.row(block, r)) for r in range(size)]
        assert all(torch.equal(own[0].input_ids_S, moved[0].input_ids_S) for own, moved in pairs)
        before = torch.cat([own[1].top.relative_logits_NK for own, _ in pairs])
        after = torch.cat([moved[1].top.relative_logits_NK for _, moved in pairs])
        assert not (before == after).all(dim=1).any()  # no position keeps its own
        assert torch.equal(before.flatten().sort().values, after.flatten().sort().values)
        reopened = ShardReader(cache, shuffle_seed=3)
        assert torch.equal(reopened.row(block, 0)[1].top.ids_NK, shuffled.row(block, 0)[1].top.ids_NK)


def test_a_smoothed_teacher_has_one_largest_logit_and_the_others_equal(student: Path, data: Path, cache: Path) -> None:
    config = composed("train", *arguments_of(student, data, cache, {"loss.kd.control": "smoothed", "gold_fraction": 0}))
    mixture = mixture_of(config)
    (batch, *_) = mixture.micro_batches(0, rank=0, world_size=1, micro_batch=4)
    assert batch.teacher is not None
    assert (batch.teacher.relative_logits_NK[:, 0] == 0).all()
    assert (batch.teacher.relative_logits_NK[:, 1:] == batch.teacher.relative_logits_NK[:, 1:2]).all()


def test_options_that_do_not_fit_the_cache_are_rejected_before_any_rank_starts(
    student: Path, data: Path, cache: Path, tmp_path: Path, teacher: Path
) -> None:
    script("capture", *capture_arguments(teacher, data, kind="sampled", draws=5, temperatures="[1.0]"), cwd=tmp_path)
    (sampled,) = tmp_path.glob("caches/tiny-*")
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (sampled, {"loss.kd.divergence": "reverse_kl"}, "expected a topk cache with an exact tail"),
        (sampled, {"loss.kd.divergence": "jsd"}, "found sampled, tail exact"),
        (cache, {"loss.hard.weight": 1}, "expected a cache whose records the teacher completed, found none"),
        (sampled, {"loss.hard.weight": 1, "loss.hard.take": "likeliest"}, "whose top entry is a matter of chance"),
        (cache, {"gold_fraction": 1, "loss.kd.gate.keep_fraction": 0.5}, "keep_fraction: expected 1, because"),
        (cache, {"optimizer.decay_fraction": 2}, "decay_fraction: expected 0 to 1"),
        (cache, {"loss.kd.adaptive_weight.every_steps": 5}, "expected dev and adaptive_weight.teacher_predictions"),
        (cache, {"loss.kd.gate.keep_fraction": 0}, "keep_fraction: expected more than 0"),
        (sampled, {"loss.kd.tail_weight": 2}, "tail_weight: expected 1 or a topk cache"),
        (cache, {"loss.kd.tail_weight": -1}, "loss.kd.tail_weight: expected at least 0"),
        (cache, {"loss.kd.tail_weight": 2, "loss.kd.divergence": "truncated"}, "expected 1 with divergence=truncated"),
        (cache, {"loss.kd.beta": 1.5}, "beta: expected 0 to 1"),
        (cache, {"loss.hard.on": "[gold]", "loss.hard.weight": 1}, "gold carries no output of the teacher"),
        (cache, {"loss.confidence.choices": "[a,ab]"}, "expected completions with two or more different first"),
        (cache, {"loss.lm.ramp.start_fraction": 0.5, "loss.lm.ramp.end_fraction": 0.2}, "expected at least start"),
    ]
    for address, changes, message in cases:
        config = composed("train", *arguments_of(student, data, address, changes, runs_dir=str(tmp_path / "runs")))
        with pytest.raises(InputError, match=re.escape(message)):
            driver.run(config)
    assert not (tmp_path / "runs").exists()
