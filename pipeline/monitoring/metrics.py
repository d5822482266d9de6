"""The metrics of a training step, and where they go: metrics.jsonl, the trackers, the progress bar.

A new metric is one more key in `loss_metrics` or `engine_metrics` here. Speed, memory and the health of gradients come
from `health.py`, gradient cosines and agreement from `objective/diagnostics.py`; `take_step` in `training/steps.py`
puts them together and adds what only the loop knows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pipeline.config.schema import TrainConfig
from pipeline.core.files import RunPaths, write_atomically
from pipeline.core.progress import Progress
from pipeline.core.runtime import Ranks
from pipeline.core.types import Batch
from pipeline.monitoring import health
from pipeline.monitoring.trackers import Trackers, tracked_run

StepMetrics = dict[str, Any]
"""What a step logs, by its key in metrics.jsonl."""


def loss_metrics(
    step: int, sums: Mapping[str, float], counts: Mapping[str, float], weights: Mapping[str, float]
) -> StepMetrics:
    """The loss and, of each term, its mean, weight and count; FloatingPointError if the loss is not finite."""
    means = {name: sums[name] / counts[name] if counts[name] else None for name in counts}
    loss = sum(weights[name] * (means[name] or 0.0) for name in counts)
    if not math.isfinite(loss):
        raise FloatingPointError(f"step {step}: expected a finite loss, found {means}; lower the learning rate")
    metrics: StepMetrics = {"step": step, "loss": loss, **means}
    metrics |= {f"{name}_weight": weights[name] for name in counts}
    return metrics | {f"{name}_count": int(count) if count.is_integer() else count for name, count in counts.items()}


def engine_metrics(engine: Any, ranks: Ranks, batches: Sequence[Batch]) -> StepMetrics:
    """The gradient norm and skipped steps of a DeepSpeed engine, and which sequences the step has read.

    `sequences` is the sum of the keys of the global batch modulo 2^64: equal where the same sequences were read,
    however they were dealt to ranks.
    """
    keys = ranks.all_reduce(torch.cat([batch.keys_B for batch in batches]).sum())
    return {
        "grad_norm": float(engine.get_global_grad_norm() or 0.0),
        "skipped_steps": engine.skipped_steps,
        "sequences": f"{int(keys) % 2**64:016x}",
    }


def seconds_of(rows: Iterable[StepMetrics]) -> float:
    """What steps took: themselves, waiting for their data, and the evaluations on dev after them."""
    durations = ("seconds", "data_wait_seconds", "dev_seconds")
    return sum((row.get(name, 0.0) for row in rows for name in durations), 0.0)


class StepLogger:
    """Every rank measures and checks its steps; the first rank alone writes."""

    def __init__(
        self,
        config: TrainConfig,
        paths: RunPaths,
        ranks: Ranks,
        size: health.ModelSize,
        *,
        done: int,
        num_steps: int,
        skipped_steps: int,
    ) -> None:
        quiet, every_seconds = ranks.rank != 0, config.launcher.log_every_seconds
        self._ranks, self._size = ranks, size
        self._progress = Progress(
            config.name, total=num_steps, unit=" steps", done=done, log_every_seconds=every_seconds, quiet=quiet
        )
        self._metrics = None if quiet else MetricsFile(paths.metrics, keep_steps=done)
        self._trackers = Trackers([] if quiet else config.trackers, tracked_run(config, paths), step=done)
        rows = [] if quiet else MetricsFile.read(paths.metrics)
        self._gradients = health.GradientMonitor(
            max_skipped_steps=config.health.max_skipped_steps,
            warn_grad_norm=config.health.warn_grad_norm,
            rows=rows,
            skipped_steps=skipped_steps,
        )
        self._peak = health.peak_flops(ranks.device, config.student.dtype.name)

    def measure(self, metrics: StepMetrics, batches: Sequence[Batch]) -> StepMetrics:
        """The metrics of a step with its health metrics added; FloatingPointError if the run cannot continue."""
        metrics = metrics | health.step_totals(self._ranks, batches, self._size)
        metrics |= health.throughput(metrics, world_size=self._ranks.world_size, peak=self._peak)
        return metrics | self._gradients.check(metrics)

    def append(self, metrics: StepMetrics, *, show: Sequence[str]) -> None:
        """Log one more step: in metrics.jsonl, in the trackers and, the metrics `show`, in the progress bar."""
        if self._metrics is not None:
            self._metrics.append(metrics)
            self._trackers.write(metrics)
        self._progress.advance(1, **{name: metrics[name] for name in show if metrics[name] is not None})

    def close(self) -> None:
        """Close the progress bar, and the trackers once they have sent everything."""
        self._progress.close()
        self._trackers.close()


class MetricsFile:
    """metrics.jsonl: one line for each step; opening it removes the steps after `keep_steps`, to be repeated."""

    def __init__(self, file: Path, *, keep_steps: int) -> None:
        self._file = file
        rows = self.read(file) if file.exists() else []
        write_atomically(file, "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= keep_steps))

    @staticmethod
    def read(file: Path) -> list[dict[str, Any]]:
        """All complete lines; a crash may have cut the last one short."""
        complete = [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
        return [json.loads(line) for line in complete]

    def append(self, metrics: StepMetrics) -> None:
        """Append one step."""
        with self._file.open("a") as file:
            file.write(json.dumps(metrics) + "\n")
