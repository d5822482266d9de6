"""Where this command stands among the nodes of a run: from its options, or from the variables of srun or torchrun."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.config.schema import LauncherConfig
from pipeline.core.types import InputError

PLACE = ("node_rank", "rendezvous_host", "rendezvous_port")  # options of the launcher
DEFAULT_PORT = 29500  # torchrun's
FIRST_PORT, NUM_PORTS = 20_000, 10_000
# what torchrun sets for each process that it starts; our own torchrun sets them anew
OF_TORCHRUN = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK"),
    *("ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"),
    *("TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_USE_AGENT_STORE"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One of several nodes, each with a command of its own, and the place where these meet."""

    rank: int
    """From 0. Node 0 holds the lock of the run, and writes its folder."""
    count: int
    host: str
    port: int
    has_store: bool = False
    """Whether torchrun, which started this command, answers there already; else node 0 does."""
    session: str = ""
    """What an earlier attempt at the same place did not have; the same on all nodes."""


def this_node(options: LauncherConfig, variables: Mapping[str, str]) -> Node | None:
    """The place of this command; None where it starts the ranks of all nodes itself, or there is one node.

    An option counts more than a variable. What is half given or contradicts itself is an InputError.
    """
    count = options.num_nodes
    if count < 1:
        raise InputError(f"launcher.num_nodes: expected at least 1, found {count}; correct it")
    given = [name for name in PLACE if getattr(options, name) is not None]
    torchrun = of_torchrun(variables, count)
    if count == 1:
        if given:
            raise InputError(
                f"launcher.{given[0]}={getattr(options, given[0])}: expected launcher.num_nodes of 2 or more with it, "
                "found 1; give the number of nodes too, or leave it out"
            )
        return None
    found = torchrun or of_srun(variables, count)
    if found is None:
        return placed(options) if given else None
    if options.node_rank not in (None, found.rank):
        raise InputError(
            f"launcher.node_rank={options.node_rank}: expected {found.rank}, the place of this command by srun or "
            "torchrun, which started it; leave the option out"
        )
    if options.rendezvous_host is None and options.rendezvous_port is None:
        return found
    port = options.rendezvous_port or (found.port if options.rendezvous_host is None else DEFAULT_PORT)
    host = options.rendezvous_host or found.host
    return dataclasses.replace(found, host=host, port=valid_port(port), has_store=False)


def placed(options: LauncherConfig) -> Node:
    """The node that the options alone describe."""
    count, rank, host = options.num_nodes, options.node_rank, options.rendezvous_host
    if rank is None or host is None:
        missing = " and ".join(f"launcher.{name}" for name in PLACE[:2] if getattr(options, name) is None)
        raise InputError(
            f"launcher.num_nodes={count}: expected launcher.node_rank and launcher.rendezvous_host on each node, found "
            f"no {missing}; give it, or start the command by srun or torchrun, one process a node"
        )
    if not 0 <= rank < count:
        raise InputError(
            f"launcher.node_rank={rank}: expected 0 to {count - 1} with launcher.num_nodes={count}, found another "
            "number; number the nodes from 0"
        )
    port = DEFAULT_PORT if options.rendezvous_port is None else options.rendezvous_port
    return Node(rank=rank, count=count, host=host, port=valid_port(port))


def valid_port(port: int) -> int:
    """The port; InputError where none has this number."""
    if not 1 <= port <= 65535:
        raise InputError(f"launcher.rendezvous_port: expected 1 to 65535, found {port}; correct it")
    return port


# ---------------------------------------------------------------------------------------- torchrun


def of_torchrun(variables: Mapping[str, str], count: int) -> Node | None:
    """The place that torchrun has given to this command, one process a node; None if it did not start it."""
    if "TORCHELASTIC_RUN_ID" not in variables:
        return None
    local = int(variables["LOCAL_WORLD_SIZE"])
    if local > 1:
        raise InputError(
            f"torchrun: expected one process a node, because this command starts its ranks itself, found {local}; use "
            "torchrun --nproc-per-node=1, or no torchrun, and launcher.num_processes for the ranks of a node"
        )
    nodes = int(variables["GROUP_WORLD_SIZE"])
    if nodes != count:
        raise InputError(
            f"launcher.num_nodes={count}: expected {nodes}, the nodes on which torchrun has started this command; "
            f"give launcher.num_nodes={nodes}"
        )
    if nodes == 1:
        return None
    return Node(
        rank=int(variables["GROUP_RANK"]),
        count=nodes,
        host=variables["MASTER_ADDR"],
        port=int(variables["MASTER_PORT"]),
        has_store=variables.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        session=f"{variables['TORCHELASTIC_RUN_ID']}-{variables.get('TORCHELASTIC_RESTART_COUNT', '0')}",
    )


# ------------------------------------------------------------------------------------------- SLURM


def of_srun(variables: Mapping[str, str], count: int) -> Node | None:
    """The place of this command in a step of srun over several nodes, one task a node; None outside of such a step."""
    nodes, tasks = (int(variables.get(f"SLURM_STEP_NUM_{what}", "1")) for what in ("NODES", "TASKS"))
    if nodes == 1:  # also the shell of salloc, and a batch script
        return None
    if nodes != count or tasks != nodes:
        raise InputError(
            f"srun: expected {count} nodes (launcher.num_nodes) with one task each, because this command starts its "
            f"ranks itself, found {tasks} tasks on {nodes} nodes; use srun --nodes={count} --ntasks-per-node=1"
        )
    attempt = attempt_of(variables)
    return Node(
        rank=int(variables["SLURM_NODEID"]),
        count=nodes,
        host=first_host(variables.get("SLURM_STEP_NODELIST") or variables["SLURM_JOB_NODELIST"]),
        port=job_port(variables),
        session=f"{attempt}-{variables.get('SLURM_STEP_ID', '0')}",
    )


def check_allocation(count: int, variables: Mapping[str, str]) -> None:
    """Refuse to start the ranks of several nodes outside of a job that has so many."""
    allocated = int(variables.get("SLURM_JOB_NUM_NODES", "0"))
    if count > 1 and allocated < count:
        found = f"one of {allocated}" if "SLURM_JOB_ID" in variables else "neither"
        raise InputError(
            f"launcher.num_nodes={count}: expected launcher.node_rank and launcher.rendezvous_host on each node, or to "
            f"run in a job of SLURM with so many nodes, found {found}; docs/clusters.md has the commands, and "
            "scripts/submit.py with cluster.nodes= makes such a job"
        )


def attempt_of(variables: Mapping[str, str]) -> str:
    """A name for this attempt of the job: its number and how often it was queued again."""
    return f"{variables['SLURM_JOB_ID']}-{variables.get('SLURM_RESTART_COUNT', '0')}"


def job_port(variables: Mapping[str, str]) -> int:
    """A port that an earlier attempt of the job did not use."""
    job, attempt = map(int, attempt_of(variables).split("-"))
    return FIRST_PORT + (job * 7 + attempt) % NUM_PORTS


def first_host(names: str) -> str:
    """The first of the nodes that SLURM writes as `rack1-node[03-05,9],login`: rack1-node03."""
    first = re.split(r",(?![^\[]*\])", names)[0]
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first)
