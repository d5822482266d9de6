"""Runs that are killed, moved and starved: they go on from the last whole checkpoint, or say why they cannot."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import transformers

from pipeline.cache.shards import ShardReader
from pipeline.config.options import load_config
from pipeline.config.schema import CheckpointConfig, ExportConfig, ExportedStep, TrainConfig
from pipeline.core.files import RunPaths
from pipeline.core.types import InputError
from pipeline.training import checkpoints
from support.commands import (
    BIT_BY_BIT,
    losses_of,
    mixture_of,
    mounted,
    needs_root,
    only,
    script,
    start,
    steps_done,
    stop_at,
    train_arguments,
    wait_for,
    wait_for_steps,
)


def published(run: Path) -> dict[str, Any]:
    return json.loads((run / "checkpoints" / "published.json").read_text())


# --------------------------------------------------------------------------- other ranks, other stages


@pytest.mark.slow(minutes=3)
def test_ranks_and_stages_change_in_the_middle(student: Path, data: Path, cache: Path, tmp_path: Path) -> None:
    """2 ranks at ZeRO 1, then 1 at ZeRO 3, then 2 at ZeRO 2: the same sequences, losses to 1e-4 of an undisturbed run.

    fp32; the tolerance is that of different orders of sums over 150 steps.
    """
    common = train_arguments(student, data, str(cache), steps=150, micro_batch=1)
    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    script("train", *common, cwd=undisturbed)
    layouts = [(2, 1), (1, 3), (2, 2)]
    for number, (ranks, stage) in enumerate(layouts):
        arguments = [*common, f"launcher.num_processes={ranks}", f"deepspeed.zero_stage={stage}"]
        if number < 2:
            stop_at((5, 60)[number], arguments, tmp_path)
            found = published(only(tmp_path / "runs"))
            assert (found["world_size"], found["zero_stage"]) == (ranks, stage)
        else:
            done = script("train", *arguments, cwd=tmp_path)
            assert "is of 1 ranks at ZeRO 3: converting it for 2 ranks at ZeRO 2" in done.stderr
    run, reference = only(tmp_path / "runs"), only(undisturbed / "runs")
    rows, expected = ([json.loads(line) for line in (folder / "metrics.jsonl").open()] for folder in (run, reference))
    assert [row["sequences"] for row in rows] == [row["sequences"] for row in expected]
    found, wanted = torch.tensor(losses_of(run)), torch.tensor(losses_of(reference))
    assert torch.allclose(found, wanted, rtol=1e-4), (found / wanted - 1).abs().max()
    weights, theirs = (
        transformers.AutoModelForCausalLM.from_pretrained(folder / "model").state_dict() for folder in (run, reference)
    )
    for name, weight in weights.items():
        assert torch.allclose(weight, theirs[name], atol=2e-4), name


# ----------------------------------------------------------------------------------------------- kills


def ranks_of(run: Path) -> dict[int, int]:
    """The ranks at work in a run folder: rank -> pid."""
    found = {}
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if "pipeline.training.worker" in line and run.name in line[-1] and "torch.distributed.run" not in line:
            with contextlib.suppress(psutil.Error, KeyError):
                found[int(process.environ()["RANK"])] = process.pid
    return found


def is_saving(run: Path) -> bool:
    """Whether a checkpoint lies there that is not published yet."""
    with contextlib.suppress(OSError, ValueError):
        newest = max((path.name for path in (run / "checkpoints").glob("step-????????")), default="")
        return newest > (published(run)["tag"] if (run / "checkpoints" / "published.json").exists() else "")
    return False


def strike(victim: str, process: subprocess.Popen, runs: Path, draw: random.Random) -> None:
    """Let a run make some steps, then kill: a rank, the driver, or a rank in the middle of a save."""
    before = steps_done(runs)
    wait_for_steps(runs, before + 1 + draw.randrange(4), process)
    run = only(runs)
    if victim == "save":
        wait_for(lambda: is_saving(run), process)
    else:
        time.sleep(draw.random() * 0.1)
    target = process.pid if victim == "driver" else ranks_of(run).get(draw.randrange(2))
    if target is not None:
        os.kill(target, signal.SIGUSR2 if victim == "signalled" else signal.SIGKILL)


@pytest.mark.slow(minutes=4)
def test_kills_at_random_times_change_nothing(student: Path, data: Path, cache: Path, tmp_path: Path) -> None:
    """Eight kills over two ranks, then SIGUSR2 to a rank: bit by bit the undisturbed run."""
    changes = {"launcher__num_processes": 2, "micro_batch": 1, "checkpoint__every_steps": 2}
    common = train_arguments(student, data, str(cache), steps=200, **changes)
    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    script("train", *common, cwd=undisturbed)
    draw = random.Random(5)
    victims = ["rank", "driver", "save", "rank"] * 2 + ["signalled"]
    resumed = []
    for victim in victims:
        process = start(common, tmp_path)
        strike(victim, process, tmp_path / "runs", draw)
        process.wait(90)
        assert process.returncode == {"driver": -signal.SIGKILL, "signalled": 75}.get(victim, 2)
        wait_for(lambda: not ranks_of(only(tmp_path / "runs")), seconds=60)  # no orphan
        resumed.append(published(only(tmp_path / "runs"))["state"]["step"])
    assert resumed == sorted(resumed)
    assert resumed[-1] < 200  # every one of them was killed before its end
    script("train", *common, cwd=tmp_path)
    run, reference = only(tmp_path / "runs"), only(undisturbed / "runs")
    assert "Signal 9 (SIGKILL) received by PID" in (tmp_path / "output.txt").read_text()
    assert losses_of(run) == losses_of(reference)
    for name in BIT_BY_BIT:
        assert (run / "model" / name).read_bytes() == (reference / "model" / name).read_bytes()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    assert [row["sequences"] for row in rows] == expected_sequences(run, 200)


def expected_sequences(run: Path, steps: int) -> list[str]:
    """What each step should have read: the pure order over the sequences, each once an epoch."""
    config = load_config(run / "config.yaml", TrainConfig)
    mixture = mixture_of(config)
    (reader,) = mixture.readers
    visited, sums = [], []
    for step in range(steps):
        slots = mixture.slots(step)
        visited += [(slot.block, slot.row) for slot in slots if slot.source == "corpus"]
        keys = [int.from_bytes(mixture.read(slot)[0].key[:8], "little") for slot in slots]
        sums.append(f"{sum(keys) % 2**64:016x}")
    rows = [(block, row) for block, size in enumerate(reader.blocks) for row in range(size)]
    assert len(visited) > 2 * len(rows)
    for epoch in range(len(visited) // len(rows)):
        assert sorted(visited[epoch * len(rows) : (epoch + 1) * len(rows)]) == rows
    return sums


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_run(student: Path, data: Path, cache: Path, tmp_path: Path) -> None:
    changes = {"launcher__num_processes": 2, "micro_batch": 1, "launcher__hang_seconds": 8}
    process = start(train_arguments(student, data, str(cache), steps=5000, **changes), tmp_path)
    wait_for_steps(tmp_path / "runs", 3, process)
    run = only(tmp_path / "runs")
    os.kill(ranks_of(run)[1], signal.SIGSTOP)
    assert process.wait(60) == 2
    said = (tmp_path / "output.txt").read_text()
    assert "Timeout (0:00:08)!" in said
    assert "in take_step" in said  # where it waits
    wait_for(lambda: not ranks_of(run), seconds=30)


@pytest.mark.slow
def test_a_time_limit_is_kept(student: Path, data: Path, cache: Path, tmp_path: Path) -> None:
    """Saved and gone before it, with the code that says so, and no word from anybody."""
    began = time.monotonic()
    changes = {"launcher__time_limit": 1.0, "launcher__leave_seconds": 35}
    arguments = train_arguments(student, data, str(cache), steps=100_000, **changes)
    done = script("train", *arguments, cwd=tmp_path, check=False)
    assert done.returncode == 75, done.stderr[-3000:]
    assert time.monotonic() - began < 60
    assert published(only(tmp_path / "runs"))["state"]["step"] == steps_done(tmp_path / "runs") > 0


# -------------------------------------------------------------------------------- disks and their contents


@pytest.mark.slow
@needs_root
def test_a_full_disk_leaves_the_last_whole_checkpoint(student: Path, data: Path, cache: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    script("train", *train_arguments(student, data, str(cache), steps=8), cwd=whole)
    changes = {"checkpoint__every_steps": 2}
    arguments = train_arguments(student, data, str(cache), steps=8, **changes)
    size = sum(path.stat().st_size for path in whole.rglob("model.safetensors"))
    with mounted(tmp_path / "small", f"size={size * 6}") as small:  # room for one: weights, a copy, two moments
        done = script("train", *arguments, cwd=small, check=False)
        run = only(small / "runs")
        assert done.returncode == 2
        assert re.search(r"step-00000004: expected to save a checkpoint, found .* MB free; make room", done.stderr)
        assert published(run)["state"]["step"] == 2
        assert [path.name for path in (run / "checkpoints").glob("step-*")] == ["step-00000002"]
        subprocess.run(["mount", "-o", "remount,size=1g", str(small)], check=True)
        script("train", *arguments, cwd=small)
        for name in BIT_BY_BIT:
            assert (run / "model" / name).read_bytes() == (only(whole / "runs") / "model" / name).read_bytes()


def test_what_is_not_a_whole_checkpoint_of_this_run_is_refused(tmp_path: Path) -> None:
    paths = RunPaths(folder=tmp_path / "run-1")
    folder = paths.checkpoints / "step-00000004"
    folder.mkdir(parents=True)
    (folder / "weights.pt").write_bytes(b"12345")
    whole = checkpoints.Published(
        tag=folder.name,
        world_size=2,
        zero_stage=1,
        run="run-1",
        files={"weights.pt": 5},
        state={"step": 4},
        skipped_steps=0,
    )

    def publish(**changes: Any) -> None:
        paths.published.write_text(json.dumps(dataclasses.asdict(whole) | changes))

    publish()
    assert checkpoints.published(paths) == whole
    for changes, message in (
        ({"format": 1}, "expected a checkpoint of format 2, found 1, made by another version of this code"),
        ({"run": "run-2"}, "expected a checkpoint of run-1, found one of run-2, whose options or inputs differ"),
        ({"files": {"weights.pt": 6}}, "weights.pt: expected 6 bytes, found 5"),
        ({"files": {"weights.pt": 5, "more.pt": 1}}, "more.pt: expected 1 bytes, found no such file"),
    ):
        publish(**changes)
        with pytest.raises(InputError, match=re.escape(message)):
            checkpoints.published(paths)


def test_the_best_steps_checkpoint_has_to_be_there(tmp_path: Path) -> None:
    paths = RunPaths(folder=tmp_path / "run-1")
    about: dict[str, Any] = {"world_size": 1, "zero_stage": 1, "run": "run-1", "files": {}, "skipped_steps": 0}
    state = {"step": 6, "best_score": -1.0, "best_step": 4, "thresholds": []}
    newest = checkpoints.Published(tag="step-00000006", state=state, **about)
    best = checkpoints.Published(tag="step-00000004", state=state | {"step": 4}, **about)
    (paths.checkpoints / best.tag).mkdir(parents=True)
    paths.published.write_text(json.dumps(dataclasses.asdict(newest)))
    last = TrainConfig()
    config = dataclasses.replace(last, export=ExportConfig(what=ExportedStep.best))
    assert checkpoints.needed(paths, last) == [newest]
    with pytest.raises(InputError, match="expected the checkpoint of step 4, the best on dev, found none"):
        checkpoints.needed(paths, config)
    (paths.checkpoints / best.tag / checkpoints.ABOUT).write_text(json.dumps(dataclasses.asdict(best)))
    assert checkpoints.needed(paths, config) == [newest, best]


def test_which_checkpoints_are_kept() -> None:
    steps = list(range(2, 21, 2))
    assert checkpoints.kept(steps, CheckpointConfig(keep=1)) == {20}
    assert checkpoints.kept(steps, CheckpointConfig(keep=3)) == {16, 18, 20}
    assert checkpoints.kept(steps, CheckpointConfig(keep=1, keep_every_steps=8)) == {8, 16, 20}
    assert checkpoints.milestones(steps, CheckpointConfig(keep=1, keep_every_steps=8)) == {8, 16}
    assert checkpoints.milestones(steps, CheckpointConfig(keep=1)) == set()


def test_a_shard_that_goes_missing_in_the_middle(cache: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(cache, tmp_path / "cache")
    reader = ShardReader(copy)
    reader.row(0, 0)
    for path in copy.rglob("*.parquet"):
        path.unlink()
    with pytest.raises(InputError, match=r"expected .* found"):
        reader.row(len(reader.blocks) - 1, 0)


# -------------------------------------------------------------------------------------- DeepSpeed's ways


@pytest.mark.slow
def test_offload_and_gradient_checkpointing_train_the_same(
    student: Path, data: Path, cache: Path, tmp_path: Path
) -> None:
    """An optimizer on the CPU and recomputed layers: losses to 1e-4 of those without, over 12 steps in fp32."""
    losses = []
    for name, more in (
        ("plain", []),
        ("offload", ["deepspeed=zero2_offload", "gradient_checkpointing=true"]),
    ):
        folder = tmp_path / name
        folder.mkdir()
        script("train", *train_arguments(student, data, str(cache), steps=12), *more, cwd=folder)
        losses.append(torch.tensor(losses_of(only(folder / "runs"))))
    assert losses[0][-1] < losses[0][0]
    assert torch.allclose(*losses, rtol=1e-4), (losses[0] / losses[1] - 1).abs().max()
