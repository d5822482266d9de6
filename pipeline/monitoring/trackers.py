"""Copies of metrics.jsonl in external trackers: TensorBoard, Weights & Biases, MLflow; all are optional.

The runs of a study stand in one project, grouped by experiment, with all their options; the final scores follow when
the run is scored. metrics.jsonl is complete without them. A tracker that fails is logged once and dropped; training
continues.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.options import options, to_plain
from pipeline.config.schema import Tracker, TrackingConfig, TrainConfig
from pipeline.core.files import RunPaths
from pipeline.core.progress import log

MAX_PARAMS_MLFLOW = 100  # that MLflow takes at once
MAX_CHARACTERS_MLFLOW = 500  # of a parameter's value that every MLflow server takes


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackedRun:
    """What a tracker needs to know of a run."""

    folder: Path
    project: str
    """The study, else the folder that holds the runs: what is to be compared stands in one project."""
    chosen: TrackingConfig
    """What the user chose instead of project, name and id, and tags."""
    group: str
    """The experiment; its seeds are one group."""
    role: str
    """The part in the study: gold_only, combined, ...; empty without one."""
    options: dict[str, Any]
    """Every option by its dotted name, as plain data."""

    @property
    def key(self) -> str:
        """The name of the run folder: it is found again by this when the run is resumed."""
        return self.folder.name

    @property
    def name(self) -> str:
        """What the run is called."""
        return self.chosen.name or self.key

    def project_of(self, variable: str) -> str:
        """The project: as the option says, else the tracker's own environment variable, else the study."""
        return self.chosen.project or os.environ.get(variable) or self.project


def tracked_run(config: TrainConfig, paths: RunPaths) -> TrackedRun:
    """What the trackers need to know of a run."""
    return TrackedRun(
        folder=paths.folder,
        project=config.study or paths.folder.absolute().parent.name,
        chosen=config.tracking,
        group=config.name,
        role="" if config.role is None else config.role.name,
        options={name: _option(config, name) for name, _, _ in options(TrainConfig)},
    )


def _option(config: Any, name: str) -> Any:
    """The value of an option; None below a section that is null."""
    for part in name.split("."):
        config = None if config is None else getattr(config, part)
    return to_plain(config)


# what opening a tracker returns: write(step, numbers), finish(final scores), close()
Write = Callable[[int, dict[str, float]], None]
Finish = Callable[[dict[str, float]], None]
Close = Callable[[], None]


class Trackers:
    """The trackers of one run, from the step of its checkpoint on."""

    def __init__(self, chosen: Sequence[Tracker], run: TrackedRun, *, step: int) -> None:
        self._open: dict[str, tuple[Write, Finish, Close]] = {}
        for tracker in chosen:
            try:
                self._open[tracker.name] = TRACKERS[tracker](run, step)
            except Exception as error:  # an external service may raise anything
                self._drop(tracker.name, error)

    def write(self, figures: dict[str, Any]) -> None:
        """Write one step: its finite numbers; other values are in metrics.jsonl only."""
        numbers = {key: float(value) for key, value in figures.items() if _is_number(value) and key != "step"}
        self._each(lambda write, finish, close: write(figures["step"], numbers))

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write what result.json holds: final_test_accuracy, final_dev_nll, final_train_seconds, ..."""
        scores = {f"final_{name}": value for name, value in _numbers(result) if name != "seed"}
        self._each(lambda write, finish, close: finish(scores))

    def close(self) -> None:
        """Close every tracker once it has sent everything."""
        self._each(lambda write, finish, close: close())

    def _each(self, call: Callable[[Write, Finish, Close], None]) -> None:
        for tracker, functions in list(self._open.items()):
            try:
                call(*functions)
            except Exception as error:
                self._drop(tracker, error)

    def _drop(self, tracker: str, error: Exception) -> None:
        self._open.pop(tracker, None)
        log.warning(
            "tracker %s: expected it to accept the metrics, found %s: %s; the run continues without it, metrics.jsonl "
            "and result.json are complete",
            *(tracker, type(error).__name__, error),
        )


def record_result(config: TrainConfig, paths: RunPaths, result: Mapping[str, Any]) -> None:
    """Add the final scores to each tracker's record of a run, after its last step: `step` is the number of steps."""
    trackers = Trackers(config.trackers, tracked_run(config, paths), step=int(result["steps"]))
    trackers.finish(result)
    trackers.close()


