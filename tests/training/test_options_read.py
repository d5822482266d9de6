"""Options that nothing reads make no other run: where the identity says so, the weights are the same bit for bit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.cache import manifest as manifests
from pipeline.config.schema import CaptureConfig, Dtype, ModelConfig, TextConfig
from pipeline.core.files import content_hash
from pipeline.training.options_read import options_read
from support.commands import merged, prepare_run, run_ranks, train_arguments
from support.tiny import manifest_of

Changes = dict[str, Any]

GOLD_ONLY: Changes = {"experiment": "gold_only", "gold_fraction": 1}
WEAK_ONLY: Changes = {"experiment": "weak_only", "gold_fraction": 0}
COMBINED: Changes = {"experiment": "combined"}
ZERO_SHOT: Changes = {"experiment": "zero_shot", "steps": 0}

# (the run, what nothing reads in it)
UNREAD: list[tuple[Changes, Changes]] = [
    (COMBINED, {"student__revision": "main"}),
    (COMBINED, {"k": 8}),
    (COMBINED, {"optimizer__muon_momentum": 0.5, "optimizer__muon_learning_rate": 1, "optimizer__decay_fraction": 0.5}),
    (COMBINED | {"optimizer__schedule": "constant"}, {"optimizer__final_fraction": 0.5}),
    (COMBINED, {"loss__kd__beta": 0.1, "loss__kd__temperature_squared": False, "loss__kd__gate__by": "entropy"}),
    (COMBINED, {"loss__kd__ramp__start_fraction": 0.2, "loss__kd__ramp__end_value": 0.3}),
    (COMBINED, {"loss__hard__take": "likeliest", "loss__hard__ramp__start_value": 2, "cache_weights": "[3]"}),
    (COMBINED, {"loss__confidence__choices": "[' one',' two']", "loss__kd__adaptive_weight__factor": 0.9}),
    (COMBINED, {"early_stopping__min_delta": 0.5, "test__targets": "choices", "dev__end_token": True}),
    (COMBINED, {"loss__hard__on": "[corpus]", "loss__lm__on": "[gold]"}),
    (GOLD_ONLY, {"loss__kd__weight": 0.5, "loss__kd__temperature": 2, "loss__kd__tail_weight": 2}),
    (GOLD_ONLY, {"loss__hard__weight": 1, "loss__confidence__weight": 2, "curriculum_parts": 2, "k": 3}),
    (
        GOLD_ONLY,
        {"loss__kd__control": "shuffled", "loss__kd__gate__min_confidence": 0.9, "gold_fraction_of": "targets"},
    ),
    (GOLD_ONLY, {"loss__lm__on": "[corpus,gold]", "loss__kd__divergence": "reverse_kl"}),
    (WEAK_ONLY, {"loss__lm__weight": 5, "window": 64, "gold__end_token": True, "gold_epochs": 2}),
    (WEAK_ONLY, {"gold_fraction_of": "targets", "loss__lm__ramp__shape": "linear"}),
    (COMBINED | {"loss__kd__weight": 0}, {"loss__kd__temperature": 2, "loss__kd__gate__drop_wrong": True}),
    (COMBINED, {"loss__kd__gate__per_class": True, "loss__kd__position_weight__power": 2}),
    (COMBINED | {"loss__kd__weight": 0}, {"loss__kd__position_weight__by": "margin"}),
]

READ: list[tuple[Changes, Changes]] = [
    (COMBINED, {"k": 3}),
    (COMBINED, {"seed": 2}),
    (COMBINED, {"window": 50}),
    (COMBINED, {"gold_epochs": 2}),
    (COMBINED, {"gold_fraction_of": "targets"}),
    (COMBINED, {"curriculum_parts": 2}),
    (COMBINED, {"loss__lm__weight": 0.5}),
    (COMBINED, {"loss__lm__on": "[gold,corpus]"}),
    (COMBINED, {"loss__kd__temperature": 2}),
    (COMBINED | {"loss__kd__temperature": 2}, {"loss__kd__temperature_squared": False}),
    (COMBINED, {"loss__kd__tail_weight": 2}),
    (COMBINED, {"loss__kd__divergence": "jsd"}),
    (COMBINED | {"loss__kd__divergence": "jsd"}, {"loss__kd__beta": 0.1}),
    (COMBINED, {"loss__kd__control": "shuffled"}),
    (COMBINED | {"loss__kd__weight": 0, "loss__hard__weight": 1}, {"loss__kd__control": "shuffled"}),
    (COMBINED, {"loss__kd__gate__drop_wrong": True}),
    (COMBINED | {"loss__kd__weight": 0, "loss__confidence__weight": 1}, {"loss__kd__gate__min_confidence": 0.2}),
    (COMBINED, {"loss__kd__gate__keep_fraction": 0.5}),
    (COMBINED | {"loss__kd__gate__keep_fraction": 0.5}, {"loss__kd__gate__by": "entropy"}),
    (COMBINED | {"loss__kd__gate__keep_fraction": 0.5}, {"loss__kd__gate__per_class": True}),
    (COMBINED, {"loss__kd__position_weight__by": "margin"}),
    (COMBINED | {"loss__kd__position_weight__by": "margin"}, {"loss__kd__position_weight__power": 2}),
    (COMBINED | {"loss__kd__weight": 0, "loss__hard__weight": 1}, {"loss__kd__position_weight__by": "entropy"}),
    (COMBINED, {"loss__kd__ramp__start_value": 0.5}),
    (COMBINED, {"loss__kd__ramp__shape": "linear"}),
    (COMBINED | {"loss__kd__ramp__shape": "linear"}, {"loss__kd__ramp__end_value": 0.5}),
    (COMBINED | {"loss__hard__weight": 1}, {"loss__hard__take": "likeliest"}),
    (COMBINED | {"loss__confidence__weight": 1}, {"loss__confidence__choices": "[' one',' two']"}),
    (COMBINED | {"optimizer__schedule": "wsd"}, {"optimizer__decay_fraction": 0.5}),
    (COMBINED, {"optimizer__final_fraction": 0.5}),
    (COMBINED | {"evaluate_every_steps": 2, "early_stopping__patience": 1}, {"early_stopping__min_delta": 0.5}),
    (COMBINED | {"evaluate_every_steps": 2, "export__what": "best"}, {"dev__targets": "choices"}),
    (COMBINED | {"evaluate_every_steps": 2}, {"export__what": "best"}),
    (COMBINED, {"loss__kd__adaptive_weight__every_steps": 2}),
    (COMBINED, {"student__path": "owner/name", "student__revision": "main"}),
    (COMBINED, {"student__num_layers": 1}),
    (COMBINED, {"deepspeed__overrides__wall_clock_breakdown": True}),
    (GOLD_ONLY, {"gold__end_token": True}),
    (GOLD_ONLY, {"loss__lm__weight": 0.5}),
    (WEAK_ONLY, {"loss__lm__weight": 5, "loss__lm__on": "[corpus]"}),
    (ZERO_SHOT, {"student__num_layers": 1}),
    (ZERO_SHOT, {"scoring__max_new_tokens": 3}),
    (ZERO_SHOT, {"student__dtype": "bfloat16"}),
]


class Tokenizer(SimpleNamespace):
    """What a manifest reads of a tokenizer."""

    chat_template, eos_token_id = "", 1

    def get_vocab(self) -> dict[str, int]:
        return {"a": 0, "b": 1}


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of which nothing is captured: eight entries a position."""
    folder = tmp_path_factory.mktemp("planned")
    teacher = ModelConfig(path="x", dtype=Dtype.float32)
    config = CaptureConfig(name="x", teacher=teacher, corpus=TextConfig(files=["x"]), k=8)
    manifests.create_cache(folder, manifest_of(config, Tokenizer(), 7, {"corpus": "c"}))
    return folder


