"""Run a study: print the plan and its cost, then make what is missing, from the teacher to the report."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.cache.manifest import load_manifest
from pipeline.capture import driver as capture
from pipeline.config.commands import StudyConfig
from pipeline.config.compose import open_study
from pipeline.config.overrides import compose_job
from pipeline.config.schema import IfBusy, Role
from pipeline.config.study import Study
from pipeline.core.object_store import one_location
from pipeline.core.progress import log, start_logging
from pipeline.core.stopping import Stopped
from pipeline.core.types import RunFailed
from pipeline.declare.leaks import check_texts
from pipeline.report import commands as report
from pipeline.report.pools import is_made_from, kept_pool, pool_of
from pipeline.report.runs import MEMBER, read_config
from pipeline.study.forecast import Composer, check_jobs, jobs_at_once, print_plan, texts_of, with_curve_length
from pipeline.study.members import check_pool, make_pool, pool_words
from pipeline.study.plan import POOLED, Job, fold_jobs, student_jobs, teacher_job
from pipeline.study.rounds import run_rounds
from pipeline.study.students import Teacher, check_at_once, command, quiet, run_jobs, text_value, with_inputs
from pipeline.training import driver as training


def run(config: StudyConfig) -> None:
    """Make every run that the study lacks, then its report; the same command again continues."""
    start_logging()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # in order with the lines of the ranks
    study = open_study(config.study, config.study_dir)
    composer = Composer(study)
    jobs = student_jobs(config, study)
    check_pool(config, composer, jobs)
    check_jobs(composer, [*fold_jobs(config, study)[:1], *jobs])
    check_texts(texts_of(study), allowed=study.file.allow_shared_records)
    jobs = [with_curve_length(composer, job) for job in jobs]
    check_at_once(config, jobs_at_once(composer, [*fold_jobs(config, study)[:1], *jobs]))
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
        place = f"teacher.path={text_value(teacher.model)}"  # exactly this one, where a study has trained several
        print(f"\n==> capture: the teacher reads the corpus  ({command('capture', study, [place])})")
        cache = str(capture.run(composer.capture(place)))
        start_logging(quiet=True)
    if config.stop_after_pool:
        assert cache is not None
        print(f"\n==> the pool is there: {make_pool(config, composer, teacher, cache, source=cache, number=1)}")
        return
    pooled = [job for job in jobs if job.experiment == POOLED]
    others = [job for job in jobs if job.experiment != POOLED]
    students = [with_inputs(composer, job, teacher, cache) for job in others]
    made, failed = run_jobs(config, composer, others, students)
    if pooled:
        assert cache is not None
        of_pools, without = run_rounds(config, composer, pooled, teacher, cache)
        made, failed = [*made, *of_pools], [*failed, *without]
    print(f"\n==> report  ({command('report', study, [])})")
    again = " ".join([config.command, *map(shlex.quote, [*pool_words(config, study), *config.overrides])])
    runs = [str(folder) for folder in folders_of(study, [teacher.folder, *made], cache)]
    report.run(dataclasses.replace(compose_job("report", [], study=study), command=again, runs=runs))
    if failed:
        raise RunFailed(f"{len(failed)} of {len(jobs)} failed: {'; '.join(failed)}; the same command repeats these")


def folders_of(study: Study, made: Sequence[Path], cache: str | None) -> list[Path]:
    """The runs that belong together: those `made` now, and earlier students of the same cache, its pools or of none.

    A study whose teacher, capture or ceiling was changed has runs of both in its folder.
    """
    fingerprint = None if cache is None else load_manifest(one_location(cache, "cache")).fingerprint
    configs = {folder: read_config(folder / "config.yaml") for folder in _finished(study)}
    roles = {folder: config.get("role") for folder, config in configs.items() if config.get("role") != MEMBER}
    once = {Role.teacher.name, Role.ceiling.name} & {roles.get(folder) for folder in made}
    kept, num_others = [], 0
    for folder, role in roles.items():
        read = json.loads((folder / "identity.json").read_text()).get("cache", fingerprint)
        reads_other = fingerprint not in (None, read)
        if reads_other and fingerprint is not None:
            pool = kept_pool(folder) or pool_of(configs[folder].get("cache"), read)
            reads_other = not is_made_from(pool, fingerprint)
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
