"""Small copies of finished runs for version control: options, scores, a row for each test record; no weights.

The report reads a copy as it reads the run, so a table can be made again, and added to, long after the runs are gone.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import polars as pl

from pipeline.core.files import atomic_folder
from pipeline.core.progress import log
from pipeline.report.arms import ArmRuns
from pipeline.report.pools import keep_pool
from pipeline.report.predictions import TextPredictions
from pipeline.report.runs import StudyRun

DECIMALS = 2  # of the log-probabilities of choices, nats: a record may change its bin of a calibration curve
LEFT_OUT = tuple(f"{name}_{by}" for name in ("predicted", "num_tied", "correct") for by in ("norm", "norm_tokens"))
"""Columns that the report does not read; their means stand in result.json."""
COMPRESSION_LEVEL = 19


def keep_runs(arms: Sequence[ArmRuns], texts: Sequence[TextPredictions], folder: Path) -> list[Path]:
    """Copy each run into `folder`, under its own name; one that is there already stays as it is. Returns the new ones.

    choice_log_probs are rounded to `DECIMALS`; all else that the report reads is copied exactly, but for metrics.jsonl:
    a copy has no curves.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = [text.name for text in texts]
    runs = [run for of_arm in arms for run in of_arm.runs]
    missing = [(run, folder / run.folder.name) for run in runs if not (folder / run.folder.name).exists()]
    for run, copy in missing:
        keep_run(run, copy, names)
    log.info("kept %d runs in %s; %d were there already", len(missing), folder, len(runs) - len(missing))
    return [copy for _, copy in missing]


def keep_run(run: StudyRun, copy: Path, texts: Sequence[str]) -> None:
    """Write the copy of one run, with its predictions on these texts."""
    paths = run.paths
    with atomic_folder(copy) as unfinished:
        unfinished.mkdir()
        keep_pool(unfinished, run.pool)
        for path in (paths.config, paths.identity, paths.environment, paths.result):
            if path.exists():  # runs of early versions have no environment.json
                shutil.copyfile(path, unfinished / path.name)
        for path in filter(Path.exists, map(paths.predictions, texts)):
            smaller(pl.read_parquet(path)).write_parquet(
                unfinished / path.name, compression="zstd", compression_level=COMPRESSION_LEVEL
            )


def smaller(table: pl.DataFrame) -> pl.DataFrame:
    """The predictions of a run with fewer bytes: without `LEFT_OUT`, log-probabilities of choices rounded."""
    kept = table.drop(name for name in LEFT_OUT if name in table.columns)
    if "choice_log_probs" not in kept.columns:
        return kept
    rounded = pl.col("choice_log_probs").list.eval(pl.element().round(DECIMALS).cast(pl.Float32))
    return kept.with_columns(rounded)
