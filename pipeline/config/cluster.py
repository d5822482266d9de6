"""The options of batch jobs: what scripts/submit.py asks of SLURM."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config.options import option


@dataclass
class ClusterConfig:
    """What is null is left out of the files, so that the cluster's own default holds."""

    partition: str | None = option(None, "partition of every job")
    account: str | None = option(None, "account that is charged")
    qos: str | None = option(None, "quality of service")
    constraint: str | None = option(None, "features that a node must have, as a100|h100")
    time: str | None = option(None, "time limit of each job, as 4:00:00; a job that reaches it is queued again")
    leave_seconds: int = option(300, "seconds before that limit at which a job saves its work and is queued again")
    nodes: int = option(1, "nodes of one training run")
    gpus_per_node: int = option(0, "GPUs of a node: ranks of a training run there, workers of a capture job; 0: CPUs")
    cpus_per_node: int | None = option(None, "CPU cores of a node")
    memory: str | None = option(None, "memory of a node, as 64G; 0: all of it")
    capture_jobs: int = option(4, "jobs that capture together; any number of them, at any time, makes the same cache")
    max_running: int | None = option(None, "jobs of an array that run at the same time; null: all there is room for")
    mail_user: str | None = option(None, "address that is written to")
    mail_type: str = option("FAIL", "events that are written about, where mail_user is given")
    setup: list[str] = option(list, "lines of shell before each command, as [module load cuda]")
    prefix: str | None = option(None, "words before each command, as `apptainer exec --nv image.sif`")
    python: str | None = option(None, "Python of the jobs; null: the one that runs this command")
    extra: list[str] = option(list, "further options of sbatch, as [--exclusive]")