def _numbers(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The finite numbers of nested dictionaries, their names joined: {test: {nll: 1}} -> test_nll."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}_")
        elif _is_number(value):
            yield prefix + name, float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


# -------------------------------------------------------------------------------- one function a tracker


def _tensorboard(run: TrackedRun, step: int) -> tuple[Write, Finish, Close]:
    from torch.utils.tensorboard import SummaryWriter

    folder = RunPaths(folder=run.folder).tensorboard
    writer = SummaryWriter(str(folder), purge_step=step + 1)  # hides the steps that a resumed run repeats

    def write(step: int, numbers: dict[str, float]) -> None:
        for key, value in numbers.items():
            writer.add_scalar(key, value, step)

    def finish(scores: dict[str, float]) -> None:
        tags = {"project": run.chosen.project or run.project, "experiment": run.group, "role": run.role}
        tags |= {"name": run.name, "tags": ", ".join(run.chosen.tags)}
        plain = {
            name: value if isinstance(value, (bool, int, float)) else str(value) for name, value in run.options.items()
        }
        writer.add_hparams(plain | tags, scores, run_name=".")  # ".": in the run's own folder

    return write, finish, writer.close


def _wandb(run: TrackedRun, step: int) -> tuple[Write, Finish, Close]:
    import wandb

    # wandb ignores steps that it has already; those that a resumed run repeats have the same numbers, bit by bit
    record = wandb.init(
        project=re.sub(r"[/\\#?%:]", "-", run.project_of("WANDB_PROJECT")),
        entity=run.chosen.entity,
        tags=run.chosen.tags or None,
        group=run.group,
        job_type=run.role or None,
        id=run.chosen.run_id or run.key,
        name=run.name,
        config=run.options,
        allow_val_change=True,  # options without effect on the result may differ when a run is resumed
        resume="allow",
        dir=str(run.folder),
    )
    return lambda step, numbers: record.log(numbers, step=step), record.summary.update, record.finish


def _mlflow(run: TrackedRun, step: int) -> tuple[Write, Finish, Close]:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    client, project = MlflowClient(), run.project_of("MLFLOW_EXPERIMENT_NAME")
    experiment = client.get_experiment_by_name(project)
    experiment_id = experiment.experiment_id if experiment else client.create_experiment(project)
    tags = {"run_folder": run.key, "experiment": run.group, "role": run.role} | dict.fromkeys(run.chosen.tags, "")
    if run.chosen.run_id is not None:
        found = [client.get_run(run.chosen.run_id)]
    else:
        found = client.search_runs([experiment_id], f"tags.run_folder = '{run.key}'")  # the run is resumed
    run_id = (found[0] if found else client.create_run(experiment_id, run_name=run.name, tags=tags)).info.run_id
    if not found:  # MLflow refuses to change a parameter
        params = [Param(name, str(value)[:MAX_CHARACTERS_MLFLOW]) for name, value in run.options.items()]
        for first in range(0, len(params), MAX_PARAMS_MLFLOW):
            client.log_batch(run_id, params=params[first : first + MAX_PARAMS_MLFLOW])

    def write(step: int, numbers: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        client.log_batch(run_id, metrics=[Metric(key, value, now, step) for key, value in numbers.items()])

    return write, lambda scores: write(step, scores), lambda: client.set_terminated(run_id)


# a new one also joins the enum `Tracker` in config/schema.py and `TRACKER_PACKAGES` in config/validate_packages.py
TRACKERS = {Tracker.tensorboard: _tensorboard, Tracker.wandb: _wandb, Tracker.mlflow: _mlflow}
