"""What each evaluation on dev logs about the teacher, and that it changes nothing else."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.core.files import RunPaths
from pipeline.core.runtime import Ranks
from pipeline.core.types import InputError
from pipeline.models.loading import load_model
from pipeline.models.tokenizer import open_tokenizer
from pipeline.training import identity
from pipeline.training.dev_evaluation import evaluate_dev, open_dev
from pipeline.training.identity import identity_of
from pipeline.training.inputs import save_inputs
from pipeline.training.run import TrainState
from support.commands import merged, train_arguments
from support.scoring import scored
from support.tiny import write_lines


@pytest.fixture(autouse=True)
def without_the_check_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "check_model", lambda config, tokenizer: None)  # takes a second


def figures_of(student: Path, data: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    """What a look at dev logs after step 2."""
    gold_only = {"experiment": "gold_only", "gold_fraction": 1, "evaluate_every_steps": 2, **changes}
    config, paths = merged(train_arguments(student, data, "null", **gold_only)), RunPaths(folder=folder)
    folder.mkdir()
    save_inputs(paths, identity_of(config)[1])
    ranks = Ranks(rank=0, world_size=1, device=torch.device("cpu"))
    model = load_model(student, dtype="float32", device=ranks.device)
    engine = SimpleNamespace(module=SimpleNamespace(student=model))
    dev = open_dev(config, paths, open_tokenizer(config.student)[1])
    run: Any = SimpleNamespace(config=config, dev=dev, engine=engine, ranks=ranks)
    assert evaluate_dev(run, TrainState(step=1))[1] == {}
    return evaluate_dev(run, TrainState(step=2))[1]


def test_imitation_and_agreement_are_logged(student: Path, teacher: Path, data: Path, tmp_path: Path) -> None:
    """As counted from both models' predictions, record by record."""
    _, theirs = scored(teacher, data / "dev.jsonl", end_token=False)
    _, ours = scored(student, data / "dev.jsonl", end_token=False)
    theirs.write_parquet(tmp_path / "predictions-dev.parquet")
    file = {"scoring__teacher_dev_predictions": tmp_path / "predictions-*.parquet"}
    found = figures_of(student, data, tmp_path / "run", **file)
    pairs = list(zip(ours["predicted"], theirs["predicted"], ours["answer"], strict=True))
    wrong = [ours == theirs for ours, theirs, answer in pairs if theirs != answer]
    assert found["dev_agreement"] == sum(ours == theirs for ours, theirs, _ in pairs) / len(pairs)
    assert found["dev_imitation"] == sum(wrong) / len(wrong)
    assert 0 < len(wrong) < len(pairs)
    without = figures_of(student, data, tmp_path / "without")
    assert found.keys() - without.keys() == {"dev_agreement", "dev_imitation"}
    times = ("dev_seconds", "dev_agreement", "dev_imitation")
    assert {key: value for key, value in found.items() if key not in times} == {
        key: value for key, value in without.items() if key not in times
    }


def test_predictions_of_another_text_are_refused(student: Path, teacher: Path, data: Path, tmp_path: Path) -> None:
    """In a run that looks at dev; another one does not read them. A dev without choices has nothing to compare."""
    scored(teacher, data / "test.jsonl", end_token=False)[1].write_parquet(tmp_path / "theirs.parquet")
    file = {"scoring__teacher_dev_predictions": tmp_path / "theirs.parquet"}
    gold_only = {"experiment": "gold_only", "gold_fraction": 1, **file}
    looking = merged(train_arguments(student, data, "null", **gold_only, evaluate_every_steps=2))
    with pytest.raises(InputError, match="expected the teacher's prediction for each of 10 records, found none for 10"):
        identity_of(looking)
    blind = merged(train_arguments(student, data, "null", **gold_only))
    base = identity_of(blind)[0]
    blind.scoring.teacher_dev_predictions = None
    assert identity_of(blind)[0] == base
    free = write_lines(tmp_path / "free.jsonl", [{"prompt": "the weak", "completion": " one"}])
    assert "dev_agreement" not in figures_of(student, data, tmp_path / "run", dev__files=f"[{free}]", **file)
