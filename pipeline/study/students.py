"""The runs of a study's students: one by one, side by side, or through a launcher of Hydra."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pipeline.config import parallel
from pipeline.config.commands import StudyConfig
from pipeline.config.compose import quoted
from pipeline.config.groups import PACKAGE
from pipeline.config.outcomes import State, read_outcomes
from pipeline.config.overrides import compose_job
from pipeline.config.schema import IfBusy, TrainConfig
from pipeline.config.study import Study
from pipeline.config.sweeps import BASIC, Sweep, jobs_side_by_side, new_folder
from pipeline.core.progress import readable_duration
from pipeline.core.stopping import Stopped
from pipeline.core.types import InputError, RunFailed
from pipeline.study.forecast import ADAPTIVE, Composer, jobs_at_once
from pipeline.study.plan import Job
from pipeline.training import driver as training
from pipeline.training.launch import STARTED

LOG_EVERY_SECONDS = 60.0  # of a run's plain progress lines: a study is read as a whole


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Teacher:
    """The teacher as its students need it."""

    model: str
    """Folder of its weights."""
    folder: Path
    """Its run, with its predictions."""


def run_jobs(
    config: StudyConfig, composer: Composer, jobs: Sequence[Job], inputs: Sequence[Job]
) -> tuple[list[Path], list[str]]:
    """Make all runs as the study's command asks for it: their folders, and the labels of those that failed.

    `inputs`: the jobs with their inputs (`with_inputs`). A launcher of Hydra does not tell the folders.
    """
    if not jobs:
        return [], []
    study, num_places = composer.study, jobs_at_once(composer, jobs)
    if config.hydra_launcher is not None:
        return launch(config.hydra_launcher, study, inputs)
    if num_places > 1:
        return run_side_by_side(study, inputs, num_places, composer.train(jobs[0]).launcher.if_busy)
    return run_one_by_one(study, inputs)


def with_inputs(composer: Composer, job: Job, teacher: Teacher, cache: str | None) -> Job:
    """The job with the exact folders of its teacher and its cache, where a glob might match several."""
    config = composer.train(job)
    files = {"test": ["scoring.teacher_predictions"], "dev": ["scoring.teacher_dev_predictions"]}
    if config.loss.kd.adaptive_weight.every_steps > 0:
        files["dev"].append(ADAPTIVE)
    scored = {split: names for split, names in files.items() if getattr(config, split) is not None}
    found = {name: teacher.folder / f"predictions-{split}.parquet" for split, names in scored.items() for name in names}
    overrides = [f"{name}={text_value(path)}" for name, path in found.items() if path.exists()]
    if composer.reads_cache(job):
        assert cache is not None
        overrides.append(f"cache={text_value(cache)}")
    return dataclasses.replace(job, overrides=(*overrides, *job.overrides))


def text_value(value: object) -> str:
    """A text as the value of an option in Hydra's grammar."""
    return quoted([str(value)])[1:-1]


def run_one_by_one(study: Study, jobs: Sequence[Job]) -> tuple[list[Path], list[str]]:
    """One run after the other, in this process: their folders, and the labels of those that failed."""
    started, made, failed = time.monotonic(), list[Path](), list[str]()
    for number, job in enumerate(jobs, 1):
        head = f"==> [{number}/{len(jobs)}] {job.label}"
        try:
            prepared = training.prepare(quiet(compose_job("train", job.arguments, study=study)))
            print(f"{head}: {'finished before' if prepared.is_complete() else prepared.paths.folder}")
            score = training.run_prepared(prepared)
        except (InputError, RunFailed) as error:  # the others do not depend on it
            print(f"{head} failed: {error}")
            failed.append(job.label)
            continue
        made.append(prepared.paths.folder)
        if score is not None:
            print(f"    score {score:.4f}; {readable_duration(time.monotonic() - started)} so far")
    return made, failed


def check_at_once(config: StudyConfig, num_places: int) -> None:
    """Refuse several students at a time where the machine cannot be divided, or another launcher starts them."""
    if num_places == 1:
        return
    if config.hydra_launcher is not None:
        raise InputError(
            f"launcher.jobs={num_places}: expected students on this machine, found hydra_launcher="
            f"{config.hydra_launcher}, which starts them its own way; leave out one of the two"
        )
    parallel.places_here(num_places)


def run_side_by_side(
    study: Study, jobs: Sequence[Job], num_places: int, if_busy: IfBusy
) -> tuple[list[Path], list[str]]:
    """Several runs at a time, each in a process of its own: their folders, and the labels of those that failed."""
    sweep = Sweep(
        folder=new_folder(Path(study.file.runs_dir) / ".multirun"),
        varied=(),
        job_labels=tuple(job.label for job in jobs),
        num_jobs=len(jobs),
        launcher=BASIC,
        jobs_at_once=num_places,
        of_all_jobs=(),
        job_overrides=tuple((*job.arguments, *jobs_side_by_side(if_busy)) for job in jobs),
        dry_run=False,
        started=time.time(),
    )
    flags = [] if study.config_dir is None else ["--config-dir", study.config_dir]
    commands = parallel.job_commands("train", study, flags, sweep)
    if parallel.run_jobs(sweep, commands, started=STARTED):
        raise Stopped("stopped: the students", is_finished=False)
    outcomes = read_outcomes(sweep.folder).values()
    made = [Path(one.outcome.folder) for one in outcomes if one.outcome.state is State.finished and one.outcome.folder]
    return made, [one.label for one in outcomes if one.outcome.state is not State.finished]


def launch(launcher: str, study: Study, jobs: Sequence[Job]) -> tuple[list[Path], list[str]]:
    """All runs through a launcher of Hydra: for each setting a sweep over the seeds, all at once; what failed."""
    seeds: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for job in jobs:
        seeds.setdefault((job.experiment, job.overrides), []).append(str(job.seed))
    place = [] if study.config_dir is None else ["--config-dir", study.config_dir]
    sweeps: dict[str, subprocess.Popen[bytes]] = {}
    for (experiment, overrides), of_job in seeds.items():
        arguments = [f"study={study.given}", f"hydra/launcher={launcher}", f"experiment={experiment}", *overrides]
        label = f"{experiment}, seeds {', '.join(of_job)}"
        print(f"==> {launcher}: {label}")
        train = [sys.executable, str(PACKAGE / "scripts" / "train.py"), "-m", *place, *arguments]
        sweeps[f"{label} ({len(sweeps) + 1})"] = subprocess.Popen([*train, f"seed={','.join(of_job)}"])
    try:
        return [], [label for label, sweep in sweeps.items() if sweep.wait() != 0]
    except KeyboardInterrupt:
        for sweep in sweeps.values():  # a signal to this process alone does not reach them
            sweep.terminate()
        for sweep in sweeps.values():
            sweep.wait()
        raise


def quiet(config: TrainConfig) -> TrainConfig:
    """The same run with few progress lines, its ranks' log lines in its folder alone."""
    launcher = dataclasses.replace(config.launcher, log_every_seconds=LOG_EVERY_SECONDS, quiet=True)
    return dataclasses.replace(config, launcher=launcher)


def command(script: str, study: Study, overrides: Sequence[str]) -> str:
    """What the same step would be by hand."""
    return " ".join([study.command.replace("study.py", f"{script}.py"), *overrides])
