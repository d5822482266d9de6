"""Two commands on loopback, each with two ranks, as two nodes: equal to one node, killed, stopped, resumed, refused."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from support.commands import BIT_BY_BIT, ROOT, losses_of, only, script, steps_done, train_arguments, wait_for
from support.several_nodes import Command, free_port, place, seconds_until_end, started

TRAIN = str(ROOT / "scripts" / "train.py")
LOST = "node 1 has not answered for 20 s"


def both(arguments: list[str]) -> list[list[str]]:
    """The same command for both nodes."""
    port = free_port()
    return [[TRAIN, *arguments, *place(rank, port)] for rank in range(2)]


def until_steps(runs: Path, steps: int, commands: list[Command]) -> None:
    """Four ranks that start on two cores take minutes where other tests run beside them."""
    wait_for(lambda: steps_done(runs) >= steps, commands[0].process, seconds=600)


def outputs(commands: list[Command]) -> str:
    return "\n".join(f"--- node {rank}\n{command.text()[-4000:]}" for rank, command in enumerate(commands))


def assert_same_run(found: Path, expected: Path) -> None:
    assert losses_of(found) == losses_of(expected)  # to the last bit
    for name in BIT_BY_BIT:
        assert (found / "model" / name).read_bytes() == (expected / "model" / name).read_bytes()
    results = [json.loads((run / "result.json").read_text()) for run in (found, expected)]
    assert results[0]["test"] == results[1]["test"]


# ----------------------------------------------------------------------------------------- whole runs


@pytest.mark.slow(minutes=4)
def test_two_nodes_are_one_node_with_all_ranks_also_after_each_is_killed(
    student: Path, data: Path, cache: Path, tmp_path: Path
) -> None:
    """Two ranks on each, ZeRO 2; node 1 is killed, then node 0: the other ends within a minute and names it."""
    changes = {"steps": 24, "micro_batch": 1, "deepspeed__zero_stage": 2, "checkpoint__every_steps": 3}
    whole = tmp_path / "whole"
    whole.mkdir()
    alone = train_arguments(student, data, str(cache), launcher__num_processes=4, **changes)
    script("train", *alone, cwd=whole, env=os.environ | {"OMP_NUM_THREADS": "1"})

    arguments = train_arguments(student, data, str(cache), launcher__num_processes=2, **changes)
    killed_at = []
    for killed, steps in ((1, 5), (0, 12)):
        with started(both(arguments), [tmp_path] * 2) as commands:
            until_steps(tmp_path / "runs", steps, commands)
            commands[killed].kill_node()
            other = commands[1 - killed]
            assert seconds_until_end([other]) < 60
            assert other.process.returncode == 2, outputs(commands)
            expected = LOST if killed == 1 else "node 0 (127.0.0.1) has ended, or its network has"
            assert expected in other.text(), outputs(commands)
            assert "the same command on every node continues" in other.text()
        killed_at.append(len(losses_of(only(tmp_path / "runs"))))
    with started(both(arguments), [tmp_path] * 2) as commands:
        seconds_until_end(commands)
        assert [one.process.returncode for one in commands] == [0, 0], outputs(commands)
    assert "loading the checkpoint of step" in commands[0].text()
    assert "4 ranks on cpu" in commands[0].text()
    run = only(tmp_path / "runs")
    assert 5 <= killed_at[0] < killed_at[1] < 24
    assert_same_run(run, only(whole / "runs"))
    assert "finished at node 0" in commands[1].text()
    assert {path.name for path in run.iterdir()} == {path.name for path in only(whole / "runs").iterdir()}


@pytest.mark.slow(minutes=2)
def test_a_signal_to_one_command_stops_all_with_a_checkpoint(
    student: Path, data: Path, cache: Path, tmp_path: Path
) -> None:
    """Of node 1: that of node 0 is asked through it. Then a whole node as SLURM does, and the same commands finish."""
    arguments = train_arguments(student, data, str(cache), steps=400, micro_batch=2, launcher__num_processes=1)
    saved = 0
    for number in (signal.SIGUSR1, signal.SIGTERM):
        with started(both(arguments), [tmp_path] * 2) as commands:
            until_steps(tmp_path / "runs", saved + 3, commands)
            commands[1].process.send_signal(number)
            seconds_until_end(commands)
            assert [one.process.returncode for one in commands] == [75, 75], outputs(commands)
        run = only(tmp_path / "runs")
        before, saved = saved, json.loads((run / "checkpoints" / "published.json").read_text())["state"]["step"]
        assert before + 3 <= saved == len(losses_of(run)) < 400
        assert "failed" not in commands[0].text() + commands[1].text()
    with started(both(arguments), [tmp_path] * 2) as commands:
        seconds_until_end(commands)
        assert [one.process.returncode for one in commands] == [0, 0], outputs(commands)
    assert len(losses_of(run)) == 400


@pytest.mark.slow(minutes=2)
def test_a_sweep_goes_on_in_the_same_order_on_both_nodes(
    student: Path, data: Path, cache: Path, tmp_path: Path
) -> None:
    """With a run that takes no steps, and one that fails; then all is finished, and nothing is started."""
    arguments = train_arguments(student, data, str(cache), steps=2, micro_batch=2, launcher__num_processes=1)
    arguments = [one for one in arguments if not one.startswith(("steps=", "optimizer.learning_rate="))]
    arguments += ["-m", "steps=0,2", "optimizer.learning_rate=1e38,0.001"]
    for times in range(2):
        with started(both(arguments), [tmp_path] * 2) as commands:
            seconds_until_end(commands)
        for command in commands:
            assert command.process.returncode == 2, outputs(commands)
            assert "4 runs: 3 finished, 1 failed" in command.text(), outputs(commands)
            assert "expected a finite loss, found" in command.text()
        assert (
            commands[0].text().count("is finished; nothing to do") == (1, 3)[times]
        )  # both without steps are the same
    assert len(list(tmp_path.glob("runs/*/result.json"))) == 2


@pytest.mark.slow(minutes=2)
def test_torchrun_starts_one_command_a_node(student: Path, data: Path, cache: Path, tmp_path: Path) -> None:
    """The place of each comes from its variables, and its store is the one in which they meet."""
    arguments = train_arguments(student, data, str(cache), steps=3, micro_batch=2, launcher__num_nodes=2)
    torchrun = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1"]
    torchrun += [f"--master-port={free_port()}"]
    both_nodes = [[*torchrun, f"--node-rank={rank}", TRAIN, *arguments] for rank in range(2)]
    with started(both_nodes, [tmp_path] * 2) as commands:
        seconds_until_end(commands)
        assert [one.process.returncode for one in commands] == [0, 0], outputs(commands)
    assert "2 ranks on cpu" in commands[0].text()
    assert len(losses_of(only(tmp_path / "runs"))) == 3


# --------------------------------------------------------------------------------------- what is refused


@pytest.mark.slow(minutes=2)
def test_folders_that_are_not_shared_are_named(student: Path, data: Path, cache: Path, tmp_path: Path) -> None:
    """The same relative path in two working directories, as on the local disks of two machines."""
    arguments = train_arguments(student, data, str(cache), micro_batch=2, launcher__num_processes=1)
    folders = [tmp_path / "disk0", tmp_path / "disk1"]
    for folder in folders:
        folder.mkdir()
    with started(both(arguments), folders) as commands:
        assert seconds_until_end(commands) < 150
        assert [one.process.returncode for one in commands] == [2, 2], outputs(commands)
    name = only(folders[0] / "runs").name
    reason = f"runs_dir: expected {folders[1]}/runs/{name} to be the folder that node 0 writes, found no file of it"
    assert reason in commands[1].text()
    assert f"node 1: {reason}" in commands[0].text()
    assert not list(folders[0].rglob("*.shared"))
    assert not (folders[1] / "runs").exists()
