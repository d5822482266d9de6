"""How the ranks of a run are started: torchrun on this machine, on this node of several, or through srun on all."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence

import torch

from pipeline.config.parallel import STARTED_VARIABLE
from pipeline.config.schema import TrainConfig
from pipeline.core.files import RunPaths
from pipeline.core.processes import this_process
from pipeline.core.runtime import module_command
from pipeline.training.nodes import OF_TORCHRUN, Node, attempt_of, job_port

# Schedulers send them to all processes of a job: the ranks save and leave, and torchrun after them
LEFT_TO_RANKS = ("SIGUSR1", "SIGUSR2", "SIGTERM")
STARTED = float(os.environ.get(STARTED_VARIABLE) or time.time())  # when this command started; its time may be limited


# On a CPU an optimizer step moves gigabytes. An allocator that returns them to the kernel after each step pays a page
# fault for every page of the next: a step of SmolLM2 took 0.5 to 1.5 s, with these settings 0.2 s. Variables that the
# user's environment sets already are kept.
ALLOCATOR_SETTINGS = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TOP_PAD_": str(1 << 28),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "THP_MEM_ALLOC_ENABLE": "1",
}


def ranks_command(
    rank: Sequence[str], *, num_nodes: int, num_processes: int, node: Node | None = None, port: int = 0
) -> list[str]:
    """The command that runs the command `rank` as `num_processes` ranks on each node.

    With `node` it starts those of this node alone, and they meet on node 0 at `port`.
    """
    torchrun = ["torch.distributed.run", f"--nproc-per-node={num_processes}", "--no-python"]
    if node is not None:
        meeting = [f"--nnodes={node.count}", f"--node-rank={node.rank}", "--rdzv-backend=static"]
        meeting += [f"--master-addr={node.host}", f"--master-port={port}"]
        return module_command(*torchrun, *meeting, *rank, never_handled=LEFT_TO_RANKS)
    if num_nodes == 1:
        return module_command(*torchrun, "--standalone", *rank, never_handled=LEFT_TO_RANKS)
    meeting = [f"--nnodes={num_nodes}", "--rdzv-backend=c10d", *rendezvous(os.environ, socket.gethostname())]
    return [*srun(os.environ, num_nodes), *module_command(*torchrun, *meeting, *rank, never_handled=LEFT_TO_RANKS)]


def srun(variables: Mapping[str, str], num_nodes: int) -> list[str]:
    """One task a node; the ranks of a node that fails do not leave those of the others waiting."""
    words = ["srun", f"--nodes={num_nodes}", f"--ntasks={num_nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]
    words.append("--wait=0")  # nodes may end minutes before the last one
    # since release 22.05 srun does not take this from the job
    return words + [f"--cpus-per-task={cpus}" for cpus in [variables.get("SLURM_CPUS_PER_TASK")] if cpus]


def rendezvous(variables: Mapping[str, str], host: str) -> list[str]:
    """Where the nodes of this attempt meet: on this node, at a port that an earlier attempt of the job did not use."""
    return [f"--rdzv-id={attempt_of(variables)}", f"--rdzv-endpoint={host}:{job_port(variables)}"]


def worker_command(paths: RunPaths) -> list[str]:
    """The command of a rank."""
    return module_command("pipeline.training.worker", str(paths.folder))


def start_process(
    config: TrainConfig, command: list[str], *, num_processes: int, lock: int | None = None
) -> subprocess.Popen[bytes]:
    """Start the process of the ranks, or the one that scores, on this machine, with the variables that they need."""
    threads = {"OMP_NUM_THREADS": str(max(len(os.sched_getaffinity(0)) // num_processes, 1))}
    defaults = threads if torch.cuda.is_available() else threads | ALLOCATOR_SETTINGS
    inherited = {name: value for name, value in os.environ.items() if name not in OF_TORCHRUN}
    variables = defaults | inherited | {"PIPELINE_DRIVER": this_process()}
    if config.launcher.time_limit is not None:
        stop_at = STARTED + 60.0 * config.launcher.time_limit - config.launcher.leave_seconds
        variables["PIPELINE_STOP_AT"] = str(stop_at)
    # a session of its own: Ctrl-C reaches this process alone, and the ranks through the stop file; they inherit the
    # lock, so that it is held until the last rank has ended even if this process is killed
    kept = () if lock is None else (lock,)
    return subprocess.Popen(command, env=variables, start_new_session=True, pass_fds=kept)
