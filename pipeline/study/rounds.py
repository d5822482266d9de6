"""Rounds of pools: the students of the folds learn from the pool of the round before, in the first from the teacher.

In each round the pool is of the teacher's capture and of new students of the folds. The students of each round's pool
are arms of the report, beside those of the round before; dev decides whether another round follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.config.commands import StudyConfig
from pipeline.core.files import RunPaths
from pipeline.core.types import InputError, RunFailed
from pipeline.report.arms import dev_score
from pipeline.report.runs import read_run
from pipeline.study.forecast import Composer
from pipeline.study.members import make_pool
from pipeline.study.plan import POOLED, Job
from pipeline.study.students import Teacher, run_jobs, with_inputs


def run_rounds(
    config: StudyConfig, composer: Composer, jobs: Sequence[Job], teacher: Teacher, cache: str
) -> tuple[list[Path], list[str]]:
    """Pools and the students that learn from them: their folders, and the labels of those that failed.

    A pool that cannot be made, as without one of its members, fails its students. The rounds end where the mean score
    on dev over the seeds is not above that of the round before.
    """
    made, failed = list[Path](), list[str]()
    source, before = cache, None
    for number in range(1, config.rounds + 1):
        try:
            source = make_pool(config, composer, teacher, cache, source=source, number=number)
        except (InputError, RunFailed) as error:
            print(f"==> {POOLED} has no pool: {error}")
            return made, [*failed, *(f"{job.label} (without its pool: {error})" for job in jobs)]
        inputs = [with_inputs(composer, job, teacher, source) for job in jobs]
        folders, lost = run_jobs(config, composer, jobs, inputs)
        made, failed = [*made, *folders], [*failed, *lost]
        if number == config.rounds or lost:
            break
        score = dev_score([read_run(RunPaths(folder=folder)) for folder in folders])
        assert score is not None, "a study without dev has one round"
        former = "" if before is None else f", {before:.4f} before"
        print(f"==> round {number} of {config.rounds}: {score:.4f} on dev{former}")
        if before is not None and score <= before:
            print("==> the rounds end here: dev gains no more")
            break
        before = score
    return made, failed
