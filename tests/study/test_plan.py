"""Which runs a study has: seeds, grid, controls, label curve; the command line as people type it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config.commands import StudyConfig
from pipeline.config.compose import open_study, study_arguments
from pipeline.config.schema import Control
from pipeline.core.types import InputError
from pipeline.study.plan import Job, student_jobs, teacher_job
from support.commands import composed

DEMO = open_study("demo", None)


def labels(**options: object) -> list[str]:
    return [job.label for job in student_jobs(StudyConfig(study="demo", **options), DEMO)]  # type: ignore[arg-type]


def test_every_student_has_every_seed_and_the_untrained_one_is_scored_once() -> None:
    assert labels(seeds=[1, 2]) == [
        "zero_shot seed 1",
        *(f"{name} seed {seed}" for name in ("gold_only", "weak_only", "combined", "ceiling") for seed in (1, 2)),
    ]
    assert teacher_job(DEMO).experiment == "teacher"


def test_grid_controls_few_shot_and_label_curve() -> None:
    found = labels(
        experiments=["combined"],
        grid=["kd_weight:0,0.3", "temperature:1,2"],
        controls=[Control.shuffled],
        few_shot=4,
        label_curve=[20],
        overrides=["epochs=4"],
    )
    assert found[0] == "few_shot scoring.few_shot=4 seed 1"
    grid = [f"combined epochs=4 kd_weight={kd} temperature={t} seed 1" for kd in ("0", "0.3") for t in ("1", "2")]
    assert found[1:] == [
        "combined epochs=4 seed 1",
        *grid,
        "shuffled epochs=4 seed 1",
        "gold_only epochs=4 gold.take=20 seed 1",
    ]
    (curve,) = [
        job
        for job in student_jobs(StudyConfig(study="demo", label_curve=[20]), DEMO)
        if "gold.take=20" in job.overrides
    ]
    assert "gold.files=['data/demo/ceiling.jsonl']" in curve.overrides


def test_a_grid_is_refused_without_values() -> None:
    with pytest.raises(InputError, match="grid: expected OPTION:VALUE,VALUE,..., found 'kd_weight'"):
        labels(grid=["kd_weight"])


def test_the_command_line_as_people_type_it() -> None:
    typed = ["seeds=1,2", "grid=kd_weight:0,0.3;temperature:1,2", "controls=shuffled", "loss.kd.weight=0.3", "epochs=4"]
    config = composed("study", "study=demo", *study_arguments(typed))
    assert config.seeds == [1, 2]
    assert config.grid == ["kd_weight:0,0.3", "temperature:1,2"]
    assert config.controls == [Control.shuffled]
    assert config.overrides == ["loss.kd.weight=0.3", "epochs=4"]
    assert config.command == "python scripts/study.py study=demo"
    listed = composed(
        "study", "study=demo", *study_arguments(["seeds=[3]", "dry_run=true", "'gold.files=[a b.jsonl]'"])
    )
    assert (listed.seeds, listed.dry_run) == ([3], True)


@pytest.mark.parametrize("overrides", [(), ("loss.kd.weight=0.3",), ("gold.files=['a,b.jsonl']",)])
def test_a_job_is_a_command_that_composes(overrides: tuple[str, ...]) -> None:
    job = Job(experiment="combined", seed=3, overrides=overrides)
    config = composed("train", "study=demo", *job.arguments)
    assert (config.role.name, config.seed) == ("combined", 3)
    if overrides and overrides[0].startswith("gold"):
        assert config.gold.files == ["a,b.jsonl"]


def test_a_study_from_a_folder_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "study").mkdir()
    text = "teacher: {path: w}\nstudent: {path: s}\ncorpus: {files: [c]}\ngold: {files: [g]}\ntest: {files: [t]}\n"
    (tmp_path / "study" / "mine.yaml").write_text(text)
    study = open_study("mine", str(tmp_path))
    assert study.command == f"python scripts/study.py study=mine --config-dir {tmp_path}"
    assert teacher_job(study).experiment == "teacher_as_is"
    assert [job.experiment for job in student_jobs(StudyConfig(study="mine"), study)] == [
        *("zero_shot", "gold_only", "weak_only", "combined")  # no ceiling without its text
    ]
