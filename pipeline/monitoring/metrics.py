"""What is logged at every training step: a line of metrics.jsonl, the trackers, the progress bar."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.config.schema import TrainConfig
from pipeline.core.files import RunPaths, write_atomically
from pipeline.core.progress import Progress
from pipeline.core.runtime import Ranks
from pipeline.core.types import Batch
from pipeline.monitoring import health
from pipeline.monitoring.trackers import Trackers


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
        self._trackers = Trackers([] if quiet else config.trackers, paths, name=config.name, step=done)
        rows = [] if quiet else MetricsFile.read(paths.metrics)
        self._gradients = health.GradientMonitor(
            max_skipped_steps=config.health.max_skipped_steps,
            warn_grad_norm=config.health.warn_grad_norm,
            rows=rows,
            skipped_steps=skipped_steps,
        )
        self._peak = health.peak_flops(ranks.device, config.student.dtype.name)

    def measure(self, figures: dict[str, Any], batches: Sequence[Batch]) -> dict[str, Any]:
        """The figures of a step with its health figures added; FloatingPointError if the run cannot continue."""
        figures = figures | health.step_totals(self._ranks, batches, self._size)
        figures |= health.throughput(figures, world_size=self._ranks.world_size, peak=self._peak)
        return figures | self._gradients.check(figures)

    def append(self, figures: dict[str, Any], *, show: Sequence[str]) -> None:
        """Log one more step: in metrics.jsonl, in the trackers and, the figures `show`, in the progress bar."""
        if self._metrics is not None:
            self._metrics.append(figures)
            self._trackers.write(figures)
        self._progress.advance(1, **{name: figures[name] for name in show if figures[name] is not None})

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

    def append(self, figures: dict[str, Any]) -> None:
        """Append one step."""
        with self._file.open("a") as file:
            file.write(json.dumps(figures) + "\n")
