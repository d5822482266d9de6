"""Run a study: print the plan and its cost, then make what is missing, from the teacher to the report."""

from __future__ import annotations

import dataclasses
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.cache.manifest import load_manifest
from pipeline.capture import driver as capture
from pipeline.config.compose import open_study, quoted
from pipeline.config.groups import PACKAGE
from pipeline.config.overrides import compose_job
from pipeline.config.schema import Role, TrainConfig
from pipeline.config.study import Study, StudyConfig, more_tests_of
from pipeline.config.validate import check_files
from pipeline.config.validate_train import check_train
from pipeline.core.object_store import one_location
from pipeline.core.progress import log, readable, start_logging
from pipeline.core.types import InputError, RunFailed
from pipeline.declare.leaks import check_texts
from pipeline.declare.shown import show_texts
from pipeline.report import commands as report
from pipeline.report.runs import read_config
from pipeline.study import cost
from pipeline.study.plan import READS_CACHE, Job, student_jobs, teacher_job
from pipeline.training import driver as training

WITHOUT_TEACHER = ("scoring.teacher_predictions=null", "scoring.teacher_dev_predictions=null")  # not made yet
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
    study = open_study(config.study, config.study_dir)
    jobs = student_jobs(config, study)
    check_jobs(study, jobs)
    check_texts(texts_of(study), allowed=study.file.allow_shared_records)
    print_plan(config, study, jobs)
    if config.dry_run:
        return
    teacher = run_teacher(study)
    cache = None
    if any(job.experiment in READS_CACHE for job in jobs):
        print(f"\n==> capture: the teacher reads the corpus  ({command('capture', study, teacher_options(teacher))})")
        cache = str(capture.run(compose_job("capture", teacher_options(teacher))))
    students = [with_inputs(job, teacher, cache) for job in jobs]
    failed = run_students(students) if config.hydra_launcher is None else launch(config.hydra_launcher, study, students)
    print(f"\n==> report  ({command('report', study, [])})")
    again = " ".join([config.command, *map(shlex.quote, config.overrides)])
    runs = [str(folder) for folder in folders_of(study, teacher, cache)]
    report.run(dataclasses.replace(compose_job("report", []), command=again, runs=runs))
    if failed:
        raise RunFailed(f"{len(failed)} of {len(students)} failed: {'; '.join(failed)}; the same command repeats these")


def folders_of(study: Study, teacher: Teacher, cache: str | None) -> list[Path]:
    """The runs that belong together: this teacher, students of this cache, and those that read none.

    A study whose teacher or capture was changed has runs of both in its folder.
    """
    fingerprint = None if cache is None else load_manifest(one_location(cache, "cache")).fingerprint
    kept, num_others = [], 0
    for result in sorted(Path(study.file.runs_dir).glob("*/result.json")):
        folder = result.parent
        identity = json.loads((folder / "identity.json").read_text())
        is_teacher = read_config(folder / "config.yaml").get("role") == Role.teacher.name
        reads_other = identity.get("cache", fingerprint) != fingerprint and fingerprint is not None
        if reads_other or (is_teacher and folder != teacher.folder):
            num_others += 1
        else:
            kept.append(folder)
    if num_others:
        log.warning("%d runs of another teacher or cache in %s are left out", num_others, study.file.runs_dir)
    return kept


def texts_of(study: Study) -> dict[str, Any]:
    """The texts that a study has, by name."""
    file = study.file
    texts: dict[str, Any] = {name: getattr(file, name) for name in ("teacher_labels", "corpus", "gold", "dev", "test")}
    texts["ceiling"] = file.ceiling
    return {name: text for name, text in texts.items() if text is not None} | more_tests_of(study)


def check_jobs(study: Study, jobs: Sequence[Job]) -> None:
    """Refuse contradictory options of any run before the first one starts."""
    capture_config = compose_job("capture", ["teacher.path=."])
    check_files(dataclasses.replace(capture_config, teacher=study.file.teacher))
    for job in [teacher_job(study), *jobs]:
        overrides = ["cache=null", *WITHOUT_TEACHER]
        config = compose_job("train", job.arguments + overrides)
        check_files(config)
        reads_cache = job.experiment in READS_CACHE
        check_train(dataclasses.replace(config, cache="later" if reads_cache else None))


# -------------------------------------------------------------------------------------------- plan


def print_plan(config: StudyConfig, study: Study, jobs: Sequence[Job]) -> None:
    """The runs, what the models read, and what all of it costs."""
    print(f"Study {study.name} ({study.path})\n")
    for line in show_texts({name: text for name, text in texts_of(study).items() if name in ("corpus", "gold")}, study):
        print(line)
    costs = list(all_costs(config, study, jobs))
    print(f"{'run':<26} {'runs':>4} {'steps':>7} {'tokens':>9} {'time':>8}")
    for label, group in costs:
        whole = cost.total(group)
        shown = "" if whole.seconds is None else duration(whole.seconds)
        print(f"{label:<26} {len(group):>4} {group[0].steps or '':>7} {whole.tokens:>9,} {shown:>8}")
    whole = cost.total([one for _, group in costs for one in group])
    hours = "" if whole.seconds is None else f", about {duration(whole.seconds)} on this machine"
    print(f"\nIn all about {whole.steps:,} steps, {whole.tokens:,} tokens, {readable(whole.bytes)} of weights{hours};")
    print("what exists already is not made again.")


