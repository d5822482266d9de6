"""Run a study: print the plan and its cost, then make what is missing, from the teacher to the report."""

from __future__ import annotations

import dataclasses
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pipeline.cache.manifest import load_manifest
from pipeline.capture import driver as capture
from pipeline.config import parallel
from pipeline.config.commands import StudyConfig
from pipeline.config.compose import open_study, quoted
from pipeline.config.groups import PACKAGE
from pipeline.config.outcomes import State, read_outcomes
from pipeline.config.overrides import compose_job
from pipeline.config.schema import IfBusy, Role, TrainConfig
from pipeline.config.study import Study
from pipeline.config.sweeps import BASIC, Sweep, jobs_side_by_side, new_folder
from pipeline.core.object_store import one_location
from pipeline.core.progress import log, readable_duration, start_logging
from pipeline.core.stopping import Stopped
from pipeline.core.types import InputError, RunFailed
from pipeline.declare.leaks import check_texts
from pipeline.report import commands as report
from pipeline.report.runs import read_config
from pipeline.study.forecast import (
    ADAPTIVE,
    Composer,
    check_jobs,
    jobs_at_once,
    print_plan,
    texts_of,
    with_curve_length,
)
from pipeline.study.plan import Job, student_jobs, teacher_job
from pipeline.training import driver as training

LOG_EVERY_SECONDS = 60.0  # of a run's plain progress lines: a study is read as a whole


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Teacher:
    """The teacher as its students need it."""

    model: str
    """Folder of its weights."""
    folder: Path
    """Its run, with its predictions."""


def run(config: StudyConfig) -> None:
    """Make every run that the study lacks, then its report; the same command again continues."""
    start_logging()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # in order with the lines of the ranks
    study = open_study(config.study, config.study_dir)
    composer = Composer(study)
    jobs = student_jobs(config, study)
    check_jobs(composer, jobs)
    check_texts(texts_of(study), allowed=study.file.allow_shared_records)
    jobs = [with_curve_length(composer, job) for job in jobs]
    check_at_once(config, jobs_at_once(composer, jobs))
    print_plan(config, composer, jobs)
    if config.dry_run:
        return
    try:
        make(config, composer, jobs)
    except Stopped as stopped:  # a run that finished all the same is not the end of its study
        print("the study ends here, as requested; the same command continues with what is left", file=sys.stderr)
        raise Stopped(str(stopped), is_finished=False) from stopped


def make(config: StudyConfig, composer: Composer, jobs: Sequence[Job]) -> None:
    """Teacher, capture, students and report; RunFailed at the end if a run has failed."""
    study, cache = composer.study, None
    start_logging(quiet=True)  # what follows prints its own lines; log.txt of each run has all of them
    teacher = run_teacher(study)
    if any(map(composer.reads_cache, jobs)):
        place = f"teacher.path={quoted([teacher.model])[1:-1]}"  # exactly this one, where a study has trained several
        print(f"\n==> capture: the teacher reads the corpus  ({command('capture', study, [place])})")
        cache = str(capture.run(composer.capture(place)))
        start_logging(quiet=True)
    students = [with_inputs(composer, job, teacher, cache) for job in jobs]
    if config.hydra_launcher is not None:
        made, failed = launch(config.hydra_launcher, study, students)
    elif (num_places := jobs_at_once(composer, jobs)) > 1:
        made, failed = run_side_by_side(study, students, num_places, composer.train(jobs[0]).launcher.if_busy)
    else:
        made, failed = run_students(study, students)
    print(f"\n==> report  ({command('report', study, [])})")
    again = " ".join([config.command, *map(shlex.quote, config.overrides)])
    runs = [str(folder) for folder in folders_of(study, [teacher.folder, *made], cache)]
    report.run(dataclasses.replace(compose_job("report", [], study=study), command=again, runs=runs))
    if failed:
        raise RunFailed(f"{len(failed)} of {len(students)} failed: {'; '.join(failed)}; the same command repeats these")


def folders_of(study: Study, made: Sequence[Path], cache: str | None) -> list[Path]:
    """The runs that belong together: those `made` now, and earlier students of the same cache or of none.

    A study whose teacher, capture or ceiling was changed has runs of both in its folder.
    """
    fingerprint = None if cache is None else load_manifest(one_location(cache, "cache")).fingerprint
    roles = {folder: read_config(folder / "config.yaml").get("role") for folder in _finished(study)}
    once = {Role.teacher.name, Role.ceiling.name} & {roles.get(folder) for folder in made}
    kept, num_others = [], 0
    for folder, role in roles.items():
        identity = json.loads((folder / "identity.json").read_text())
        reads_other = fingerprint is not None and identity.get("cache", fingerprint) != fingerprint
        if folder not in made and (reads_other or role in once):
            num_others += 1
        else:
            kept.append(folder)
    if num_others:
        log.warning("%d runs of another teacher, cache or ceiling in %s are left out", num_others, study.file.runs_dir)
    return kept


def _finished(study: Study) -> list[Path]:
    return [result.parent for result in sorted(Path(study.file.runs_dir).glob("*/result.json"))]


# ------------------------------------------------------------------------------------------- steps


def run_teacher(study: Study, *, if_busy: IfBusy | None = None) -> Teacher:
    """Train and score the teacher, or score the ready-made one; `if_busy` replaces that of its options."""
    job = teacher_job(study)
    print(f"\n==> {job.experiment}  ({command('train', study, job.arguments)})")
    config = quiet(compose_job("train", job.arguments, study=study))
    if if_busy is not None:
        config = dataclasses.replace(config, launcher=dataclasses.replace(config.launcher, if_busy=if_busy))
    prepared = training.prepare(config)
    training.run_prepared(prepared)
    folder = prepared.paths.folder
    model = str(prepared.paths.model) if study.trains_teacher else study.file.teacher.path
    return Teacher(model=model, folder=folder)


def with_inputs(composer: Composer, job: Job, teacher: Teacher, cache: str | None) -> Job:
    """The job with the exact folders of its teacher and its cache, where a glob might match several."""
    files = {"test": ["scoring.teacher_predictions"], "dev": ["scoring.teacher_dev_predictions"]}
    if composer.train(job).loss.kd.adaptive_weight.every_steps > 0:
        files["dev"].append(ADAPTIVE)
    found = {name: teacher.folder / f"predictions-{split}.parquet" for split, names in files.items() for name in names}
    overrides = [f"{name}={quoted([str(path)])[1:-1]}" for name, path in found.items() if path.exists()]
    if composer.reads_cache(job):
        assert cache is not None
        overrides.append(f"cache={quoted([cache])[1:-1]}")
    return dataclasses.replace(job, overrides=(*overrides, *job.overrides))


def run_students(study: Study, jobs: Sequence[Job]) -> tuple[list[Path], list[str]]:
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
    if parallel.run_jobs(sweep, commands, started=training.STARTED):
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
