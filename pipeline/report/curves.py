"""metrics.jsonl of an arm's runs -> curves over the steps, means over the seeds."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from pipeline.analysis.values import Training
from pipeline.report.arms import ArmRuns

MAX_POINTS = 200
"""Points of a curve: a longer one is the means of as many equal parts."""
MAX_PARSED = 4000
"""Lines of a file that are read as numbers: of more, every n-th and all with an evaluation on dev."""
NOT_CURVES = frozenset(
    {
        *("step", "sequences", "skipped_steps", "tokens", "model_flops", "peak_memory_bytes", "seconds"),
        *("data_wait_seconds", "data_wait_fraction", "dev_seconds", "tokens_per_second", "mfu", "stopped_early"),
        *("best_step", "evaluations_since_best", "own_class_fractions", "teacher_class_fractions"),
    }
)
"""Keys of metrics.jsonl that describe the machine or the bookkeeping and not what the student learns."""

Row = dict[str, Any]


def training_of(of_arm: ArmRuns) -> Training | None:
    """The curves of an arm; None where its runs took no step, or their metrics are gone."""
    files = [run.paths.metrics for run in of_arm.runs]
    rows = [row for file in files if file.exists() for row in read_rows(file)]
    if not rows:
        return None
    steps, curves = mean_curves(rows)
    return Training(
        label=of_arm.arm.label,
        steps=steps,
        curves=curves,
        seconds=fmean(run.result["train_seconds"] for run in of_arm.runs),
    )


def read_rows(file: Path) -> list[Row]:
    """The complete lines of a metrics.jsonl; of a very long one a part."""
    lines = [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
    stride = -(-len(lines) // MAX_PARSED)
    return [json.loads(line) for number, line in enumerate(lines) if number % max(stride, 1) == 0 or '"dev_' in line]


def mean_curves(rows: Sequence[Row]) -> tuple[tuple[int, ...], dict[str, tuple[float | None, ...]]]:
    """The last step of each part of the run, and by key the mean over all seeds' rows in it; None without any.

    A value that is not finite, as the nll of a text of which a target has probability 0, counts as none.
    """
    last = max(row["step"] for row in rows)
    width = max(last / MAX_POINTS, 1.0)
    values: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    ends: dict[int, int] = {}
    for row in rows:
        part = int((row["step"] - 1) // width)
        ends[part] = max(ends.get(part, 0), row["step"])
        for name, value in row.items():
            is_curve = name not in NOT_CURVES and not name.endswith("_count")
            if is_curve and isinstance(value, (int, float)) and math.isfinite(value):
                values[name][part].append(value)
    parts = sorted(ends)
    curves = {
        name: tuple(fmean(found[part]) if part in found else None for part in parts)
        for name, found in sorted(values.items())
    }
    return tuple(ends[part] for part in parts), curves
