"""Copies of metrics.jsonl in external trackers: TensorBoard, Weights & Biases, MLflow; all are optional.

metrics.jsonl is complete without them. A tracker that fails is logged once and dropped; training continues.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from pipeline.config.schema import Tracker
from pipeline.core.files import RunPaths
from pipeline.core.progress import log

# what opening a tracker returns: write(step, numbers), close()
Write = Callable[[int, dict[str, float]], None]
Close = Callable[[], None]


class Trackers:
    """The trackers of one run, from the step of its checkpoint on."""

    def __init__(self, chosen: Sequence[Tracker], paths: RunPaths, *, name: str, step: int) -> None:
        self._open: dict[str, tuple[Write, Close]] = {}
        for tracker in chosen:
            try:
                self._open[tracker.name] = TRACKERS[tracker](paths, name, step)
            except Exception as error:  # an external service may raise anything
                self._drop(tracker.name, error)

    def write(self, figures: dict[str, Any]) -> None:
        """Write one step: its finite numbers; other values are in metrics.jsonl only."""
        numbers = {key: float(value) for key, value in figures.items() if _is_number(value) and key != "step"}
        for tracker, (write, _) in list(self._open.items()):
            try:
                write(figures["step"], numbers)
            except Exception as error:
                self._drop(tracker, error)

    def close(self) -> None:
        """Close every tracker once it has sent everything."""
        for tracker, (_, close) in list(self._open.items()):
            try:
                close()
            except Exception as error:
                self._drop(tracker, error)

    def _drop(self, tracker: str, error: Exception) -> None:
        self._open.pop(tracker, None)
        log.warning(
            "tracker %s: expected it to accept the metrics, found %s: %s; training continues without it, metrics.jsonl "
            "is complete",
            *(tracker, type(error).__name__, error),
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _tensorboard(paths: RunPaths, name: str, step: int) -> tuple[Write, Close]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(paths.tensorboard), purge_step=step + 1)  # hides the steps that a resumed run repeats

    def write(step: int, numbers: dict[str, float]) -> None:
        for key, value in numbers.items():
            writer.add_scalar(key, value, step)

    return write, writer.close


def _wandb(paths: RunPaths, name: str, step: int) -> tuple[Write, Close]:
    import wandb

    # wandb ignores steps that it has already; those that a resumed run repeats have the same numbers, bit by bit
    run = wandb.init(project=name, id=paths.folder.name, name=paths.folder.name, resume="allow", dir=str(paths.folder))
    return lambda step, numbers: run.log(numbers, step=step), run.finish


def _mlflow(paths: RunPaths, name: str, step: int) -> tuple[Write, Close]:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    client, tag = MlflowClient(), "run_folder"
    experiment = client.get_experiment_by_name(name)
    experiment_id = experiment.experiment_id if experiment else client.create_experiment(name)
    runs = client.search_runs([experiment_id], f"tags.{tag} = '{paths.folder.name}'")  # found if the run is resumed
    run = (
        runs[0] if runs else client.create_run(experiment_id, run_name=paths.folder.name, tags={tag: paths.folder.name})
    )
    run_id = run.info.run_id

    def write(step: int, numbers: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        client.log_batch(run_id, metrics=[Metric(key, value, now, step) for key, value in numbers.items()])

    return write, lambda: client.set_terminated(run_id)


# a new one also joins the enum `Tracker` in config/schema.py and `TRACKER_PACKAGES` in config/validate_train.py
TRACKERS = {Tracker.tensorboard: _tensorboard, Tracker.wandb: _wandb, Tracker.mlflow: _mlflow}
