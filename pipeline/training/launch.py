"""How the ranks of a run are started: torchrun on this machine, or through srun on every node of a SLURM job."""

from __future__ import annotations

import dataclasses
import os
import socket
from collections.abc import Mapping, Sequence

from torch.distributed.launcher.api import LaunchConfig

from pipeline.core.runtime import module_command
from pipeline.core.types import InputError

FIRST_PORT, NUM_PORTS = 20_000, 10_000
LEFT_TO_RANKS = ("SIGUSR1", "SIGUSR2", "SIGTERM")


def check_nodes(num_nodes: int) -> None:
    """Refuse several nodes outside of a job that has them."""
    if num_nodes < 1:
        raise InputError(f"launcher.num_nodes: expected at least 1, found {num_nodes}; correct it")
    allocated = int(os.environ.get("SLURM_JOB_NUM_NODES", "0"))
    if num_nodes > 1 and allocated < num_nodes:
        found = f"one of {allocated}" if "SLURM_JOB_ID" in os.environ else "none"
        raise InputError(
            f"launcher.num_nodes={num_nodes}: expected to run in a job of SLURM with so many nodes, found {found}; "
            "scripts/submit.py with cluster.nodes= makes one"
        )


def ranks_command(rank: Sequence[str], *, num_nodes: int, num_processes: int) -> list[str]:
    """The command that runs the command `rank` as `num_processes` ranks on each node."""
    torchrun = ["torch.distributed.run", f"--nproc-per-node={num_processes}", "--no-python", *unhandled_signals()]
    if num_nodes == 1:
        return module_command(*torchrun, "--standalone", *rank, ignored=LEFT_TO_RANKS)
    meeting = [f"--nnodes={num_nodes}", "--rdzv-backend=c10d", *rendezvous(os.environ, socket.gethostname())]
    return [*srun(os.environ, num_nodes), *module_command(*torchrun, *meeting, *rank, ignored=LEFT_TO_RANKS)]


def unhandled_signals() -> list[str]:
    """The option by which torchrun leaves SIGTERM to the ranks; releases without it end them, and with an error.

    Schedulers send it to all processes of a job. The ranks save and leave, and torchrun after them.
    """
    supported = {item.name for item in dataclasses.fields(LaunchConfig)}
    return ["--signals-to-handle=SIGHUP"] if "signals_to_handle" in supported else []


def srun(variables: Mapping[str, str], num_nodes: int) -> list[str]:
    """One task a node; the ranks of a node that fails do not leave those of the others waiting."""
    words = ["srun", f"--nodes={num_nodes}", f"--ntasks={num_nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]
    words.append("--wait=0")  # nodes may end minutes before the last one
    # since release 22.05 srun does not take this from the job
    return words + [f"--cpus-per-task={cpus}" for cpus in [variables.get("SLURM_CPUS_PER_TASK")] if cpus]


def rendezvous(variables: Mapping[str, str], host: str) -> list[str]:
    """Where the nodes of this attempt meet: on this node, at a port that an earlier attempt of the job did not use."""
    job, attempt = int(variables["SLURM_JOB_ID"]), int(variables.get("SLURM_RESTART_COUNT", "0"))
    port = FIRST_PORT + (job * 7 + attempt) % NUM_PORTS
    return [f"--rdzv-id={job}-{attempt}", f"--rdzv-endpoint={host}:{port}"]
