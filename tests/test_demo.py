"""The demo on a fresh clone, as a newcomer runs it: real model, real text, every command of the README."""

from __future__ import annotations

import json
import os
import resource
import subprocess
from collections import Counter
from pathlib import Path

import polars as pl
import pytest

from support.commands import ROOT


@pytest.mark.slow(minutes=6)
def test_quick_demo_from_a_fresh_clone_and_again(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    if (ROOT / ".venv").is_dir():  # .ci/run has installed everything anew: here it is this project alone
        subprocess.run(["cp", "-a", "--reflink=auto", str(ROOT / ".venv"), str(clone / ".venv")], check=True)
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV", "HF_HUB_OFFLINE")}
    environment |= {"OMP_NUM_THREADS": "1"}  # with other tests beside this one, two threads wait for each other

    def demo() -> str:
        done = subprocess.run(
            ["scripts/demo", "--quick"],
            cwd=clone,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-5000:]
        return done.stdout

    first = demo()
    assert "Study quick" in first
    assert "[5/5] ceiling seed 1" in first
    report = clone / "runs" / "quick" / "report"
    assert (report / "report.html").stat().st_size > 50_000
    arms = pl.read_parquet(report / "arms.parquet")
    assert set(arms["role"]) == {"teacher", "zero_shot", "gold_only", "weak_only", "combined", "ceiling"}
    (manifest,) = (clone / "caches" / "quick").glob("quick-*/manifest.json")
    assert json.loads(manifest.read_text())["num_skipped"] == 0
    assert json.loads(manifest.read_text())["num_records"] == 60
    before = children_seconds()
    again = demo()
    assert children_seconds() - before < 60  # of a core, so that other tests beside this one do not count
    assert again.count("finished before") == 5
    for output in (first, again):  # the demo tells its story in under sixty lines, before its report
        assert len(output.split("==> report")[0].splitlines()) < 60, output
    status = subprocess.run(["git", "status", "--porcelain"], cwd=clone, capture_output=True, text=True, check=True)
    assert status.stdout == ""  # the tree stays clean
    splits_are_disjoint(clone / "data" / "demo")


def children_seconds() -> float:
    """The time of a core that the ended processes of this one, and theirs, have taken."""
    taken = resource.getrusage(resource.RUSAGE_CHILDREN)
    return taken.ru_utime + taken.ru_stime


def splits_are_disjoint(folder: Path) -> None:
    prompts = Counter(
        json.loads(line)["prompt"].split(": ")[0]
        for split in ("teacher", "corpus", "gold", "dev", "test")
        for line in (folder / f"{split}.jsonl").read_text().splitlines()
    )
    assert max(prompts.values()) == 1
