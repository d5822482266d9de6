"""Run folders -> one table; what is not finished is named; the gap is never clamped."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from pipeline.config.options import identity_options, save_config
from pipeline.config.schema import KdConfig, LossConfig, ReportConfig, StudentConfig, TrainConfig
from pipeline.core.types import InputError
from pipeline.evaluation.report import performance_gap_recovered, run


def make_run(
    folder: Path,
    name: str,
    accuracy: float | None,
    *,
    seed: int = 1,
    kd_weight: float = 1.0,
    exact_match: float | None = None,
    **scores: float,
) -> None:
    run_folder = folder / f"{name}-{seed}-{kd_weight}"
    run_folder.mkdir(parents=True)
    config = TrainConfig(
        name=name,
        seed=seed,
        student=StudentConfig(path="m"),
        gold_fraction=1.0,
        steps=3,
        loss=LossConfig(kd=KdConfig(weight=kd_weight)),
    )
    save_config(config, run_folder / "config.yaml")
    if accuracy is not None or exact_match is not None:
        test: dict[str, Any] = {"num_records": 1000, "nll": 0.5, "agreement": None}
        test |= {"num_choice_records": 1000, "accuracy": accuracy}
        test |= {"num_free_records": 400, "exact_match": exact_match, **scores}
        identity = {"options": identity_options(config), "test": "same"}
        (run_folder / "identity.json").write_text(json.dumps(identity))
        (run_folder / "result.json").write_text(json.dumps({"steps": 3, "train_seconds": 1.5, "test": test}))


def test_table_pgr_and_files(tmp_path: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture) -> None:
    for name, accuracy in {"ceiling": 0.9, "teacher": 0.7, "weak_only": 0.75, "mine": 0.72, "combined": 0.65}.items():
        make_run(tmp_path / "runs", name, accuracy)
    make_run(tmp_path / "runs", "combined", 0.95, seed=2)
    make_run(tmp_path / "runs", "gold_only", 0.6)
    make_run(tmp_path / "runs", "combined", None, kd_weight=0.5)
    (tmp_path / "runs" / "notes").mkdir()
    table = run(ReportConfig(runs=[f"{tmp_path}/runs/*"], out=str(tmp_path / "out")))
    shown = capsys.readouterr()
    assert "combined-1-0.5 is not finished: left out" in shown.err
    assert table["experiment"].to_list() == [
        *("teacher", "gold_only", "weak_only", "combined", "combined", "ceiling", "mine")
    ]
    pgr = dict(zip(table["experiment"] + table["seed"].cast(pl.String), table["pgr"], strict=True))
    assert pgr["teacher1"] is None
    assert pgr["ceiling1"] == pytest.approx(1.0)
    assert pgr["combined1"] == pytest.approx(-0.25)  # below the teacher: not clamped
    assert pgr["combined2"] == pytest.approx(1.25)  # above the ceiling: not clamped
    assert "combined     0.8000  lm 1, kd 1, 2 seeds; over the floor +0.2000; PGR 0.500" in shown.out
    columns = {"experiment", "seed", "kd_weight", "accuracy", "nll", "num_records", "run_dir"}
    for read, name in ((pl.read_csv, "report.csv"), (pl.read_parquet, "report.parquet")):
        found = read(tmp_path / "out" / name)
        assert columns <= set(found.columns)
        assert found.height == 7
    logging.getLogger().handlers.clear()


def test_settings_are_never_averaged_into_one_number(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name, accuracy in {"teacher": 0.6, "ceiling": 1.0}.items():
        make_run(tmp_path, name, accuracy)
    for kd_weight, accuracy in {0.0: 0.6, 0.5: 0.8, 1.0: 0.9}.items():
        make_run(tmp_path, "combined", accuracy, kd_weight=kd_weight)
    run(ReportConfig(runs=[f"{tmp_path}/*"]))
    output = capsys.readouterr().out
    for kd_weight, pgr in {"0": "0.000", "0.5": "0.500", "1": "0.750"}.items():
        assert f"kd {kd_weight}, 1 seed; PGR {pgr}" in output
    make_run(tmp_path, "teacher", 0.7, kd_weight=0.5)
    with pytest.raises(InputError, match="expected one setting of teacher to measure the gap by, found 2"):
        run(ReportConfig(runs=[f"{tmp_path}/*"]))


def test_without_choices_exact_match_measures_the_gap(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name, exact_match in {"teacher": 0.2, "ceiling": 0.6, "combined": 0.5}.items():
        make_run(tmp_path, name, None, exact_match=exact_match)
    table = run(ReportConfig(runs=[f"{tmp_path}/*"]))
    assert table["accuracy"].to_list() == [None] * 3
    assert table["exact_match"].to_list() == [0.2, 0.5, 0.6]
    assert table["standard_error"][1] == pytest.approx(0.025)
    assert table["pgr"].to_list() == [None, pytest.approx(0.75), pytest.approx(1.0)]
    assert "combined     0.5000  lm 1, kd 1, 1 seed; PGR 0.750" in capsys.readouterr().out


def test_ties_and_normalised_accuracy_are_printed_where_they_say_something(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    make_run(tmp_path, "teacher", 0.6)  # of an earlier version: neither is known
    make_run(tmp_path, "combined", 0.7, accuracy_norm=0.7, accuracy_norm_tokens=0.7, num_ties=0)
    table = run(ReportConfig(runs=[f"{tmp_path}/*"]))
    shown = capsys.readouterr().out
    assert "accuracy_norm" not in shown
    assert "num_ties" not in shown
    make_run(tmp_path, "ceiling", 0.8, accuracy_norm=0.625, accuracy_norm_tokens=0.75, num_ties=21)
    table = run(ReportConfig(runs=[f"{tmp_path}/*"]))
    assert table["accuracy_norm"].to_list() == [None, 0.7, 0.625]
    assert table["accuracy_norm_tokens"].to_list() == [None, 0.7, 0.75]
    assert table["num_ties"].to_list() == [None, 0, 21]
    lines = capsys.readouterr().out.splitlines()
    (header,) = (line for line in lines if "experiment" in line)
    names = [name.strip() for name in header.split("┆")]
    assert names[6:9] == ["accuracy", "accuracy_norm", "num_ties"]
    (ceiling,) = (line for line in lines if line.startswith("│ ceiling"))
    assert [cell.strip() for cell in ceiling.split("┆")][6:9] == ["0.8000", "0.6250", "21"]
    assert max(map(len, lines)) <= 200


def test_runs_scored_on_different_texts_are_not_compared(tmp_path: Path) -> None:
    make_run(tmp_path, "teacher", 0.6)
    make_run(tmp_path, "ceiling", 0.9)
    (path,) = tmp_path.glob("ceiling*/identity.json")
    path.write_text(path.read_text().replace("same", "other"))
    with pytest.raises(InputError, match="expected one test text, found 2"):
        run(ReportConfig(runs=[f"{tmp_path}/*"]))


def test_nothing_to_report(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected finished run folders, found none"):
        run(ReportConfig(runs=[f"{tmp_path}/*"]))


def test_no_gap_is_no_ratio() -> None:
    assert performance_gap_recovered(0.8, weak=0.7, ceiling=0.9) == pytest.approx(0.5)
    assert performance_gap_recovered(0.8, weak=0.7, ceiling=0.7) is None


def test_a_folder_that_cannot_be_written_is_refused_before_the_runs_are_read(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="out: expected a folder to write into, found Not a directory"):
        run(ReportConfig(runs=[str(tmp_path / "none")], out=str(tmp_path / "file" / "out")))
