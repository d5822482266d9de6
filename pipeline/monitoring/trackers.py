"""Copies of metrics.jsonl for those who watch elsewhere: TensorBoard, Weights & Biases, MLflow; none is ever needed.

metrics.jsonl stays the truth. What goes wrong with a tracker is said once and does not touch the run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from pipeline.config.schema import Tracker
from pipeline.core.files import RunPaths
from pipeline.core.progress import log

Write = Callable[[int, dict[str, float]], None]
Close = Callable[[], None]


class Trackers:
    """The trackers of one run, from its checkpoint's step on."""

    def __init__(self, chosen: Sequence[Tracker], paths: RunPaths, *, name: str, step: int) -> None:
        self._open: dict[str, tuple[Write, Close]] = {}
        for tracker in chosen:
            try:
                self._open[tracker.name] = OPEN[tracker](paths, name, step)
            except Exception as error:  # whatever a foreign service may raise
                self._give_up(tracker.name, error)

    def write(self, figures: dict[str, Any]) -> None:
        """One more step: its numbers; what is no finite number stays in metrics.jsonl alone."""
        numbers = {key: float(value) for key, value in figures.items() if _is_number(value) and key != "step"}
        for tracker, (write, _) in list(self._open.items()):
            try:
                write(figures["step"], numbers)
            except Exception as error:
                self._give_up(tracker, error)

    def close(self) -> None:
        """Have everything delivered."""
        for tracker, (_, close) in list(self._open.items()):
            try:
                close()
            except Exception as error:
                self._give_up(tracker, error)

    def _give_up(self, tracker: str, error: Exception) -> None:
        self._open.pop(tracker, None)
        log.warning(
            "tracker %s: expected it to take figures, found %s: %s; training goes on without it, metrics.jsonl has "
            "everything",
            *(tracker, type(error).__name__, error),
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _tensorboard(paths: RunPaths, name: str, step: int) -> tuple[Write, Close]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(paths.tensorboard), purge_step=step + 1)  # hides what a resumed run does again

    def write(step: int, numbers: dict[str, float]) -> None:
        for key, value in numbers.items():
            writer.add_scalar(key, value, step)

    return write, writer.close


def _wandb(paths: RunPaths, name: str, step: int) -> tuple[Write, Close]:
    import wandb

    # steps that it has already and a resumed run does again are ignored by it: they are the same to the last bit
    run = wandb.init(project=name, id=paths.folder.name, name=paths.folder.name, resume="allow", dir=str(paths.folder))
    return lambda step, numbers: run.log(numbers, step=step), run.finish


def _mlflow(paths: RunPaths, name: str, step: int) -> tuple[Write, Close]:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    client, tag = MlflowClient(), "run_folder"
    known = client.get_experiment_by_name(name)
    experiment = known.experiment_id if known else client.create_experiment(name)
    found = client.search_runs([experiment], f"tags.{tag} = '{paths.folder.name}'")
    run = (
        found[0] if found else client.create_run(experiment, run_name=paths.folder.name, tags={tag: paths.folder.name})
    )
    run_id = run.info.run_id

    def write(step: int, numbers: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        client.log_batch(run_id, metrics=[Metric(key, value, now, step) for key, value in numbers.items()])

    return write, lambda: client.set_terminated(run_id)


OPEN = {Tracker.tensorboard: _tensorboard, Tracker.wandb: _wandb, Tracker.mlflow: _mlflow}
