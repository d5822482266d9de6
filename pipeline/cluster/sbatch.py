"""One batch job of SLURM as the text of its file."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipeline.config.cluster import ClusterConfig

RUN_AND_REQUEUE = """\
# A signal ends the command with its work saved and exit code 75, and so does launcher.time_limit: the job is queued
# again, and goes on. USR1 comes before the time limit. After TERM, which comes at a preemption and at scancel, it is
# left to SLURM, which queues a preempted job again. The id of an array alone would mean all its jobs.
signal="" code=0
trap 'signal=USR1; kill -s USR1 "$command"' USR1
trap 'signal=TERM; kill -s TERM "$command"' TERM
"${run[@]}" &
command=$!
wait "$command" || code=$?
while kill -s 0 "$command" 2>/dev/null; do # a signal ends `wait`, and not the command
    code=0
    wait "$command" || code=$?
done
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
if [ "$code" = 75 ] && [ "$signal" != TERM ] && [ "$(squeue --noheader --jobs="$job" --format=%T)" = RUNNING ]; then
    scontrol requeue "$job"
fi
exit "$code"
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchJob:
    """A job, or an array of jobs, of a study."""

    name: str
    """Of the part of the study, such as `capture`; its file and its variable in submit.sh have it, too."""
    purpose: str
    """One sentence."""
    command: tuple[str, ...]
    """Words of a shell, quoted by `script_text`."""
    tasks: tuple[tuple[str, ...], ...] = ()
    """Of an array whose jobs differ: the further words of each, by its number."""
    workers: int = 0
    """Of an array of equal jobs: their number."""
    nodes: int = 1
    has_gpus: bool = True
    after_success: str | None = None
    """The job that must have succeeded before."""
    after: str | None = None
    """The job that must have ended before, however."""


def script_text(job: BatchJob, cluster: ClusterConfig, *, study: str, folder: str, origin: str, logs: str) -> str:
    """The sbatch file of a job.

    It runs in `folder`, and writes to a file in the folder `logs`; `origin` is the command that wrote it.
    """
    head = [f"# Study {study}: {job.purpose}", f"# Written by: {' '.join(origin.split())}"]
    options = [f"#SBATCH {option}" for option in sbatch_options(job, cluster, study=study, logs=logs)]
    words = [*shlex.split(cluster.prefix or ""), *job.command]
    # many a script that activates an environment reads variables that are not set
    body = ["set -eo pipefail", f"cd {shlex.quote(folder)}", *cluster.setup, "set -u", f"run=({shlex.join(words)})"]
    return "\n".join(["#!/usr/bin/env bash", *head, *options, "", *body, *_cases(job.tasks), "", RUN_AND_REQUEUE])


def sbatch_options(job: BatchJob, cluster: ClusterConfig, *, study: str, logs: str) -> Iterator[str]:
    """What stands after `#SBATCH`, one line each."""
    yield f"--job-name={shlex.quote(f'{study}-{job.name}')}"
    size = job.workers or len(job.tasks)
    if size:
        limit = "" if cluster.max_running is None else f"%{cluster.max_running}"
        yield f"--array=0-{size - 1}{limit}"
    yield f"--output={shlex.quote(logs)}/%x-{'%A_%a' if size else '%j'}.log"
    yield "--open-mode=append"
    asked: dict[str, str | int | None] = {
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
    }
    asked |= {"constraint": cluster.constraint, "nodes": job.nodes, "ntasks-per-node": 1}
    if job.has_gpus:
        asked |= {"gpus-per-node": cluster.gpus_per_node or None, "cpus-per-task": cluster.cpus_per_node}
        asked |= {"mem": cluster.memory}
    asked |= {"time": cluster.time, "mail-user": cluster.mail_user}
    asked |= {"mail-type": cluster.mail_type if cluster.mail_user else None}
    yield from (f"--{name}={value}" for name, value in asked.items() if value is not None)
    yield f"--signal=B:USR1@{cluster.leave_seconds}"
    yield "--requeue"
    yield from cluster.extra


def _cases(tasks: Sequence[Sequence[str]]) -> list[str]:
    """Which words the command gets further, by the number of a job in its array."""
    if not tasks:
        return []
    lines = [f"    {number}) run+=({shlex.join(words)}) ;;" for number, words in enumerate(tasks)]
    other = '    *) echo "no run has the number $SLURM_ARRAY_TASK_ID" >&2; exit 2 ;;'
    return ['case "$SLURM_ARRAY_TASK_ID" in', *lines, other, "esac"]


def submission_text(jobs: Sequence[BatchJob], *, study: str, folder: str, files: Sequence[str]) -> str:
    """The script that submits all jobs in their order; `files` are theirs."""
    lines = ["#!/usr/bin/env bash", f"# Submits the jobs of study {study}, each after those that it needs.", ""]
    lines += ["set -euo pipefail", f"cd {shlex.quote(folder)}"]
    for job, file in zip(jobs, files, strict=True):
        needs = {"afterok": job.after_success, "afterany": job.after}
        waits = ",".join(f"{kind}:${name}" for kind, name in needs.items() if name is not None)
        after = f' --dependency="{waits}" --kill-on-invalid-dep=yes' if waits else ""
        lines.append(f"{job.name}=$(sbatch --parsable{after} {shlex.quote(file)})")
    shown = " ".join(f"{job.name}=${job.name}" for job in jobs)
    return "\n".join([*lines, f'echo "submitted: {shown}"', ""])
