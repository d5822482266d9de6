"""Run folders -> values: roles, settings that are the same, texts that differ, what is left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.options import identity_options, save_config
from pipeline.config.schema import (
    ConfidenceConfig,
    Control,
    ExportConfig,
    ExportedStep,
    GateConfig,
    KdConfig,
    LossConfig,
    Role,
    StudentConfig,
    TrainConfig,
)
from pipeline.core.types import InputError
from pipeline.report.runs import StudyRun, _inputs, read_runs

SCORES = {"num_records": 10, "accuracy": 0.5, "exact_match": None, "nll": 1.0}


def make_run(
    folder: Path,
    *,
    inputs: dict[str, str],
    scores: dict[str, Any] | None = SCORES,
    finished: bool = True,
    options: dict[str, Any] | None = None,
    **settings: Any,
) -> Path:
    settings = {"name": "combined", "gold_fraction": 0.5, "steps": 3, "student": StudentConfig(path="m")} | settings
    config = TrainConfig(**settings)
    config.cache = "caches/mine" if "cache" in inputs else None
    folder.mkdir(parents=True)
    save_config(config, folder / "config.yaml")
    identity = {"options": identity_options(config) | (options or {}), "student": ["w", "t"], "test": "text"} | inputs
    (folder / "identity.json").write_text(json.dumps(identity))
    if finished:
        (folder / "result.json").write_text(json.dumps({"steps": 3, "train_seconds": 1.5, "test": scores}))
    return folder


def the_run(folder: Path, **settings: Any) -> StudyRun:
    make_run(folder, **settings)
    (run,) = read_runs([str(folder)])
    return run


def kd(**options: Any) -> LossConfig:
    return LossConfig(kd=KdConfig(**options))


def confident(least: float) -> LossConfig:
    """A KD weight of 0; the gate is that of the confidence term."""
    gated = KdConfig(weight=0.0, gate=GateConfig(min_confidence=least))
    return LossConfig(kd=gated, confidence=ConfidenceConfig(weight=0.5))


@pytest.mark.parametrize(
    ("settings", "role"),
    [
        ({"role": Role.weak_only, "name": "mine"}, "weak_only"),
        ({"role": None, "name": "ceiling"}, "ceiling"),
        ({"role": None, "name": "mine"}, "other"),
        ({"role": Role.combined, "loss": kd(control=Control.shuffled)}, "control"),
        ({"role": Role.gold_only, "loss": kd(control=Control.shuffled), "inputs": {"gold": "g"}}, "gold_only"),
    ],
)
def test_the_role_is_the_option_else_the_name(tmp_path: Path, settings: dict[str, Any], role: str) -> None:
    """And a run whose teacher was replaced is a control, unless it reads no teacher at all."""
    assert the_run(tmp_path / "run", **({"inputs": {"cache": "c", "gold": "g"}} | settings)).role == role


BOTH = {"cache": "c", "gold": "g"}
SAME: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "another seed": ({"inputs": BOTH}, {"inputs": BOTH, "seed": 2}),
    "another name": ({"inputs": BOTH}, {"inputs": BOTH, "name": "again"}),
    "KD weight without a cache": ({"inputs": {"gold": "g"}}, {"inputs": {"gold": "g"}, "loss": kd(weight=0.3)}),
    "divergence at weight 0": (
        {"inputs": BOTH, "loss": kd(weight=0.0)},
        {"inputs": BOTH, "loss": kd(weight=0.0, temperature_squared=False)},
    ),
    "temperature at weight 0": (
        {"inputs": BOTH, "loss": kd(weight=0.0)},
        {"inputs": BOTH, "loss": kd(weight=0.0, temperature=2.0)},
    ),
    "gate that no term has": (
        {"inputs": BOTH, "loss": kd(weight=0.0)},
        {"inputs": BOTH, "loss": kd(weight=0.0, gate=GateConfig(min_confidence=0.5))},
    ),
    "another test text option": ({"inputs": BOTH}, {"inputs": BOTH | {"teacher_predictions": "p"}}),
    "dev that decides nothing": ({"inputs": BOTH | {"dev": "d"}}, {"inputs": BOTH | {"dev": "e"}}),
    "an option that older versions lack": ({"inputs": BOTH}, {"inputs": BOTH, "options": {"gold_epochs": None}}),
}
BEST = ExportConfig(what=ExportedStep.best)
DIFFERENT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "KD weight": ({"inputs": BOTH}, {"inputs": BOTH, "loss": kd(weight=0.3)}),
    "gate": ({"inputs": BOTH}, {"inputs": BOTH, "loss": kd(gate=GateConfig(min_confidence=0.5))}),
    "gate of confidence": (
        {"inputs": BOTH, "loss": confident(0.0)},
        {"inputs": BOTH, "loss": confident(0.5)},
    ),
    "gold set": ({"inputs": BOTH}, {"inputs": BOTH | {"gold": "h"}}),
    "cache": ({"inputs": BOTH}, {"inputs": BOTH | {"cache": "d"}}),
    "learning rate": ({"inputs": BOTH}, {"inputs": BOTH, "steps": 4}),
    "role": ({"inputs": BOTH, "role": Role.combined}, {"inputs": BOTH, "role": Role.weak_only}),
    "dev that decides": (
        {"inputs": BOTH | {"dev": "d"}, "export": BEST},
        {"inputs": BOTH | {"dev": "e"}, "export": BEST},
    ),
}


@pytest.mark.parametrize("name", [*SAME, *DIFFERENT])
def test_settings_are_the_same_where_the_result_cannot_differ(tmp_path: Path, name: str) -> None:
    first, second = (
        the_run(tmp_path / place, **{"role": Role.combined} | settings)
        for place, settings in zip("ab", (SAME | DIFFERENT)[name], strict=True)
    )
    assert (first.settings == second.settings) == (name in SAME)


def test_options_of_an_earlier_version_are_read_as_those_of_today(tmp_path: Path) -> None:
    old = identity_options(TrainConfig(name="combined", gold_fraction=0.5, steps=3, student=StudentConfig(path="m")))
    new_loss = json.loads(json.dumps(old["loss"]))
    old["loss"]["kd"]["overtaken"] = old["loss"]["kd"].pop("adaptive_weight")
    del old["gold_fraction_of"]
    first = the_run(tmp_path / "old", inputs=BOTH, options={"loss": old["loss"]})
    path = tmp_path / "old" / "identity.json"
    identity = json.loads(path.read_text())
    del identity["options"]["gold_fraction_of"]
    path.write_text(json.dumps(identity))
    (first,) = read_runs([str(tmp_path / "old")])
    assert first.settings == the_run(tmp_path / "new", inputs=BOTH, options={"loss": new_loss}).settings


def test_what_is_left_out_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_run(tmp_path / "good", inputs=BOTH)
    make_run(tmp_path / "running", inputs=BOTH, finished=False)
    make_run(tmp_path / "unscored", inputs=BOTH, scores=None)
    (tmp_path / "notes").mkdir()
    with caplog.at_level("INFO", logger="pipeline"):
        (run,) = read_runs([f"{tmp_path}/*"])
    assert run.folder == tmp_path / "good"
    assert f"{tmp_path}/running is not finished: left out" in caplog.text
    assert f"{tmp_path}/unscored is without scores on a test text: left out" in caplog.text
    assert "runs without a role are taken for what they are called: combined" in caplog.text
    assert "notes" not in caplog.text


@pytest.mark.parametrize("is_new", [True, False])
def test_runs_scored_on_different_texts_are_not_compared(tmp_path: Path, is_new: bool) -> None:
    """Wherever the text's hash stands: beside the scores, or in the identity of an earlier version."""

    def scored_on(text: str) -> dict[str, Any]:
        scores = SCORES | ({"text": text} if is_new else {})
        return {"inputs": BOTH | ({} if is_new else {"test": text}), "scores": scores}

    make_run(tmp_path / "a", **scored_on("one"))
    make_run(tmp_path / "b", **scored_on("one"))
    assert len(read_runs([f"{tmp_path}/*"])) == 2
    make_run(tmp_path / "c", **scored_on("two"))
    with pytest.raises(InputError, match="expected one test text, found 2: .*/a, .*/b; .*/c; report them apart"):
        read_runs([f"{tmp_path}/*"])


def test_hashes_of_two_versions_are_not_compared(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The records are, when predictions are joined."""
    make_run(tmp_path / "old", inputs=BOTH)
    make_run(tmp_path / "new", inputs=BOTH, scores=SCORES | {"text": "another kind of hash"})
    with caplog.at_level("INFO", logger="pipeline"):
        assert len(read_runs([f"{tmp_path}/*"])) == 2
    assert "some runs were scored by an earlier version" in caplog.text


def test_nothing_to_report(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected finished run folders with test scores, found none"):
        read_runs([f"{tmp_path}/*"])


def test_the_first_records_of_a_gold_set_are_another_gold_set() -> None:
    """A label curve takes parts of one file: its sizes must not be taken for that of the file."""

    def inputs(take: int | None) -> dict[str, str]:
        read = {"export.what": "last", "early_stopping.patience": 0, "loss.kd.adaptive_weight.every_steps": 0}
        return _inputs({"gold": "a", "student": ["w", "t"], "options": {"gold": {"take": take}}}, read)

    whole, part = inputs(None), inputs(30)
    assert whole["gold"] == "a"
    assert part["gold"] not in ("a", inputs(12)["gold"])
    assert part["student"] == whole["student"]
