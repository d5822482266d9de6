"""Where a command stands among several nodes: by options, srun or torchrun; and what contradicts itself."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.config.outcomes import Outcome, State
from pipeline.config.schema import LauncherConfig
from pipeline.core.files import RunPaths
from pipeline.core.types import InputError, RunFailed
from pipeline.training import follower, joint, meeting, rendezvous
from pipeline.training.meeting import Meeting, Report
from pipeline.training.nodes import Node, first_host, this_node
from support.several_nodes import free_port

SRUN = {
    "SLURM_JOB_ID": "412",
    "SLURM_RESTART_COUNT": "1",
    "SLURM_STEP_ID": "3",
    "SLURM_NODEID": "1",
    "SLURM_JOB_NODELIST": "gpu[01-09]",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2",
}
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "abc",
    "TORCHELASTIC_RESTART_COUNT": "0",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "LOCAL_WORLD_SIZE": "1",
    "GROUP_WORLD_SIZE": "2",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "gpu03",
    "MASTER_PORT": "29501",
}


def options(**given: Any) -> LauncherConfig:
    return LauncherConfig(**{"num_nodes": 2, **given})


def test_the_place_of_a_command() -> None:
    by_options = Node(rank=1, count=2, host="gpu03", port=29500)
    assert this_node(options(node_rank=1, rendezvous_host="gpu03"), {}) == by_options
    by_srun = Node(rank=1, count=2, host="gpu03", port=22885, session="412-1-3")
    assert this_node(options(), SRUN) == by_srun
    assert this_node(options(node_rank=1), SRUN) == by_srun
    by_torchrun = Node(rank=1, count=2, host="gpu03", port=29501, has_store=True, session="abc-0")
    assert this_node(options(), TORCHRUN) == by_torchrun
    # an option counts more: there node 0 holds the store
    other = this_node(options(rendezvous_host="ib3"), TORCHRUN)
    assert other == dataclasses.replace(by_torchrun, host="ib3", port=29500, has_store=False)
    other = this_node(options(rendezvous_port=1234), SRUN)
    assert other == dataclasses.replace(by_srun, port=1234)


@pytest.mark.parametrize(
    "variables",
    [{}, {"SLURM_JOB_ID": "412", "SLURM_JOB_NUM_NODES": "2"}, SRUN | {"SLURM_STEP_NUM_NODES": "1"}],
)
def test_one_command_for_all_ranks(variables: dict[str, str]) -> None:
    """One node; a batch script or the shell of salloc, which starts srun; tasks of srun that share a sweep."""
    assert this_node(options(), variables) is None
    assert this_node(options(num_nodes=1), variables) is None
    assert this_node(options(num_nodes=1), SRUN | {"SLURM_STEP_NUM_TASKS": "8"}) is None


@pytest.mark.parametrize(
    ("given", "variables", "message"),
    [
        ({"num_nodes": 0}, {}, "launcher.num_nodes: expected at least 1, found 0"),
        ({"num_nodes": 1, "node_rank": 0}, {}, "launcher.node_rank=0: expected launcher.num_nodes of 2 or more"),
        ({"node_rank": 1}, {}, "on each node, found no launcher.rendezvous_host; give it"),
        ({"rendezvous_host": "gpu03"}, {}, "on each node, found no launcher.node_rank; give it"),
        ({"rendezvous_port": 5}, {}, "found no launcher.node_rank and launcher.rendezvous_host; give it"),
        ({"node_rank": 2, "rendezvous_host": "a"}, {}, "launcher.node_rank=2: expected 0 to 1"),
        ({"node_rank": -1, "rendezvous_host": "a"}, {}, "launcher.node_rank=-1: expected 0 to 1"),
        ({"node_rank": 1, "rendezvous_host": "a", "rendezvous_port": 0}, {}, "rendezvous_port: expected 1 to 65535"),
        ({"node_rank": 0}, SRUN, "launcher.node_rank=0: expected 1, the place of this command by srun or torchrun"),
        ({"num_nodes": 3}, SRUN, "srun: expected 3 nodes (launcher.num_nodes) with one task each"),
        (
            {},
            SRUN | {"SLURM_STEP_NUM_TASKS": "16"},
            "found 16 tasks on 2 nodes; use srun --nodes=2 --ntasks-per-node=1",
        ),
        ({}, TORCHRUN | {"LOCAL_WORLD_SIZE": "8"}, "one process a node, because this command starts its ranks itself"),
        ({"num_nodes": 1}, TORCHRUN | {"LOCAL_WORLD_SIZE": "8"}, "use torchrun --nproc-per-node=1, or no torchrun"),
        ({"num_nodes": 1}, TORCHRUN, "launcher.num_nodes=1: expected 2, the nodes on which torchrun has started"),
        ({"num_nodes": 4}, TORCHRUN, "launcher.num_nodes=4: expected 2, the nodes on which torchrun has started"),
    ],
)
def test_what_is_half_given_or_contradicts_itself(given: dict, variables: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        this_node(options(**given), variables)


@pytest.mark.parametrize(
    ("names", "first"),
    [
        ("gpu1", "gpu1"),
        ("gpu1,gpu2", "gpu1"),
        ("gpu[03-05,9],login", "gpu03"),
        ("gpu[3,5]", "gpu3"),
        ("rack[1-2]node[07-08]", "rack1node07"),
        ("a-b[1-2].ib,c", "a-b1.ib"),
    ],
)
def test_the_first_host_of_a_list_of_slurm(names: str, first: str) -> None:
    assert first_host(names) == first


# ------------------------------------------------------------------------------------------ meetings


def both_meet(seconds: float = 30.0) -> tuple[Meeting, Meeting]:
    nodes = [Node(rank=rank, count=2, host="127.0.0.1", port=0) for rank in range(2)]
    port = free_port()
    found: dict[int, Meeting] = {}

    def join(rank: int) -> None:
        found[rank] = Meeting(dataclasses.replace(nodes[rank], port=port), seconds)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one in found.values():
        one.next_run()
    return found[0], found[1]


def until(condition: Any, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_node_that_is_alone_ends_after_its_time(caplog: pytest.LogCaptureFixture) -> None:
    node = Node(rank=0, count=3, host="127.0.0.1", port=free_port())
    message = "expected the commands of all nodes at 127.0.0.1:.* within 1 s (launcher.rendezvous_seconds), found only "
    message = re.escape(message).replace(re.escape(".*"), ".*") + "node 0; start the same command on each node"
    with pytest.raises(InputError, match=message):
        rendezvous.meet(node, 1.0)
    with pytest.raises(InputError, match="found .*Connection refused; start"):
        rendezvous.meet(dataclasses.replace(node, rank=1), 1.0)


def test_a_place_is_free_again_once_its_command_has_gone_and_not_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "GONE_SECONDS", 0.7)
    first, second = both_meet()
    with pytest.raises(InputError, match="found another command with launcher.node_rank=1"):
        rendezvous.meet(second.node, 2.0)
    for one in (first, second):
        one.close()
    # node 0 waits; a command of node 1 that was killed while it waited has left its claim
    node = Node(rank=0, count=3, host="127.0.0.1", port=free_port())
    gone = dataclasses.replace(node, rank=1)

    def wait_in_vain() -> None:
        with contextlib.suppress(InputError):
            rendezvous.meet(node, 60.0)

    threading.Thread(target=wait_in_vain, daemon=True).start()

    def answers() -> bool:
        with contextlib.suppress(OSError):
            socket.create_connection((node.host, node.port)).close()
            return True
        return False

    until(answers)
    for _ in range(2):  # the second takes the place of the first
        with pytest.raises(InputError, match="found only node 0, 1"):
            rendezvous.meet(gone, 4.0)


def test_different_runs_and_numbers_of_ranks_are_named() -> None:
    first, second = both_meet()
    first.report(folder="combined-1", num_processes=2)
    second.report(folder="combined-2", num_processes=2)
    with pytest.raises(
        InputError, match="the same run folder on all nodes, found combined-1 on node 0 and combined-2 on"
    ):
        joint.check_same_run(first)
    second.report(folder="combined-1", num_processes=4)
    until(lambda: first.others()[1].num_processes == 4)
    with pytest.raises(InputError, match="the same number of ranks on all nodes, found 2 on node 0 and 4 on node 1"):
        joint.check_same_run(first)
    second.report(outcome={"state": "failed", "note": "gold: expected a file"})
    until(lambda: first.others()[1].outcome)
    with pytest.raises(RunFailed, match="node 1: gold: expected a file"):
        joint.check_same_run(first)
    for one in (first, second):
        one.close()


def test_a_node_that_is_silent_is_lost_and_ranks_that_hang_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in NCCL, which waits for half an hour; node 1 has its ranks ended, too, which answers no more to node 0."""
    monkeypatch.setattr(meeting, "LOST_SECONDS", 2.0)
    monkeypatch.setattr(joint, "GRACE_SECONDS", 0.5)
    first, second = both_meet()
    hanging = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    second.close()  # reports no more
    began = time.monotonic()
    with pytest.raises(RunFailed, match=r"node 1 has not answered for 2 s; the same command on every node continues"):
        joint.watch(first, hanging)
    assert time.monotonic() - began < 15
    assert hanging.poll() == -signal.SIGHUP
    with pytest.raises(RunFailed, match="node 1 has not answered"):
        first.next_run()
    first.close()


