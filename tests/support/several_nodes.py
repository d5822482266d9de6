"""A run on several nodes as its users start it, one command a node: here all on this machine, each with its ranks."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass
class Command:
    """The command of one node."""

    process: subprocess.Popen
    output: Path

    def wait(self, seconds: float = 240) -> int:
        return self.process.wait(seconds)

    def text(self) -> str:
        return self.output.read_text()

    def kill_node(self) -> None:
        """As if the machine had lost its power: the command, torchrun and the ranks at once."""
        kill_all(self.process.pid)


def kill_all(pid: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        all_of_node = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        for one in all_of_node:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def place(rank: int, port: int, num_nodes: int = 2) -> list[str]:
    """The options in which the commands of the nodes differ, and those of their meeting."""
    options = [f"launcher.num_nodes={num_nodes}", f"launcher.node_rank={rank}", "launcher.rendezvous_host=127.0.0.1"]
    return [*options, f"launcher.rendezvous_port={port}"]


@contextlib.contextmanager
def started(arguments: Sequence[Sequence[str]], folders: Sequence[Path]) -> Iterator[list[Command]]:
    """Python with the arguments of each node in its folder; what is left is killed at the end."""
    commands = []
    for rank, (given, folder) in enumerate(zip(arguments, folders, strict=True)):
        output = folder / f"node{rank}.txt"
        with output.open("w") as file:
            command = [sys.executable, *given]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}  # as four ranks on one node have, to the last bit
            process = subprocess.Popen(command, cwd=folder, stdout=file, stderr=file, env=environment)
        commands.append(Command(process, output))
    try:
        yield commands
    finally:
        for command in commands:
            kill_all(command.process.pid)
            command.process.wait()


def seconds_until_end(commands: Sequence[Command]) -> float:
    began = time.monotonic()
    for command in commands:
        command.wait()
    return time.monotonic() - began