def all_costs(config: StudyConfig, study: Study, jobs: Sequence[Job]) -> Iterator[tuple[str, list[cost.Cost]]]:
    """Of the teacher, of the capture, and of each setting of the student with all its seeds."""
    file, limit = study.file, config.probe_seconds / 2
    first = teacher_job(study)
    teacher, capture_config = composed(first), compose_job("capture", ["teacher.path=."])
    speed = (
        {"teacher": None, "student": None}
        if limit == 0
        else {
            name: cost.seconds_per_token(model, window=file.window, sequences=teacher.micro_batch, limit_seconds=limit)
            for name, model in (("teacher", file.teacher), ("student", file.student))
        }
    )
    corpus = cost.num_sequences(file.corpus, "corpus", file.student, file.window)
    yield "teacher", [cost.run_cost(teacher, sequences_of(teacher, corpus), speed["teacher"])]
    if any(job.experiment in READS_CACHE for job in jobs):
        yield "capture", [cost.capture_cost(capture_config, corpus, speed["teacher"])]
    groups: dict[str, list[cost.Cost]] = {}
    for job in jobs:
        one = composed(job)
        label = job.label.removesuffix(f" seed {job.seed}")
        groups.setdefault(label, []).append(cost.run_cost(one, sequences_of(one, corpus), speed["student"]))
    yield from groups.items()


def sequences_of(config: TrainConfig, corpus: float) -> float:
    """Windows of an epoch: of gold where that is all it reads, else of the corpus and the gold mixed in."""
    if config.gold_fraction < 1:
        return corpus / (1 - config.gold_fraction)
    assert config.gold is not None
    return cost.num_sequences(config.gold, "gold", config.student, config.window)


def composed(job: Job) -> TrainConfig:
    """The options of a job, before its teacher and cache are known."""
    config = compose_job("train", [*job.arguments, "cache=null", *WITHOUT_TEACHER])
    assert isinstance(config, TrainConfig)
    return config


def duration(seconds: float) -> str:
    """Seconds below 2 minutes, minutes below 2 hours, else hours."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


# ------------------------------------------------------------------------------------------- steps


def run_teacher(study: Study) -> Teacher:
    """Train and score the teacher, or score the ready-made one."""
    job = teacher_job(study)
    print(f"\n==> {job.experiment}  ({command('train', study, job.arguments)})")
    prepared = training.prepare(quiet(compose_job("train", job.arguments)))
    training.run_prepared(prepared)
    folder = prepared.paths.folder
    model = str(prepared.paths.model) if study.trains_teacher else study.file.teacher.path
    return Teacher(model=model, folder=folder)


def teacher_options(teacher: Teacher) -> list[str]:
    """Of scripts/capture.py: exactly this teacher, where a study has trained several."""
    return [f"teacher.path={quoted([teacher.model])[1:-1]}"]


def with_inputs(job: Job, teacher: Teacher, cache: str | None) -> Job:
    """The job with the exact folders of its teacher and its cache, where a glob might match several."""
    found = {"scoring.teacher_predictions": teacher.folder / "predictions-test.parquet"}
    found["scoring.teacher_dev_predictions"] = teacher.folder / "predictions-dev.parquet"
    overrides = [f"{name}={quoted([str(path)])[1:-1]}" for name, path in found.items() if path.exists()]
    if job.experiment in READS_CACHE:
        assert cache is not None
        overrides.append(f"cache={quoted([cache])[1:-1]}")
    return dataclasses.replace(job, overrides=(*overrides, *job.overrides))


def run_students(jobs: Sequence[Job]) -> list[str]:
    """One run after the other, in this process; what failed, after the others have run."""
    started, failed = time.monotonic(), []
    for number, job in enumerate(jobs, 1):
        head = f"\n==> [{number}/{len(jobs)}] {job.label}"
        try:
            prepared = training.prepare(quiet(compose_job("train", job.arguments)))
            print(f"{head}: {'finished before' if prepared.is_complete() else prepared.paths.folder}", flush=True)
            score = training.run_prepared(prepared)
        except (InputError, RunFailed) as error:
            print(f"{head} failed: {error}", flush=True)
            failed.append(job.label)
            continue
        if score is not None:
            print(f"    score {score:.4f}; {duration(time.monotonic() - started)} so far", flush=True)
    return failed


def launch(launcher: str, study: Study, jobs: Sequence[Job]) -> list[str]:
    """All runs through a launcher of Hydra: for each setting a sweep over the seeds, all at once; what failed."""
    seeds: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for job in jobs:
        seeds.setdefault((job.experiment, job.overrides), []).append(str(job.seed))
    place = [] if study.config_dir is None else ["--config-dir", study.config_dir]
    sweeps: dict[str, subprocess.Popen[bytes]] = {}
    for (experiment, overrides), of_job in seeds.items():
        arguments = [f"study={study.given}", f"hydra/launcher={launcher}", f"experiment={experiment}", *overrides]
        label = f"{experiment}, seeds {', '.join(of_job)}"
        print(f"==> {launcher}: {label}", flush=True)
        train = [sys.executable, str(PACKAGE / "scripts" / "train.py"), "-m", *place, *arguments]
        sweeps[f"{label} ({len(sweeps) + 1})"] = subprocess.Popen([*train, f"seed={','.join(of_job)}"])
    return [label for label, sweep in sweeps.items() if sweep.wait() != 0]


def quiet(config: TrainConfig) -> TrainConfig:
    """The same run with few progress lines, its ranks' log lines in its folder alone."""
    launcher = dataclasses.replace(config.launcher, log_every_seconds=LOG_EVERY_SECONDS, quiet=True)
    return dataclasses.replace(config, launcher=launcher)


def command(script: str, study: Study, overrides: Sequence[str]) -> str:
    """What the same step would be by hand."""
    return " ".join([study.command.replace("study.py", f"{script}.py"), *overrides])
