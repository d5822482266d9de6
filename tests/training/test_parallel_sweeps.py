"""Sweeps of real runs side by side on one machine, killed and continued; and what a finished sweep costs again."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from support.commands import BIT_BY_BIT, ROOT, losses_of, script, steps_done, train_arguments, wait_for

needs_two_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two places need two cores")
STEPS = 40  # some seconds: long enough to be hit
ONE_THREAD = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # so that a run has the same bits in every place


def twelve_runs(student: Path, data: Path, cache: Path, steps: int) -> list[str]:
    """A sweep of the tiny student: two experiments with six seeds."""
    arguments = train_arguments(student, data, str(cache), experiment="combined,weak_only", steps=steps, dev="null")
    return ["-m", *arguments, "seed=1,2,3,4,5,6"]


def processes_in(folder: Path) -> list[psutil.Process]:
    """Those that work in a folder: the command, the drivers of its runs, their ranks."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:  # it has just ended
            continue
    return found


def strike(victim: str, process: subprocess.Popen[bytes], folder: Path, draw: random.Random) -> None:
    """Some steps after its start, at a random moment: kill the command, all that it has started, or ask it to stop."""
    before = steps_done(folder / "runs")
    num_steps = before + 1 + draw.randrange(STEPS)
    wait_for(lambda: steps_done(folder / "runs") >= num_steps, process, seconds=600)
    time.sleep(draw.random() * 0.5)
    if victim == "machine":
        for one in processes_in(folder):
            with contextlib.suppress(psutil.NoSuchProcess):  # they notice that others are gone
                one.kill()
    else:
        process.send_signal(signal.SIGKILL if victim == "command" else signal.SIGTERM)
    assert process.wait(120) == (75 if victim == "asked" else -signal.SIGKILL)
    # no orphan: drivers and ranks notice that the command is gone, save and leave
    wait_for(lambda: not processes_in(folder), seconds=90)


@needs_two_cores
@pytest.mark.slow(minutes=6)
def test_a_sweep_side_by_side_killed_three_times_is_the_undisturbed_one(
    student: Path, data: Path, cache: Path, tmp_path: Path
) -> None:
    """Twelve runs, two at a time; four of them against the same runs one after the other: equal to the last bit."""
    common, draw = twelve_runs(student, data, cache, steps=STEPS), random.Random(3)
    folder, undisturbed = tmp_path / "disturbed", tmp_path / "undisturbed"
    for place in (folder, undisturbed):
        place.mkdir()
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), *common, "launcher.jobs=2"]
    for victim in ("command", "machine", "asked", "nobody"):
        with (tmp_path / f"{victim}.txt").open("w") as output:
            process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=output, env=os.environ | ONE_THREAD)
        if victim != "nobody":
            strike(victim, process, folder, draw)
    assert process.wait(1200) == 0, (tmp_path / "nobody.txt").read_text()[-3000:]
    assert "12 runs: 12 finished" in (tmp_path / "nobody.txt").read_text()
    asked = (tmp_path / "asked.txt").read_text()
    assert "the sweep ends here, as requested; the same command continues with its other runs" in asked
    assert re.search(r"^12 runs: .* \d+ no outcome$", asked, re.MULTILINE)  # those that were not begun any more

    logs = [log.read_text() for log in folder.glob("runs/.multirun/*/*.log")]
    assert any("resuming: " in log for log in logs)

    assert all(len(losses_of(result.parent)) == STEPS for result in folder.glob("runs/*/result.json"))
    seconds_of_train([one.replace("seed=1,2,3,4,5,6", "seed=1,2") for one in common], undisturbed)
    found, expected = (
        {run.parent.name: run.parent for run in place.glob("runs/*/result.json")} for place in (folder, undisturbed)
    )
    assert found.keys() >= expected.keys()
    assert (len(found), len(expected)) == (12, 4)
    for name, run in ((name, found[name]) for name in expected):
        assert losses_of(run) == losses_of(expected[name])
        for part in BIT_BY_BIT:
            assert (run / "model" / part).read_bytes() == (expected[name] / "model" / part).read_bytes()
        results = [json.loads((one / "result.json").read_text()) for one in (run, expected[name])]
        assert results[0]["test"] == results[1]["test"]


def seconds_of_train(arguments: list[str], folder: Path) -> float:
    """The wall seconds of the script train."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "train.py"), *arguments],
        cwd=folder,
        env=os.environ | ONE_THREAD,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return time.monotonic() - began


@pytest.mark.alone
def test_a_finished_run_costs_its_sweep_less_than_a_second(
    student: Path, data: Path, cache: Path, tmp_path: Path
) -> None:
    """Each is composed, and its texts, model and caches are read and checked, as if it were to be trained."""
    sweep = twelve_runs(student, data, cache, steps=2)
    first = [argument.replace("combined,weak_only", "combined") for argument in sweep]
    one = [argument.replace("seed=1,2,3,4,5,6", "seed=1") for argument in first]
    script("train", *one, cwd=tmp_path)
    (trained,) = tmp_path.glob("runs/*/result.json")
    listed = script("train", *sweep, "dry_run=true", cwd=tmp_path).stdout
    for name in re.findall(r"to do: (runs/\S+)", listed):  # what is checked again is its texts, not what it learnt
        shutil.copytree(trained.parent, tmp_path / name)
    assert len(list(tmp_path.glob("runs/*/result.json"))) == 12
    seconds_of_one, seconds_of_all = seconds_of_train(one, tmp_path), seconds_of_train(sweep, tmp_path)
    seconds = (seconds_of_all - seconds_of_one) / 11
    print(f"one run {seconds_of_one:.1f} s, twelve {seconds_of_all:.1f} s: {seconds:.2f} s for each further one")
    assert seconds < 1.0
