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


def jobs_of(study: Study, students: Sequence[Job], cluster: ClusterConfig, *, captures: bool) -> list[BatchJob]:
    """Teacher, capture, students, report; `captures`: whether a student reads the cache.

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
    jobs.append(
        BatchJob(
            name="students",
            purpose="one run a job; what is finished is skipped.",
            command=(*train, *nodes),
            tasks=tuple(tuple(job.arguments) for job in students),
            nodes=cluster.nodes,
            after_success=jobs[-1].name,
        )
    )
    report = command("report", study, cluster)
    what = "compare what is finished."
    return [*jobs, BatchJob(name="report", purpose=what, command=report, has_gpus=False, after="students")]


def command(script: str, study: Study, cluster: ClusterConfig, *options: str) -> tuple[str, ...]:
    """One of this project's scripts for a study, as a job runs it in the folder of this process."""
    path = PACKAGE.parent / "scripts" / f"{script}.py"
    if not path.is_file():  # an installed package has its scripts inside
        path = PACKAGE / "scripts" / f"{script}.py"
    shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    place = () if study.config_dir is None else ("--config-dir", study.config_dir)
    return (cluster.python or sys.executable, str(shown), *place, f"study={study.given}", *options)
