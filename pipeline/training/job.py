"""A run as a job of `scripts/train.py`: how it ended, or would begin, as a value that a sweep can write down."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from pipeline.config.outcomes import Outcome, State, ended_by
from pipeline.config.schema import TrainConfig
from pipeline.config.validate_train import check_train
from pipeline.core.progress import start_logging
from pipeline.core.stopping import Stopped
from pipeline.core.types import InputError, RunFailed
from pipeline.training import checkpoints, follower
from pipeline.training.driver import PreparedRun, prepare, run_prepared, sweep_objective
from pipeline.training.identity import read_model_and_caches
from pipeline.training.meeting import meeting_of


def run(config: TrainConfig) -> Outcome:
    """Bring one run to its result, or find where it stands; an InputError while its inputs are read is raised."""
    start_logging(quiet=config.launcher.quiet)
    if config.dry_run:
        return where_it_stands(prepare(config))
    meeting = meeting_of(config.launcher)
    return drive(prepare(config)) if meeting is None else follower.run(config, meeting, drive)


def drive(prepared: PreparedRun) -> Outcome:
    """Bring a run whose inputs are checked to its result."""
    folder, log = str(prepared.paths.folder), prepared.paths.log
    begin = log.stat().st_size if log.exists() else 0
    try:
        return Outcome(state=State.finished, folder=folder, score=run_prepared(prepared))
    except (Stopped, InputError, RunFailed) as error:
        outcome, reason = ended_by(error, folder), last_error(log, begin)
        failed = outcome.state is State.failed and reason
        return dataclasses.replace(outcome, note=f"{reason} ({error})") if failed else outcome


def last_error(log: Path, begin: int) -> str:
    """The exception that ended the first rank, from the end of its log; empty where it wrote none after `begin`."""
    if not log.exists():
        return ""
    with log.open() as file:
        file.seek(begin)
        found = re.findall(r"^\w[\w.]*(?:Error|Exception): .*", file.read(), re.MULTILINE)
    return found[-1] if found else ""


def where_it_stands(prepared: PreparedRun) -> Outcome:
    """Of a run that is not started now: finished, or what is left of it."""
    paths = prepared.paths
    folder = str(paths.folder)
    if prepared.is_complete():
        return Outcome(state=State.finished, folder=folder, score=sweep_objective(prepared), note=f"finished: {folder}")
    if paths.result.exists():
        note = f"to score on {', '.join(prepared.missing())}"
    elif paths.model.exists():
        note = "trained; to score"
    else:
        newest = checkpoints.published(paths)
        note = "to do" if newest is None else f"to resume at step {newest.step}"
    return Outcome(state=State.to_do, folder=folder, note=f"{note}: {folder}")


def check(config: TrainConfig) -> None:
    """What is found wrong without reading texts or weights; this is how a sweep checks all its jobs before the first.

    The machine is not asked: the jobs may run on another one.
    """
    check_train(config)
    read_model_and_caches(config)
