"""`scripts/study.py preview` on a tiny study, from a cache to the ranking, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from hydra import initialize_config_dir

from pipeline.capture import driver as capture
from pipeline.config.commands import PreviewConfig
from pipeline.config.compose import open_study
from pipeline.config.groups import CONF_DIR
from pipeline.config.schema import Targets, TextConfig
from pipeline.core.types import InputError
from pipeline.data.text_files import open_text
from pipeline.data.tokenize import text_hash
from pipeline.evaluation.requests import held_out_hash
from pipeline.preview import commands, features
from pipeline.preview.recipes import RECIPES
from pipeline.preview.texts import gold_only_on_dev
from support.commands import config_of, script
from support.tiny import LINES, make_model, write_lines
from support.tiny_study import write_tiny_study

LETTERS = ["a", "b", "c"]


def rows(count: int, *, first: int, labeled: bool) -> list[dict[str, Any]]:
    made = []
    for i in range(first, first + count):
        row: dict[str, Any] = {"prompt": f"{LINES[i % 5][: 12 + i % 7]} {i}:"}
        made.append(row | ({"choices": LETTERS, "answer": i % 3} if labeled else {}))
    return made


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any, student: Path) -> Path:
    """A study with a ready-made teacher that is sure of few tokens; its test text does not exist."""
    folder = tmp_path_factory.mktemp("study")
    teacher = make_model(folder / "teacher", tokenizer, seed=2, num_hidden_layers=2)
    model = transformers.AutoModelForCausalLM.from_pretrained(teacher)
    with torch.no_grad():
        model.model.norm.weight.mul_(30)
    model.save_pretrained(teacher)
    write_lines(folder / "corpus.jsonl", rows(90, first=0, labeled=False))
    write_lines(folder / "gold.jsonl", rows(20, first=100, labeled=True))
    write_lines(folder / "dev.jsonl", rows(30, first=200, labeled=True))
    write_tiny_study(folder, teacher=teacher, student=student, data=folder)
    return folder


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    return place


def preview(place: Path, **options: Any) -> Any:
    config = PreviewConfig(study=str(place / "study" / "tiny.yaml"), resamples=2, folds=2, components=16, **options)
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return commands.run(config)


def test_a_study_without_a_cache_names_the_command_that_makes_it(here: Path) -> None:
    with pytest.raises(InputError, match=r"none that fits in caches/tiny-\*; make it: python .*capture\.py study="):
        preview(here)
    content = yaml.safe_load((here / "study" / "tiny.yaml").read_text())
    content |= {"teacher_labels": content["gold"], "allow_shared_records": True}
    (here / "study" / "trained.yaml").write_text(yaml.safe_dump(content))
    with (
        initialize_config_dir(str(CONF_DIR), version_base="1.3"),
        pytest.raises(InputError, match=r"expected the study's teacher, found none; .*experiment=teacher && .*capture"),
    ):
        commands.run(PreviewConfig(study=str(here / "study" / "trained.yaml")))


def test_from_a_cache_to_the_ranking(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Test is never read, models run once, and without dev gold is scored by cross-validation."""
    study = open_study(str(here / "study" / "tiny.yaml"), None)
    corpus = TextConfig(files=study.file.corpus.files, targets=Targets.next, end_token=False)
    capture.run(config_of(here / "teacher", here / "corpus.jsonl", here / "caches", corpus=corpus, k=64))
    assert not (here / "test.jsonl").exists()
    ranked = preview(here)
    shown = capsys.readouterr().out
    assert {one.recipe.name for one in ranked} == {one.name for one in RECIPES}
    scores = [one.accuracy for one in ranked]
    assert scores == sorted(scores, reverse=True)
    assert all(one.gradient < 1e-4 for one in ranked)
    assert f"The best: {ranked[0].recipe.name}." in shown
    assert "scored on dev" in shown
    saved = json.loads((here / "runs" / "preview.json").read_text())
    assert [one["recipe"]["name"] for one in saved["recipes"]] == [one.recipe.name for one in ranked]
    assert [one["accuracy"] for one in saved["recipes"]] == scores
    assert set(LETTERS) <= set(saved["outcomes"])
    assert (saved["num_records"], saved["scored_on"]) == ({"corpus": 90, "gold": 20}, "dev")
    (sidecar,) = (here / "caches").glob("features-*")
    assert sorted(file.name for file in sidecar.iterdir()) == ["features.json", "features.safetensors"]

    assert "Do not rely on this ranking" not in shown
    dev = {"accuracy": max(scores) + 0.01, "text": held_out_hash(study.file.dev, "dev")}
    gold = text_hash(open_text(study.file.gold, "gold"))
    for name, found, learnt in (
        ("stale", dev | {"text": "of another dev"}, gold),
        ("label_curve", dev, "of the ceiling"),
        ("now", dev, gold),
    ):
        (here / "runs" / f"gold_only-{name}").mkdir()
        (here / "runs" / f"gold_only-{name}" / "result.json").write_text(json.dumps({"dev": found}))
        (here / "runs" / f"gold_only-{name}" / "identity.json").write_text(json.dumps({"gold": learnt}))
        assert gold_only_on_dev(study) == (dev["accuracy"] if name == "now" else None)

    monkeypatch.setattr(features, "compute", None)
    assert [(one.recipe.name, one.nll) for one in preview(here)] == [(one.recipe.name, one.nll) for one in ranked]
    assert "Do not rely on this ranking: the study's gold_only run has" in capsys.readouterr().out


def test_without_dev_gold_is_scored(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = here / "study" / "tiny.yaml"
    content = yaml.safe_load(file.read_text())
    del content["dev"]
    (here / "study" / "tiny_without_dev.yaml").write_text(yaml.safe_dump(content))
    config = PreviewConfig(
        study=str(here / "study" / "tiny_without_dev.yaml"), cache="caches/tiny-*", resamples=1, folds=2, components=16
    )
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        commands.run(config)
    assert "scored on gold, by cross-validation on its 20 records: wide intervals" in capsys.readouterr().out
    assert json.loads((here / "runs" / "preview.json").read_text())["scored_on"] == "gold"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overrides": ["loss.kd.weight=3"]}, r"loss\.kd\.weight=3: expected an option of the preview"),
        ({"depths": [0.0, 1.0]}, "depths: expected fractions above 0 and up to 1"),
        ({"max_records": 5}, "max_records: expected at least 50, found 5"),
    ],
)
def test_options_that_contradict_are_refused_before_anything_is_read(
    here: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        preview(here, **options)


def test_help_and_refusals_of_the_command(here: Path) -> None:
    shown = script("study", "preview", "--help", cwd=here).stdout
    assert "Rank recipes (gold, gates, sharper targets, pools) in minutes" in shown
    assert "  resamples = 4\n" in shown
    done = script("study", "preview", "study=nothing", cwd=here, check=False)
    assert done.returncode == 2
    assert "study: expected a file" in done.stderr
