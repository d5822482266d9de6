"""The ranks of a run on several nodes: started together, in one folder, and ended together."""

from __future__ import annotations

import contextlib
import secrets
import signal
import socket
import subprocess
import time
from pathlib import Path

from pipeline.core.progress import log
from pipeline.core.types import InputError
from pipeline.training.meeting import POLL_SECONDS, Meeting

GRACE_SECONDS = 12.0  # for ranks to end by themselves
SHARED_SECONDS = 60.0  # NFS shows a new file within so long


def check_same_run(meeting: Meeting) -> None:
    """At node 0: wait until all nodes have read their inputs; InputError where they did not find the same run."""
    meeting.wait_for_others(lambda report: report.folder)
    for rank, report in meeting.others().items():
        for what, found, own in (
            ("run folder", report.folder, meeting.own.folder),
            ("number of ranks", report.num_processes, meeting.own.num_processes),
        ):
            if found != own:
                raise InputError(
                    f"launcher.num_nodes={meeting.node.count}: expected the same {what} on all nodes, found {own} on "
                    f"node 0 and {found} on node {rank}; give each the same options, inputs and versions"
                )


def gather(meeting: Meeting, folder: Path) -> int:
    """At node 0, before its ranks start: wait until all others see a new file in the run's folder; returns the port."""
    token = folder / f".{secrets.token_hex(8)}.shared"
    start, port = meeting.own.start + 1, free_port()
    token.touch()
    try:
        meeting.report(start=start, token=token.name, port=port, exit_code=None)
        meeting.wait_for_others(lambda report: report.start == start)
    finally:
        token.unlink(missing_ok=True)
    return port


def find_folder(meeting: Meeting, folder: Path, token: str, start: int) -> None:
    """At another node: see the file of node 0 in the run's folder; InputError where it is not there in time."""
    deadline = time.monotonic() + SHARED_SECONDS
    while not (folder / token).exists():  # a name that no client of NFS has looked up before
        if time.monotonic() > deadline:
            raise InputError(
                f"runs_dir: expected {folder.absolute()} to be the folder that node 0 writes, found no file of it for "
                f"{SHARED_SECONDS:.0f} s; all nodes have to share it: give a folder that they share with runs_dir="
            )
        time.sleep(POLL_SECONDS)
    meeting.report(start=start, exit_code=None)


def watch(meeting: Meeting, process: subprocess.Popen[bytes]) -> int:
    """Wait for the ranks of this node; returns their exit code.

    Where those of another node failed, or it was lost, they are ended after a while. Until then they may end by
    themselves: with a checkpoint, where only a command was killed.
    """
    ends_at = float("inf")
    while (code := process.poll()) is None:
        if ends_at == float("inf") and (reason := meeting.trouble()):
            log.error("%s: the ranks of this node end", reason)
            ends_at = time.monotonic() + GRACE_SECONDS
        if time.monotonic() > ends_at:
            process.send_signal(signal.SIGHUP)  # torchrun ends its ranks then
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_SECONDS)
            process.kill()
        time.sleep(POLL_SECONDS)
    meeting.report(exit_code=code)
    if code != 0 and meeting.is_first:
        # RunFailed where a node is lost: the ranks here show no more than that a connection has ended
        meeting.wait_until(lambda: meeting.all_others(lambda one: one.exit_code is not None or one.outcome))
    return code


def free_port() -> int:
    """A port of this machine that is free now."""
    with socket.socket() as found:
        found.bind(("", 0))
        return int(found.getsockname()[1])
