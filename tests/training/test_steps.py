"""Steps on a cache of choices of several tokens: counts by weight, classes by the position after the prompt."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.audit import commands
from pipeline.capture import estimate
from pipeline.config.commands import AuditConfig
from pipeline.objective.terms import TermOptions
from pipeline.training.run import TrainState
from pipeline.training.steps import step_inputs
from support.commands import capture_arguments, composed, only, script, train_arguments

CHOICES = "[' one',' two',' tail',' stream',' string']"
TERMS = ("lm", "kd", "confidence")


def test_a_count_below_one_divides_as_any_other() -> None:
    """S / N is a weighted mean: positions of weight 0.25 together count as much as one position would."""
    terms = {name: TermOptions(on=("corpus",)) for name in ("lm", "kd", "hard")}
    config = composed("train", "study=demo", "experiment=combined")
    run = SimpleNamespace(ranks=SimpleNamespace(world_size=2), terms=terms, config=config, loss_scale=1.0)
    inputs = step_inputs(run, TrainState(), dict.fromkeys(terms, 3.0), {"lm": 0.0, "kd": 0.25, "hard": 4.0})
    assert inputs.coefficients == {"lm": 6.0, "kd": 24.0, "hard": 1.5}


@pytest.mark.slow
def test_capture_and_training_of_choices(
    teacher: Path, student: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The scripts, from prompts to a scored student: kd and confidence on the corpus, lm on the trees of gold."""
    text = {"corpus__targets": "choices", "corpus__end_token": "false", "corpus__choices": CHOICES}
    arguments = capture_arguments(teacher, data, **text)
    estimate.run(composed("capture", *arguments))
    assert "Measured: 25 records" in capsys.readouterr().out  # the first shard: each once, however many segments it has
    script("capture", *arguments, cwd=tmp_path)
    (cache,) = tmp_path.glob("caches/tiny-*")
    assert commands.run("verify", AuditConfig(cache=str(cache))) == 0
    assert f"{60 * 8} targets" in capsys.readouterr().out  # 8 inner nodes for each record
    chosen = {
        "gold__targets": "choices",
        "steps": 4,
        "global_batch": 8,
        "loss__confidence__weight": 0.5,
        "loss__confidence__choices": CHOICES,
    }
    script("train", *train_arguments(student, data, str(cache), **chosen), cwd=tmp_path)
    run = only(tmp_path / "runs")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 4
    for line in lines:
        assert 0 < line["kd_count"] == line["confidence_count"] != int(line["kd_count"])
        assert type(line["lm_count"]) is int
        assert line["loss"] == pytest.approx(sum(line[f"{name}_weight"] * (line[name] or 0.0) for name in TERMS))
    with_classes = [line for line in lines if "own_class_fractions" in line]  # those that read the end of a prompt
    assert with_classes
    for line in with_classes:
        assert len(line["own_class_fractions"]) == 3  # the five choices have three different first tokens
        assert sum(line["own_class_fractions"]) == pytest.approx(1.0)
        assert sum(line["teacher_class_fractions"]) == pytest.approx(1.0, rel=1e-3)
    assert (run / "result.json").exists()