def names(changes: Changes) -> str:
    return " ".join(f"{name.replace('__', '.')}={value}" for name, value in changes.items())


def options(cache: Path, *changes: Changes) -> dict[str, Any]:
    """What is read of a short run on the tiny models, with changes to its options."""
    chosen = {name: value for one in changes for name, value in one.items()}
    return options_read(merged(train_arguments(Path("student"), Path("data"), str(cache), **chosen)))


@pytest.mark.parametrize(("base", "changes"), UNREAD, ids=map(str, range(len(UNREAD))))
def test_what_nothing_reads_makes_no_other_run(base: Changes, changes: Changes, planned: Path) -> None:
    assert options(planned, base, changes) == options(planned, base), names(changes)


@pytest.mark.parametrize(("base", "changes"), READ, ids=map(str, range(len(READ))))
def test_what_is_read_does(base: Changes, changes: Changes, planned: Path) -> None:
    found = content_hash(options(planned, base, changes))
    assert found != content_hash(options(planned, base)), names(changes)


def test_without_training_only_the_student_and_its_scoring_count(planned: Path) -> None:
    changes: Changes = {"seed": 7, "loss__lm__weight": 3, "gold_fraction": 0.5, "optimizer__learning_rate": 1}
    changes |= {"window": 100, "student__adapter__rank": 4, "export__what": "best", "evaluate_every_steps": 3}
    assert options(planned, ZERO_SHOT, changes) == options(planned, ZERO_SHOT)


