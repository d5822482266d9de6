"""The objective's options in real runs through the scripts: what they read, what they log, what a resume remembers."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from pipeline.cache.shards import ShardReader
from pipeline.core.types import InputError
from pipeline.objective.gates import confidence, threshold
from pipeline.training import driver as launch
from pipeline.training.builders import open_gate
from support.commands import (
    capture_arguments,
    composed,
    mixture_of,
    script,
    start,
    steps_done,
    train_arguments,
    wait_for,
)


def captured(folder: Path, teacher: Path, data: Path, **changes: Any) -> Path:
    script("capture", *capture_arguments(teacher, data, corpus__targets="completion", **changes), cwd=folder)
    (found,) = folder.glob("caches/tiny-*")
    return found


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
def beaten(tmp_path_factory: pytest.TempPathFactory, student: Path, data: Path) -> Path:
    """Predictions on dev of a teacher who is always wrong."""
    folder = tmp_path_factory.mktemp("beaten")
    arguments = [f"model.path={student}", f"text.files=[{data}/dev.jsonl]", "text.targets=completion", "out=out"]
    script("evaluate", *arguments, "model.dtype=float32", cwd=folder)
    table = pl.read_parquet(folder / "out" / "predictions.parquet").with_columns(correct=pl.lit(False))
    table.write_parquet(folder / "predictions-dev.parquet")
    return folder / "predictions-dev.parquet"


def everything(completed: Path, gold_cache: Path, beaten: Path) -> dict[str, Any]:
    return {
        "gold_cache": gold_cache,
        "loss.lm.on": "[gold]",
        "loss.kd.on": "[gold,corpus]",
        "loss.kd.temperature": 2.0,
        "loss.kd.gate.keep_fraction": 0.7,
        "loss.kd.adaptive_weight.every_steps": 4,
        "loss.kd.adaptive_weight.teacher_predictions": beaten,
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


def test_everything_at_once_and_a_resume_that_remembers(
    student: Path, data: Path, completed: Path, gold_cache: Path, beaten: Path, tmp_path: Path
) -> None:
    changes = everything(completed, gold_cache, beaten)
    script("train", *arguments_of(student, data, completed, changes, steps=30, runs_dir="undisturbed"), cwd=tmp_path)
    (undisturbed,) = (tmp_path / "undisturbed").iterdir()
    rows = metrics(undisturbed)
    assert all(row["hard"] is not None and row["confidence"] is not None for row in rows)
    assert [row["confidence_weight"] for row in rows[::10]] == pytest.approx([0.0, 0.5 / 3, 1.0 / 3])
    assert all(sum(row["own_class_fractions"]) == pytest.approx(1.0) for row in rows)
    assert all(sum(row["teacher_class_fractions"]) == pytest.approx(1.0, abs=1e-3) for row in rows)
    # ahead of the teacher at steps 4, 8, ...: the weight is halved after each
    assert [row["kd_weight"] for row in rows[:9]] == [1.0] * 4 + [0.5] * 4 + [0.25]
    assert 0.1 < sum(row["gated_away_fraction"] for row in rows) / len(rows) < 0.5
    looked = [row for row in rows if "kd_at_T1" in row]
    assert [row["step"] for row in looked] == list(range(1, 31, 3))
    for row in looked:
        assert 0.0 <= row["agreement"] <= 1.0
        assert 0.0 <= row["teacher_tail"] <= 1.0
        assert row["kd_at_T1"] > 0
        assert row["grad_norm_ratio"] > 0
    assert any("grad_cosine" in row for row in looked)  # gold has both terms
    assert all(-1.001 <= row.get("grad_cosine", 0.0) <= 1.001 for row in looked)

    process = start(arguments_of(student, data, completed, changes, steps=30), tmp_path)
    wait_for(lambda: steps_done(tmp_path / "runs") >= 10, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 75
    done = script("train", *arguments_of(student, data, completed, changes, steps=30), cwd=tmp_path)
    assert int(re.findall(r"step (\d+) of 30", done.stderr)[0]) >= 10
    (run,) = (tmp_path / "runs").iterdir()
    assert [row["loss"] for row in metrics(run)] == [row["loss"] for row in rows]  # to the last bit
    assert [row["kd_weight"] for row in metrics(run)] == [row["kd_weight"] for row in rows]


def test_gates_keep_the_fraction_they_are_asked_for(student: Path, data: Path, cache: Path) -> None:
    for by in ("confidence", "entropy"):
        changes = {"loss.kd.gate.keep_fraction": 0.3, "loss.kd.gate.by": by}
        config = composed("train", *arguments_of(student, data, cache, changes))
        reader = ShardReader(cache)
        gate = open_gate(config.loss.kd, [reader])
        rows = [reader.row(b, r)[1] for b, size in enumerate(reader.blocks) for r in range(size)]
        if by == "confidence":
            kept_N = torch.cat([confidence(row.top) for row in rows]) >= gate.min_confidence
        else:
            kept_N = torch.cat([row.entropy_N for row in rows]).float() <= gate.max_entropy
        assert float(kept_N.float().mean()) == pytest.approx(0.3, abs=0.02)


def test_a_threshold_of_what_is_not_known_is_refused() -> None:
    """An imported cache has no entropies: the gate would stand open without a word."""
    with pytest.raises(InputError, match="found a cache that does not know"):
        threshold(torch.tensor([0.5, torch.nan]), 0.5, largest=False)
    assert threshold(torch.arange(10.0), 0.3, largest=True) == 7.0
    assert threshold(torch.arange(10.0), 0.3, largest=False) == 2.0


def test_a_shuffled_teacher_is_the_same_teacher_at_other_positions(cache: Path) -> None:
    plain, shuffled = ShardReader(cache), ShardReader(cache, shuffle_seed=3)
    assert plain.blocks == shuffled.blocks
    for block, size in enumerate(plain.blocks):
        pairs = [(plain.row(block, r), shuffled.row(block, r)) for r in range(size)]
        assert all(torch.equal(one[0].input_ids_S, other[0].input_ids_S) for one, other in pairs)
        before = torch.cat([one[1].top.relative_logits_NK for one, _ in pairs])
        after = torch.cat([other[1].top.relative_logits_NK for _, other in pairs])
        assert not (before == after).all(dim=1).any()  # no position keeps its own
        assert torch.equal(before.flatten().sort().values, after.flatten().sort().values)
        again = ShardReader(cache, shuffle_seed=3)
        assert torch.equal(again.row(block, 0)[1].top.ids_NK, shuffled.row(block, 0)[1].top.ids_NK)


def test_a_smoothed_teacher_has_one_choice_and_even_others(student: Path, data: Path, cache: Path) -> None:
    config = composed("train", *arguments_of(student, data, cache, {"loss.kd.control": "smoothed", "gold_fraction": 0}))
    mixture = mixture_of(config)
    (batch, *_) = mixture.micro_batches(0, rank=0, world_size=1, micro_batch=4)
    assert batch.teacher is not None
    assert (batch.teacher.relative_logits_NK[:, 0] == 0).all()
    assert (batch.teacher.relative_logits_NK[:, 1:] == batch.teacher.relative_logits_NK[:, 1:2]).all()


def test_what_an_objective_cannot_read_is_refused_before_any_rank_starts(
    student: Path, data: Path, cache: Path, tmp_path: Path, teacher: Path
) -> None:
    script("capture", *capture_arguments(teacher, data, kind="sampled", draws=5, temperatures="[1.0]"), cwd=tmp_path)
    (drawn,) = tmp_path.glob("caches/tiny-*")
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (drawn, {"loss.kd.divergence": "reverse_kl"}, "expected a topk cache with an exact tail"),
        (drawn, {"loss.kd.divergence": "jsd"}, "found sampled, tail exact"),
        (cache, {"loss.hard.weight": 1}, "expected a cache whose records the teacher completed, found none"),
        (drawn, {"loss.hard.weight": 1, "loss.hard.take": "likeliest"}, "whose likeliest draw is chance"),
        (cache, {"gold_fraction": 1, "loss.kd.gate.keep_fraction": 0.5}, "keep_fraction: expected 1, because"),
        (cache, {"optimizer.decay_fraction": 2}, "decay_fraction: expected 0 to 1"),
        (cache, {"loss.kd.adaptive_weight.every_steps": 5}, "expected dev and adaptive_weight.teacher_predictions"),
        (cache, {"loss.kd.gate.keep_fraction": 0}, "keep_fraction: expected more than 0"),
        (cache, {"loss.kd.beta": 1.5}, "beta: expected 0 to 1"),
        (cache, {"loss.hard.on": "[gold]", "loss.hard.weight": 1}, "gold carries nothing of the teacher's"),
        (cache, {"loss.confidence.choices": "[a,ab]"}, "expected completions of different first tokens, found"),
        (cache, {"loss.lm.ramp.start_fraction": 0.5, "loss.lm.ramp.end_fraction": 0.2}, "expected at least start"),
    ]
    for place, changes, message in cases:
        config = composed("train", *arguments_of(student, data, place, changes, runs_dir=str(tmp_path / "runs")))
        with pytest.raises(InputError, match=re.escape(message)):
            launch.run(config)
    assert not (tmp_path / "runs").exists()
