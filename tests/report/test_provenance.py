"""The cache, the numbers on the diagram, hashes, versions and commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline.analysis.values import Training
from pipeline.core.runtime import environment
from pipeline.report.arms import ArmRuns, group_arms
from pipeline.report.provenance import cache_figures, diagram_counts, provenance
from pipeline.report.records import gold_sizes
from pipeline.report.runs import read_runs
from support.run_folders import NUM_CORPUS, StudyFolder, write_study
from support.simulated_study import STUDENTS, simulate, study_of


@pytest.fixture
def study(tmp_path: Path) -> StudyFolder:
    predictions, text = simulate(study_of(STUDENTS, num_records=10, seeds=1), seed=1)
    return write_study(tmp_path, predictions, text, steps=3)


def arms_of(study: StudyFolder) -> list[ArmRuns]:
    runs = read_runs(study.runs)
    return group_arms(runs, gold_sizes(runs))


def test_the_cache_that_was_read(study: StudyFolder) -> None:
    arms = arms_of(study)
    found = cache_figures(arms, ())
    assert found["num_records"] == NUM_CORPUS
    assert found["num_sequences"] == 750
    assert found["bytes"] == 1_234_567
    assert found["histogram"][-1] == 2500
    assert found["retained_mass"] == pytest.approx((0.65 * 10 + 0.75 * 90 + 0.85 * 400 + 0.95 * 2500) / 3000)
    logged = Training(label="combined", steps=(10, 20), curves={"teacher_tail": (0.02, 0.04)}, seconds=1.0)
    assert cache_figures(arms, [logged])["retained_mass"] == pytest.approx(0.97)


def test_another_cache_is_not_taken_for_it(study: StudyFolder, caplog: pytest.LogCaptureFixture) -> None:
    (manifest,) = study.folder.glob("caches/*/manifest.json")
    plain = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(plain | {"fingerprint": "another"}))
    assert cache_figures(arms_of(study), ()) == {}
    assert "is not the one that was read" in caplog.text
    manifest.write_text(json.dumps(plain | {"num_shards": 2}))
    assert cache_figures(arms_of(study), ()) == {}
    manifest.unlink()
    assert cache_figures(arms_of(study), ()) == {}
    assert caplog.text.count("no figures of the teacher's cache") == 3


def test_the_numbers_on_the_diagram(study: StudyFolder) -> None:
    model = study.run_folders("combined")[0] / "model"
    model.mkdir()
    save_file({"a": torch.zeros(3, 4), "b": torch.zeros(5)}, model / "model.safetensors")
    arms = arms_of(study)
    counts = diagram_counts(arms, cache_figures(arms, ()))
    assert counts == {
        "num_corpus": NUM_CORPUS,
        "num_gold": 500,
        "gold_fraction": 0.1,
        "lm_weight": 1.0,
        "kd_weight": 1.0,
        "temperature": 1.0,
        "num_steps": 3,
        "student": "strong",
        "student_parameters": 17,
        "teacher": "weak",
    }


def test_what_runs_recorded_is_put_together(study: StudyFolder) -> None:
    arms = arms_of(study)
    without = provenance(arms)
    assert without["commands"] == []
    assert without["seconds"] == 0.5 * 3 * 5  # zero_shot took no step
    assert without["num_runs"] == 6
    assert {"student before training", "cache", "gold", "test"} <= without["hashes"].keys()
    recorded = environment()
    assert recorded["versions"]["torch"] == torch.__version__
    assert "cores" in recorded["hardware"]
    for folder in study.run_folders():
        changed = {"command": f"python scripts/train.py {folder.name.split('-')[0]}"}
        (folder / "environment.json").write_text(json.dumps(recorded | changed))
    found = provenance(arms)
    assert len(found["commands"]) == 6
    assert found["hardware"] == recorded["hardware"]
    assert found["versions"]["torch"] == recorded["versions"]["torch"]