def test_a_failure_on_one_node_ends_the_ranks_of_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joint, "GRACE_SECONDS", 0.5)
    first, second = both_meet()
    second.report(exit_code=1)
    hanging = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    assert joint.watch(first, hanging) == -signal.SIGHUP
    assert first.trouble() == "the ranks of node 1 failed (exit code 1)"
    until(lambda: second.trouble() == "the ranks of node 1 failed (exit code 1)")
    for one in (first, second):
        one.close()


def test_what_asks_one_node_to_stop_reaches_node_0(monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: received.append(number))
    first, second = both_meet()
    with second._changing:  # a signal may arrive while the command changes its report
        follower.ask_to_stop(second)
    until(lambda: received)
    time.sleep(2 * meeting.REPORT_SECONDS)
    assert received == [signal.SIGTERM]  # once
    for one in (first, second):
        one.close()


def test_a_request_after_the_end_does_not_end_node_0_before_the_other_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    """SLURM asks all nodes at once: node 0 had saved and ended when it saw that node 1 was asked, too."""
    received: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: received.append(number))
    first, second = both_meet()
    stopped = {"state": "stopped", "note": "saved at step 17"}
    first.report(outcome=stopped)
    follower.ask_to_stop(second)
    until(lambda: first.all_others(lambda one: one.asks_to_stop))
    time.sleep(2 * meeting.REPORT_SECONDS)
    assert received == []

    ending = threading.Thread(target=lambda: first.end_run(stopped, wait=False))
    ending.start()
    ending.join(3 * meeting.REPORT_SECONDS)
    assert ending.is_alive()  # node 1 has not said how it ended
    second.end_run(stopped, wait=True)
    ending.join(meeting.LEAVE_SECONDS / 2)
    assert not ending.is_alive()
    for one in (first, second):
        one.close()


