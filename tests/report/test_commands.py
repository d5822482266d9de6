"""The whole report of simulated studies, from run folders to files."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import polars as pl
import pytest

from pipeline.analysis.values import ArmFigures, StudyFigures
from pipeline.config.commands import ReportConfig
from pipeline.core.types import InputError
from pipeline.report.commands import run
from pipeline.report.study_figures import of_study
from support.run_folders import StudyFolder, write_study
from support.simulated_study import STUDENTS, TrueArm, simulate, study_of

RATES = (1e-5, 1e-4)
KD_WEIGHTS = (0.0, 0.3)
GOLD_SIZES = {50: 0.66, 500: 0.76, 2000: 0.86}
FIXED = [arm for arm in STUDENTS if arm.role in ("zero_shot", "weak_only", "ceiling")]
CURVE = [
    TrueArm(role="gold_only", label=f"gold_only {size}", accuracy=accuracy, imitation=0.12, num_gold=size, seeds=2)
    for size, accuracy in GOLD_SIZES.items()
]
GRID = [
    TrueArm(
        role="combined",
        label=f"combined {kd} {rate}",
        accuracy=0.8 + 0.02 * kd,
        imitation=0.3,
        correction=0.5,
        num_gold=500,
        seeds=2,
        kd_weight=kd,
        differing=(("optimizer.learning_rate", rate),),
    )
    for kd in KD_WEIGHTS
    for rate in RATES
]
CONTROL = TrueArm(role="control", accuracy=0.75, imitation=0.13, num_gold=500, seeds=2, control="shuffled")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> StudyFolder:
    """All that a study may have: a grid, a curve of gold sets, a control, a run without a role, a further text."""
    students = [*FIXED, *CURVE, *GRID, CONTROL]
    predictions, text = simulate(study_of(students, num_records=300), seed=1)
    further, far = simulate(study_of(students, num_records=100), seed=2)
    folder = write_study(tmp_path_factory.mktemp("study"), predictions, text, steps=20, more={"news": (further, far)})
    own = shutil.copytree(folder.run_folders("weak_only")[0], folder.folder / "runs" / "mine")
    config = (own / "config.yaml").read_text().replace("name: weak_only", "name: mine").replace("role: weak_only", "")
    (own / "config.yaml").write_text(config)
    identity = json.loads((own / "identity.json").read_text())
    identity["options"]["name"] = "mine"
    (own / "identity.json").write_text(json.dumps(identity))
    return folder


@pytest.fixture(scope="module")
def reported(study: StudyFolder, tmp_path_factory: pytest.TempPathFactory) -> tuple[StudyFigures, Path]:
    out = tmp_path_factory.mktemp("report")
    command = "python scripts/study.py study=mine"
    return run(ReportConfig(runs=study.runs, out=str(out), study="mine", command=command)), out


def arm(figures: StudyFigures, label: str) -> ArmFigures:
    return next(one for one in figures.main.arms if one.arm.label == label)


def test_the_command_names_the_study_of_the_runs() -> None:
    """So that the printed one can be run; a study that the command names already stays."""
    assert of_study("python scripts/study.py", "my study") == "python scripts/study.py study='my study'"
    own = "python scripts/study.py 'study=mine.yaml' seeds=1,2"
    assert of_study(own, "mine") == own
    assert of_study("python scripts/study.py", None) == "python scripts/study.py"
    with pytest.raises(InputError, match="command: expected a command line"):
        of_study("python 'scripts", "mine")


def test_every_part_of_a_study_is_reported(reported: tuple[StudyFigures, Path]) -> None:
    figures, _ = reported
    assert figures.name == "mine"
    assert len(figures.main.arms) == 1 + len(FIXED) + len(CURVE) + len(GRID) + 2
    assert {one.arm.role for one in figures.main.arms if one.arm.is_main} == {
        *("teacher", "zero_shot", "gold_only", "weak_only", "combined", "ceiling", "control")
    }
    assert arm(figures, "mine").arm.role == "other"
    assert arm(figures, "combined kd 0.3 lr 1e-05").arm.differing == {
        "loss.kd.weight": 0.3,
        "optimizer.learning_rate": 1e-5,
    }
    assert arm(figures, "gold_only gold 500").arm.is_main
    assert figures.label_saving is not None
    assert figures.label_saving.sizes == tuple(GOLD_SIZES)
    assert figures.label_saving.num_gold == 500
    (news,) = figures.more
    assert (news.name, news.num_records, len(news.arms)) == ("news", 100, len(figures.main.arms))
    assert {example.kind for example in figures.examples} == {"copied", "corrected", "damaged"}
    labels = {one.label for one in figures.training}
    assert labels == {one.arm.label for one in figures.main.arms} - {"zero_shot"}
    assert figures.cache["num_records"] == 3000
    assert all(one.nll is not None and one.nll > 0 for one in figures.main.arms)


def test_the_tables_hold_what_the_figures_hold(reported: tuple[StudyFigures, Path], study: StudyFolder) -> None:
    figures, out = reported
    runs, arms, predictions, curves = (
        pl.read_parquet(out / f"{name}.parquet") for name in ("runs", "arms", "predictions", "curves")
    )
    num_runs = len(study.run_folders())
    assert runs.height == 2 * num_runs
    assert predictions.height == (300 + 100) * num_runs
    on_test = pl.col("text") == "test"
    of_runs = runs.filter(on_test).group_by("arm").agg(pl.col("accuracy").mean())
    of_predictions = predictions.filter(on_test).group_by("arm").agg(pl.col("correct").mean())
    scores = arms.filter(on_test & (pl.col("figure") == "score") & pl.col("slice").is_null())
    expected = {one.arm.label: one.score.value for one in figures.main.arms}
    for found in (of_runs, of_predictions, scores.select("arm", "value")):
        assert {label: pytest.approx(value) for label, value in found.iter_rows()} == expected
    assert (scores["low"] <= scores["value"]).all()
    assert set(curves["arm"]) == {one.label for one in figures.training}
    (against,) = arms.filter(
        on_test & (pl.col("arm") == "weak_only") & (pl.col("against") == "teacher") & (pl.col("figure") == "difference")
    )["value"]
    assert against == pytest.approx(expected["weak_only"] - expected["teacher"])


def test_page_and_markdown_are_written(reported: tuple[StudyFigures, Path]) -> None:
    _, out = reported
    assert {"report.html", "report.md", "figures"} < {path.name for path in out.iterdir()}
    assert "combined kd 0.3 lr 1e-05" in (out / "report.html").read_text()
    assert "python scripts/study.py study=mine " in (out / "report.md").read_text()


def test_a_kept_copy_is_small_and_reports_the_same(
    reported: tuple[StudyFigures, Path], study: StudyFolder, tmp_path: Path
) -> None:
    """Every score, difference and gap to the last bit; calibration but for the rounding."""
    run(ReportConfig(runs=study.runs, keep=str(tmp_path / "kept"), study="mine"))
    again = run(ReportConfig(runs=[f"{tmp_path}/kept/*"], study="mine"))
    for kept, found in ((again.main, reported[0].main), *zip(again.more, reported[0].more, strict=True)):
        assert len(kept.arms) == len(found.arms)
        for one, other in zip(kept.arms, found.arms, strict=True):
            assert (one.arm, one.score, one.comparisons, one.pgr) == (
                other.arm,
                other.score,
                other.comparisons,
                other.pgr,
            )
            assert (one.nll, one.imitation) == (other.nll, other.imitation)
            assert (one.calibration is None) == (other.calibration is None)
            if one.calibration is not None and other.calibration is not None:
                assert one.calibration.ece == pytest.approx(other.calibration.ece, abs=0.01)
    folders = sorted((tmp_path / "kept").iterdir())
    assert {path.name for folder in folders for path in folder.iterdir()} <= {
        *("config.yaml", "identity.json", "environment.json", "result.json"),
        *("predictions-test.parquet", "predictions-news.parquet"),
    }


def test_a_kept_copy_is_never_replaced(study: StudyFolder, tmp_path: Path) -> None:
    """What a committed table was made from stays, and what is new joins it."""
    first = study.run_folders("weak_only")[0]
    run(ReportConfig(runs=study.runs, keep=str(tmp_path), study="mine"))
    (tmp_path / first.name / "result.json").write_text("as it was")
    shutil.rmtree(tmp_path / study.run_folders("ceiling")[0].name)
    run(ReportConfig(runs=study.runs, keep=str(tmp_path), study="mine"))
    assert (tmp_path / first.name / "result.json").read_text() == "as it was"
    assert (tmp_path / study.run_folders("ceiling")[0].name / "result.json").exists()


def test_nothing_is_written_where_nobody_asked(
    study: StudyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    before = sorted(study.folder.rglob("*"))
    monkeypatch.chdir(tmp_path)
    run(ReportConfig(runs=study.runs))
    assert list(tmp_path.iterdir()) == []
    assert sorted(study.folder.rglob("*")) == before
    shown = capsys.readouterr().out.splitlines()
    assert max(map(len, shown)) <= 80
    assert sum("kd" in line and "lr" in line for line in shown) >= 1
    assert any(line.startswith("combined - gold_only") for line in shown)


def test_a_folder_that_cannot_be_written_is_refused_before_the_runs_are_read(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="out: expected a folder to write into, found Not a directory"):
        run(ReportConfig(runs=[str(tmp_path / "none")], out=str(tmp_path / "file" / "out")))


@pytest.mark.alone
@pytest.mark.slow(minutes=3)
def test_200_runs_are_reported_in_20_seconds(tmp_path: Path) -> None:
    """Of 1,500 records and 200 steps each, with the page and all files; `run` alone, without the start of Python."""
    weights = [0.02 * 1.3**index for index in range(13)]
    grid = [
        TrueArm(
            role="combined",
            label=f"combined {kd} {rate}",
            accuracy=0.83,
            imitation=0.3,
            correction=0.5,
            num_gold=500,
            seeds=5,
            kd_weight=kd,
            differing=(("optimizer.learning_rate", rate),),
        )
        for kd in weights
        for rate in (1e-5, 3e-5, 1e-4)
    ]
    predictions, text = simulate(study_of([*FIXED, CURVE[1], *grid], num_records=1500), seed=1)
    study = write_study(tmp_path, predictions, text, steps=200)
    assert len(study.run_folders()) >= 200
    started = time.perf_counter()
    run(ReportConfig(runs=study.runs, out=str(tmp_path / "report")))
    assert time.perf_counter() - started < 20.0
    assert (tmp_path / "report" / "report.html").stat().st_size < 5_000_000
