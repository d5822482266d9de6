"""Tidy tables for a notebook: runs, arms, predictions and curves, one fact a row."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import polars as pl

from pipeline.analysis.values import ArmFigures, Interval, StudyFigures, TextFigures, Training
from pipeline.report.arms import ArmRuns
from pipeline.report.predictions import TextPredictions
from pipeline.report.runs import StudyRun, scores_on

SCORES = {
    **dict.fromkeys(("num_records", "num_targets", "num_ties"), pl.Int64),
    **dict.fromkeys(("accuracy", "accuracy_norm", "accuracy_norm_tokens", "exact_match"), pl.Float64),
    **dict.fromkeys(("nll", "perplexity", "agreement"), pl.Float64),
}
RUN_COLUMNS: dict[str, Any] = {
    **dict.fromkeys(("arm", "role", "experiment"), pl.String),
    "seed": pl.Int64,
    "is_main": pl.Boolean,
    **dict.fromkeys(("lm_weight", "kd_weight", "gold_fraction"), pl.Float64),
    "num_gold": pl.Int64,
    "control": pl.String,
    "differing": pl.String,
    "steps": pl.Int64,
    "train_seconds": pl.Float64,
    "text": pl.String,
    **SCORES,
    "run_dir": pl.String,
}
ARM_COLUMNS: dict[str, Any] = {
    **dict.fromkeys(("arm", "role", "text", "metric", "figure", "against", "by", "slice"), pl.String),
    **dict.fromkeys(("value", "low", "high"), pl.Float64),
}
CURVE_COLUMNS: dict[str, Any] = {"arm": pl.String, "step": pl.Int64, "key": pl.String, "value": pl.Float64}
PREDICTION_VALUES = (
    *("record_key", "copy", "answer", "predicted", "num_tied", "correct", "exact", "generated"),
    *("num_targets", "nll_sum", "teacher_predicted", "agreement"),
)


def runs_table(arms: Sequence[ArmRuns], texts: Sequence[TextPredictions]) -> pl.DataFrame:
    """One row for each run and text on which it was scored; `differing` is JSON: options by dotted name."""
    rows = [
        _run_row(of_arm, run, text.name, scores)
        for of_arm in arms
        for run in of_arm.runs
        for text in texts
        if (scores := scores_on(run, text.name)) is not None
    ]
    return pl.DataFrame(rows, schema=RUN_COLUMNS)


def _run_row(of_arm: ArmRuns, run: StudyRun, text: str, scores: Mapping[str, Any]) -> dict[str, Any]:
    arm = of_arm.arm
    return {
        "arm": arm.label,
        "role": arm.role,
        "experiment": run.name,
        "seed": run.seed,
        "is_main": arm.is_main,
        "lm_weight": arm.lm_weight,
        "kd_weight": arm.kd_weight,
        "gold_fraction": arm.gold_fraction,
        "num_gold": arm.num_gold,
        "control": arm.control,
        "differing": json.dumps(dict(arm.differing)),
        "steps": run.result["steps"],
        "train_seconds": run.result["train_seconds"],
        "text": text,
        **{name: scores.get(name) for name in SCORES},
        "run_dir": str(run.folder),
    }


def arms_table(study: StudyFigures) -> pl.DataFrame:
    """One row for each arm, text and figure, with the bounds of its interval."""
    rows = [row for text in (study.main, *study.more) for figures in text.arms for row in _arm_rows(figures, text)]
    return pl.DataFrame(rows, schema=ARM_COLUMNS)


def _arm_rows(figures: ArmFigures, text: TextFigures) -> Iterator[dict[str, Any]]:
    place = {"arm": figures.arm.label, "role": figures.arm.role, "text": text.name, "metric": text.metric}

    def row(name: str, value: Interval | float | None, **where: str) -> Iterator[dict[str, Any]]:
        if isinstance(value, Interval):
            yield place | where | {"figure": name, "value": value.value, "low": value.low, "high": value.high}
        elif value is not None:
            yield place | where | {"figure": name, "value": float(value)}

    for name in ("score", "nll", "num_ties", "pgr"):
        yield from row(name, getattr(figures, name))
    for other in figures.comparisons:
        yield from row("difference", other.difference, against=other.against)
        yield from row("won", other.won, against=other.against)
        yield from row("lost", other.lost, against=other.against)
    for calibration, truth in ((figures.calibration, "truth"), (figures.teacher_calibration, "teacher")):
        for name in ("ece", "brier", "overconfidence") if calibration is not None else ():
            yield from row(name, getattr(calibration, name), against=truth)
    if figures.imitation is not None:
        for name in ("imitation", "correction", "damage", "excess", "agreement", "num_teacher_wrong"):
            yield from row(name, getattr(figures.imitation, name))
    for part in figures.slices:
        for name in ("score", "teacher_score", "imitation", "num_records"):
            yield from row(name, getattr(part, name), by=part.by, slice=part.value)


def predictions_table(arms: Sequence[ArmRuns], texts: Sequence[TextPredictions]) -> pl.DataFrame:
    """One row for each text, run and record."""
    found = []
    for text in texts:
        for of_arm in arms:
            for run in of_arm.runs:
                table = text.tables.get(run.folder)
                if table is not None:
                    found.append(
                        table.select(
                            pl.lit(text.name).alias("text"),
                            pl.lit(of_arm.arm.label).alias("arm"),
                            pl.lit(of_arm.arm.role).alias("role"),
                            pl.lit(run.seed).alias("seed"),
                            *(name for name in PREDICTION_VALUES if name in table.columns),
                        )
                    )
    return pl.concat(found, how="diagonal_relaxed")


def curves_table(training: Sequence[Training]) -> pl.DataFrame:
    """One row for each arm, step and key of metrics.jsonl that has a value there."""
    rows = [
        (of_arm.label, step, key, value)
        for of_arm in training
        for key, values in of_arm.curves.items()
        for step, value in zip(of_arm.steps, values, strict=True)
        if value is not None
    ]
    return pl.DataFrame(rows, schema=CURVE_COLUMNS, orient="row")