def test_node_0_leaves_after_a_while_though_another_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "LEAVE_SECONDS", 2.0)
    first, second = both_meet()
    began = time.monotonic()
    first.end_run({"state": "stopped", "note": "stopped by SIGTERM"}, wait=False)
    assert 2.0 < time.monotonic() - began < 10.0
    for one in (first, second):
        one.close()


def test_asked_again_once_the_run_has_ended_a_command_leaves_after_the_others(tmp_path: Path) -> None:
    calls: list[bool] = []

    class Interrupted:
        is_first = True

        def __getattr__(self, name: str) -> Any:
            return lambda *arguments, **named: None

        def end_run(self, outcome: dict[str, Any], *, wait: bool) -> None:
            calls.append(wait)
            if wait:
                raise KeyboardInterrupt("SIGTERM")

    prepared: Any = SimpleNamespace(paths=RunPaths(folder=tmp_path / "combined-1"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(follower, "prepare", lambda config: prepared)
        patch.setattr(follower, "num_processes", lambda config: 1)
        patch.setattr(follower, "check_same_run", lambda meeting: None)
        run: Any = functools.partial(follower.run, None, Interrupted())
        with pytest.raises(KeyboardInterrupt, match="SIGTERM"):
            run(lambda prepared: Outcome(state=State.stopped))
    assert calls == [True, False]


def test_a_report_is_json() -> None:
    report = Report(run=3, folder="combined-1", outcome={"state": "finished", "score": 0.5})
    assert Report(**json.loads(json.dumps(dataclasses.asdict(report)))) == report


def test_a_folder_that_is_not_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joint, "SHARED_SECONDS", 1.0)
    first, second = both_meet()
    there, elsewhere = tmp_path / "there", tmp_path / "elsewhere"
    there.mkdir()
    waiting = threading.Thread(target=lambda: joint.gather(first, there))
    waiting.start()
    until(lambda: second.first is not None and second.first.start == 1)
    asked = second.first
    assert asked is not None
    with pytest.raises(InputError, match=f"expected {elsewhere} to be the folder that node 0 writes, found no file"):
        joint.find_folder(second, elsewhere, asked.token, asked.start)
    joint.find_folder(second, there, asked.token, asked.start)
    waiting.join(30)
    assert list(there.iterdir()) == []
    for one in (first, second):
        one.close()