def test_a_term_that_reads_nothing_has_no_weight(planned: Path) -> None:
    """As in the model card and the report: the options of gold_only do not show the weight of a teacher."""
    weights = {name: term["weight"] for name, term in options(planned, GOLD_ONLY)["loss"].items() if type(term) is dict}
    assert weights == {"lm": 1.0, "kd": 0.0, "hard": 0.0, "confidence": 0.0}
    assert options(planned, WEAK_ONLY, {"loss__lm__weight": 5})["loss"]["lm"]["weight"] == 0.0


def test_an_option_that_came_later_is_left_out_where_it_changes_nothing(planned: Path) -> None:
    """So that the runs of before keep their names."""
    assert "tail_weight" not in options(planned, COMBINED)["loss"]["kd"]
    assert options(planned, COMBINED, {"loss__kd__tail_weight": 2})["loss"]["kd"]["tail_weight"] == 2.0


def test_the_k_largest_of_a_cache_with_also_ids_are_not_all_it_keeps(planned: Path, tmp_path: Path) -> None:
    made_of = {**manifests.load_manifest(planned).made_of, "also_ids": {"fingerprints": ["x"], "most_kept": 5}}
    manifest = dataclasses.replace(
        manifests.load_manifest(planned), made_of=made_of, fingerprint=manifests.fingerprint(made_of)
    )
    manifests.create_cache(tmp_path / "also", manifest)
    assert options(planned, COMBINED, {"k": 8})["k"] is None
    assert options(tmp_path / "also", COMBINED, {"k": 8})["k"] == 8


@pytest.mark.slow(minutes=2)
def test_runs_of_one_identity_train_the_same_weights(student: Path, data: Path, cache: Path, tmp_path: Path) -> None:
    """Every pair of UNREAD, trained: the same losses and weights to the last bit."""

    def prepare(name: str, *changes: Changes) -> Path:
        chosen = {name: value for one in changes for name, value in one.items()}
        return prepare_run(tmp_path / name, train_arguments(student, data, str(cache), **{"steps": 4, **chosen}))

    pairs = [
        (prepare(f"{i}-base", base), prepare(f"{i}-changed", base, changes), changes)
        for i, (base, changes) in enumerate(UNREAD)
        if "student__revision" not in changes
    ]
    run_ranks(1, [folder for pair in pairs for folder in pair[:2]])
    for base, changed, changes in pairs:
        losses = [[json.loads(line)["loss"] for line in (run / "metrics.jsonl").open()] for run in (base, changed)]
        assert losses[0] == losses[1], names(changes)
        weights = [(run / "model" / "model.safetensors").read_bytes() for run in (base, changed)]
        assert weights[0] == weights[1], names(changes)
