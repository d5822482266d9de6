"""Many finished runs -> one table: scores, and how much of the gap was recovered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl

from pipeline.config.options import load_config
from pipeline.config.schema import ReportConfig, TrainConfig
from pipeline.core.files import RunPaths, check_writable, content_hash, matching_paths
from pipeline.core.progress import log, start_logging
from pipeline.core.types import InputError

SCHEMA = {
    "experiment": pl.String,
    "seed": pl.Int64,
    "settings": pl.String,
    "lm_weight": pl.Float64,
    "kd_weight": pl.Float64,
    "gold_fraction": pl.Float64,
    "steps": pl.Int64,
    "num_records": pl.Int64,
    "accuracy": pl.Float64,
    "accuracy_norm": pl.Float64,
    "accuracy_norm_tokens": pl.Float64,
    "num_ties": pl.Int64,
    "exact_match": pl.Float64,
    "standard_error": pl.Float64,
    "nll": pl.Float64,
    "agreement": pl.Float64,
    "pgr": pl.Float64,
    "train_seconds": pl.Float64,
    "run_dir": pl.String,
}
ORDER = ("teacher", "gold_only", "weak_only", "combined", "ceiling")  # as one reads them; others follow


def run(config: ReportConfig) -> pl.DataFrame:
    """Print the table and its conclusions; write report.csv and report.parquet if asked."""
    start_logging()
    if config.out is not None:
        check_writable(Path(config.out), "out")
    folders = sorted({path for pattern in config.runs for path in matching_paths(pattern)})
    table = with_pgr(read_runs(folders, config.runs))
    with pl.Config(tbl_rows=-1, tbl_cols=-1, tbl_width_chars=200, float_precision=4, tbl_hide_dataframe_shape=True):
        print(table.drop(*unprinted_columns(table)))
    for line in conclusions(table):
        print(line)
    if config.out is not None:
        out = Path(config.out)
        table.write_csv(out / "report.csv")
        table.write_parquet(out / "report.parquet")
        log.info("wrote %s and report.parquet beside it", out / "report.csv")
    return table


def read_runs(folders: list[Path], patterns: list[str]) -> pl.DataFrame:
    """One row per finished run with a test score; unfinished ones are named in a warning."""
    rows: list[dict[str, Any]] = []
    tests: dict[str | None, list[str]] = {}
    for paths in (RunPaths(folder=folder) for folder in folders):
        if not paths.config.exists():
            continue
        if not paths.result.exists():
            log.warning("%s is not finished: left out", paths.folder)
            continue
        config = load_config(paths.config, TrainConfig)
        result = json.loads(paths.result.read_text())
        identity = json.loads(paths.identity.read_text())
        rows.append(_row(config, result, identity, paths.folder))
        tests.setdefault(identity.get("test"), []).append(str(paths.folder))
    if not rows:
        raise InputError(f"runs: expected finished run folders, found none in {patterns}; train with scripts/train.py")
    if len(tests) > 1:
        shown = "; ".join(", ".join(folders) for folders in tests.values())
        raise InputError(f"runs: expected one test text, found {len(tests)}: {shown}; report them apart, with runs=")
    rank = pl.col("experiment").replace_strict(ORDER, range(len(ORDER)), default=len(ORDER))
    return pl.DataFrame(rows, schema=SCHEMA).sort(rank, "experiment", "kd_weight", "lm_weight", "seed")


def _row(config: TrainConfig, result: dict[str, Any], identity: dict[str, Any], folder: Path) -> dict[str, Any]:
    test = result.get("test") or {}
    measured = ((test.get("accuracy"), "num_choice_records"), (test.get("exact_match"), "num_free_records"))
    score, count = next(((score, test[count]) for score, count in measured if score is not None), (None, 0))
    return {
        "experiment": config.name,
        "seed": config.seed,
        "settings": content_hash([config.name, {**identity, "options": {**identity["options"], "seed": 0}}])[:8],
        "lm_weight": config.loss.lm.weight,
        "kd_weight": config.loss.kd.weight,
        "gold_fraction": config.gold_fraction,
        "steps": result["steps"],
        "num_records": test.get("num_records"),
        **{name: test.get(name) for name in ("accuracy", "accuracy_norm", "accuracy_norm_tokens", "num_ties")},
        "exact_match": test.get("exact_match"),
        "standard_error": (score * (1 - score) / count) ** 0.5 if score is not None else None,
        "nll": test.get("nll"),
        "agreement": test.get("agreement"),
        "pgr": None,
        "train_seconds": result["train_seconds"],
        "run_dir": str(folder),
    }


def unprinted_columns(table: pl.DataFrame) -> list[str]:
    """What is in the files alone: the width is limited. `num_ties` is printed where there are ties, `accuracy_norm`
    where a run has another accuracy by it, which takes choices of different lengths."""
    columns = ["run_dir", "gold_fraction", "settings", "train_seconds", "accuracy_norm_tokens"]
    if not (table["num_ties"] > 0).any():
        columns.append("num_ties")
    if not (table["accuracy_norm"] != table["accuracy"]).any():
        columns.append("accuracy_norm")
    return columns


def score_column(table: pl.DataFrame) -> str:
    """The column by which experiments are compared: accuracy where the test has choices, else exact match."""
    return "exact_match" if table["accuracy"].is_null().all() else "accuracy"


def mean_score(table: pl.DataFrame, experiment: str) -> float | None:
    """Mean score over the seeds of an experiment, or None if it has no run; refuses to mix settings."""
    column = score_column(table)
    runs = table.filter(pl.col("experiment") == experiment).drop_nulls(column)
    if runs["settings"].n_unique() > 1:
        raise InputError(
            f"runs: expected one setting of {experiment} to measure the gap by, found {runs['settings'].n_unique()}: "
            f"{', '.join(runs['run_dir'])}; name the right ones in runs="
        )
    return float(runs[column].mean()) if len(runs) else None  # type: ignore[arg-type]


def with_pgr(table: pl.DataFrame) -> pl.DataFrame:
    """Fill in the PGR of every student, where there are a teacher and a ceiling to measure the gap."""
    weak, ceiling = mean_score(table, "teacher"), mean_score(table, "ceiling")
    if weak is None or ceiling is None:
        return table
    values = [
        None
        if score is None or experiment == "teacher"
        else performance_gap_recovered(score, weak=weak, ceiling=ceiling)
        for experiment, score in table.select("experiment", score_column(table)).iter_rows()
    ]
    return table.with_columns(pgr=pl.Series(values, dtype=pl.Float64))


def conclusions(table: pl.DataFrame) -> list[str]:
    """The scores that a weak-to-strong result rests on: one line per setting, averaged over its seeds."""
    names = {"teacher": "weak score", "gold_only": "floor", "ceiling": "ceiling"}
    weak, floor, ceiling = (mean_score(table, experiment) for experiment in names)
    means = zip(names.values(), (weak, floor, ceiling), strict=True)
    lines = [f"{name:<12} {value:.4f}" for name, value in means if value is not None]
    column = score_column(table)
    students = table.filter(~pl.col("experiment").is_in(list(names))).drop_nulls(column)
    for (experiment, _), runs in students.group_by("experiment", "settings", maintain_order=True):
        score = float(runs[column].mean())  # type: ignore[arg-type]
        line = f"{experiment:<12} {score:.4f}  lm {runs['lm_weight'][0]:g}, kd {runs['kd_weight'][0]:g}"
        line += f", {len(runs)} seed{'s' * (len(runs) > 1)}"
        if floor is not None:
            line += f"; over the floor {score - floor:+.4f}"
        if weak is not None and ceiling is not None:
            pgr = performance_gap_recovered(score, weak=weak, ceiling=ceiling)
            line += "; PGR undefined: the ceiling is not above the weak score" if pgr is None else f"; PGR {pgr:.3f}"
        lines.append(line)
    return lines


def performance_gap_recovered(score: float, *, weak: float, ceiling: float) -> float | None:
    """PGR = (score - weak) / (ceiling - weak), never clamped (Burns et al. 2023, arXiv 2312.09390, section 3).

    None where the ceiling does not lie above the weak score: there is no gap then.
    """
    if ceiling <= weak:
        return None
    return (score - weak) / (ceiling - weak)
