"""The batch jobs of a study: what each part of it runs, and after which other."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.cluster.sbatch import BatchJob
from pipeline.config.cluster import ClusterConfig
from pipeline.config.groups import PACKAGE
from pipeline.config.study import Study
from pipeline.study.plan import Job, teacher_job

ONLY_POOL = ("probe_seconds=0", "stop_after_pool=true")
"""Options of scripts/study.py."""


def jobs_of(
    study: Study,
    students: Sequence[Job],
    cluster: ClusterConfig,
    *,
    captures: bool,
    folds: Sequence[Job] = (),
    pool: Sequence[str] = (),
) -> list[BatchJob]:
    """Teacher, capture, pool, students, report; `captures`: whether a student reads the cache.

    `folds`: where a pool is asked for, the students of all folds, its members; `pool`: the options of scripts/study.py
    that make it of them.

    After the capture's array one further job captures what is left, usually nothing: the students wait for its success,
    since a job of the array may be cancelled while the others make the cache without it.
    """
    teacher = teacher_job(study)
    ranks = (f"launcher.num_processes={cluster.gpus_per_node}",) if cluster.gpus_per_node > 1 else ()
    # two jobs may be one run, as combined and its own value in a grid, and a job may meet what it left behind
    train = command("train", study, cluster, *ranks, "launcher.if_busy=wait")
    jobs = [BatchJob(name="teacher", purpose="train and score the teacher.", command=(*train, *teacher.arguments))]
    if captures:
        workers = (f"num_workers={cluster.gpus_per_node}",) if cluster.gpus_per_node > 1 else ()
        capture = command("capture", study, cluster, *workers)
        what = "the teacher reads the corpus; the jobs share it, however many run and whenever."
        first = BatchJob(name="capture", purpose=what, command=capture, after_success="teacher")
        rest = dataclasses.replace(first, name="cache", purpose="capture what is left of the corpus.", after="capture")
        jobs += [dataclasses.replace(first, workers=cluster.capture_jobs), rest]
    nodes = (f"launcher.num_nodes={cluster.nodes}",) if cluster.nodes > 1 else ()
    array = BatchJob(
        name="students",
        purpose="one run a job; what is finished is skipped.",
        command=(*train, *nodes),
        tasks=tuple(tuple(job.arguments) for job in students),
        nodes=cluster.nodes,
        after_success=jobs[-1].name,
        after="pool" if folds else None,  # without it the others are trained all the same
    )
    if folds:
        jobs += _pool_jobs(array, folds, command("study", study, cluster, *pool, *ONLY_POOL))
    jobs.append(array)
    report = command("report", study, cluster)
    what = "compare what is finished."
    return [*jobs, BatchJob(name="report", purpose=what, command=report, has_gpus=False, after="students")]


def _pool_jobs(students: BatchJob, folds: Sequence[Job], make: tuple[str, ...]) -> list[BatchJob]:
    """The students of the folds, an array like that of all `students`; and the pool, which the command `make` makes."""
    what = "one student a fold, a member of the pool; what is finished is skipped."
    tasks = tuple(tuple(job.arguments) for job in folds)
    of_folds = dataclasses.replace(students, name="cross_fit", purpose=what, tasks=tasks, after=None)
    what = "capture each fold by its student, and pool the captures."
    return [of_folds, BatchJob(name="pool", purpose=what, command=make, after_success="cross_fit")]


def command(script: str, study: Study, cluster: ClusterConfig, *options: str) -> tuple[str, ...]:
    """One of this project's scripts for a study, as a job runs it in the folder of this process."""
    path = PACKAGE.parent / "scripts" / f"{script}.py"
    if not path.is_file():  # an installed package has its scripts inside
        path = PACKAGE / "scripts" / f"{script}.py"
    shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    place = () if study.config_dir is None else ("--config-dir", study.config_dir)
    return (cluster.python or sys.executable, str(shown), *place, f"study={study.given}", *options)
