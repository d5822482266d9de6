"""A whole study of tiny models by its command: killed in each of its parts, stopped, and continued."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from support.commands import BIT_BY_BIT, ROOT, losses_of, script, wait_for, wait_for_steps
from support.tiny_study import write_tiny_study

CHOSEN = ["study=tiny", "experiments=gold_only,combined", "seeds=1", "probe_seconds=0"]


def start_study(folder: Path) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "scripts" / "study.py"), "--config-dir", str(folder), *CHOSEN]
    with (folder / "output.txt").open("a") as output:
        return subprocess.Popen(command, cwd=folder, stdout=output, stderr=output)


@pytest.mark.slow(minutes=4)
def test_a_study_killed_in_each_part_is_the_undisturbed_one(
    teacher: Path, student: Path, data: Path, tmp_path: Path
) -> None:
    """SIGKILL in the capture and in the first student, SIGTERM in the last; the same command each time."""
    folder, undisturbed = tmp_path / "disturbed", tmp_path / "undisturbed"
    for place in (folder, undisturbed):
        write_tiny_study(place, teacher=teacher, student=student, data=data, steps=60)

    process = start_study(folder)
    wait_for(lambda: list(folder.glob("caches/tiny-*/shards/*.parquet")), process)
    process.kill()
    process.wait()
    process = start_study(folder)
    wait_for_steps(folder / "runs", 5, process)
    process.kill()
    process.wait()
    process = start_study(folder)
    wait_for_steps(folder / "runs", 90, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 75, (folder / "output.txt").read_text()[-3000:]
    assert "the study ends here, as requested" in (folder / "output.txt").read_text()
    assert not (folder / "runs" / "report" / "report.html").exists()
    process = start_study(folder)
    assert process.wait(300) == 0, (folder / "output.txt").read_text()[-3000:]

    script("study", "--config-dir", str(undisturbed), *CHOSEN, cwd=undisturbed)
    found, expected = (
        {path.parent.name: path.parent for path in place.glob("runs/*/result.json")} for place in (folder, undisturbed)
    )
    assert found.keys() == expected.keys()
    assert len(found) == 3
    for name in found:
        if name.startswith("teacher"):
            continue
        assert losses_of(found[name]) == losses_of(expected[name])
        for part in BIT_BY_BIT:
            assert (found[name] / "model" / part).read_bytes() == (expected[name] / "model" / part).read_bytes()
    scores = [
        {name: json.loads((run / "result.json").read_text())["test"] for name, run in of.items()}
        for of in (found, expected)
    ]
    assert scores[0] == scores[1]
    shards = [
        {path.name: path.read_bytes() for path in place.glob("caches/*/shards/*.parquet")}
        for place in (folder, undisturbed)
    ]
    assert shards[0] == shards[1]
    for name in ("report.html", "report.md", "arms.parquet"):
        assert (folder / "runs" / "report" / name).exists()


@pytest.mark.slow(minutes=2)
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two places need two cores")
def test_students_side_by_side_are_in_the_report_and_share_no_core(
    teacher: Path, student: Path, data: Path, tmp_path: Path
) -> None:
    write_tiny_study(tmp_path, teacher=teacher, student=student, data=data, steps=3)
    done = script("study", "--config-dir", str(tmp_path), *CHOSEN, "launcher.jobs=2", cwd=tmp_path)
    assert [line for line in done.stdout.splitlines() if line.startswith("==> [")] == [
        "==> [1/2] gold_only seed 1",
        "==> [2/2] combined seed 1",
    ]
    assert (tmp_path / "runs" / "report" / "report.html").exists()
    cores = {}
    for result in tmp_path.glob("runs/*/result.json"):
        hardware = json.loads((result.parent / "environment.json").read_text())["hardware"]
        cores[result.parent.name.split("-")[0]] = int(re.findall(r"(\d+) cores", hardware)[0])
    whole = len(os.sched_getaffinity(0))
    assert cores["teacher"] == whole
    assert cores["gold_only"] + cores["combined"] == whole


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["hydra_launcher=submitit_local", "launcher.jobs=2"], "launcher.jobs=2: expected students on this machine"),
        (["grid=launcher.jobs:1,2"], "launcher.jobs: expected one number for all students, found [1, 2]"),
        (["launcher.jobs=500"], "launcher.jobs=500: expected at least one core for each"),
    ],
)
def test_students_that_cannot_work_side_by_side_are_refused_before_the_teacher(
    arguments: list[str], message: str, teacher: Path, student: Path, data: Path, tmp_path: Path
) -> None:
    write_tiny_study(tmp_path, teacher=teacher, student=student, data=data)
    done = script("study", "--config-dir", str(tmp_path), *CHOSEN, *arguments, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {message}")
    assert not (tmp_path / "runs").exists()


def test_batch_jobs_have_no_runs_side_by_side(teacher: Path, student: Path, data: Path, tmp_path: Path) -> None:
    write_tiny_study(tmp_path, teacher=teacher, student=student, data=data)
    arguments = ["--config-dir", str(tmp_path), "study=tiny", "cluster.partition=gpu", "launcher.jobs=2", "--print"]
    done = script("submit", *arguments, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: launcher.jobs: expected 1, because each student is a batch job of its own")
