"""What a training run leaves behind at every step: a line of metrics.jsonl, its trackers, the progress shown."""

from __future__ import annotations

import dataclasses
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
    """Every rank measures and judges; the first one writes."""

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
        self._watch = health.GradientMonitor(
            **dataclasses.asdict(config.health), rows=rows, skipped_steps=skipped_steps
        )
        self._peak = health.peak_flops(ranks.device, config.student.dtype.name)

    def measure(self, figures: dict[str, Any], batches: Sequence[Batch]) -> dict[str, Any]:
        """The figures of a step and what they say of the run's health; FloatingPointError if it cannot go on."""
        figures = figures | health.step_totals(self._ranks, batches, self._size)
        figures |= health.throughput(figures, world_size=self._ranks.world_size, peak=self._peak)
        return figures | self._watch.look(figures)

    def append(self, figures: dict[str, Any], *, show: Sequence[str]) -> None:
        """One more step, in the file, in its trackers and to those who wait."""
        if self._metrics is not None:
            self._metrics.append(figures)
            self._trackers.write(figures)
        self._progress.advance(1, **{name: figures[name] for name in show if figures[name] is not None})

    def close(self) -> None:
        """End the bar and have the trackers deliver."""
        self._progress.close()
        self._trackers.close()


class MetricsFile:
    """metrics.jsonl: one line a step, cut back to the steps that a resumed run will not do again."""

    def __init__(self, file: Path, *, keep_steps: int) -> None:
        self._file = file
        rows = self.read(file) if file.exists() else []
        write_atomically(file, "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= keep_steps))

    @staticmethod
    def read(file: Path) -> list[dict[str, Any]]:
        """All whole lines; the last may have been cut short by a crash."""
        whole = [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
        return [json.loads(line) for line in whole]

    def append(self, figures: dict[str, Any]) -> None:
        """One more step."""
        with self._file.open("a") as file:
            file.write(json.dumps(figures) + "\n")
