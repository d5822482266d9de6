"""The demo on a fresh clone, as a newcomer runs it: real model, real text, every command of the README."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections import Counter
from pathlib import Path

import polars as pl
import pytest

from support.commands import ROOT


@pytest.mark.slow(minutes=6)
def test_quick_demo_from_a_fresh_clone_and_again(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV", "HF_HUB_OFFLINE")}

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

    assert "starting: runs/quick/teacher-" in demo()
    table = pl.read_csv(clone / "runs" / "quick" / "report.csv")
    assert table["experiment"].to_list() == ["teacher", "gold_only", "weak_only", "combined", "ceiling"]
    assert (table["num_records"] == 60).all()
    (manifest,) = (clone / "caches" / "quick").glob("demo-*/manifest.json")
    assert json.loads(manifest.read_text())["num_skipped"] == 0
    started = time.monotonic()
    again = demo()
    assert time.monotonic() - started < 60
    assert again.count("is finished; nothing to do") == 5
    assert "starting:" not in again
    assert "capturing" not in again
    status = subprocess.run(["git", "status", "--porcelain"], cwd=clone, capture_output=True, text=True, check=True)
    assert status.stdout == ""  # the tree stays clean
    splits_are_disjoint(clone / "data" / "demo")


def splits_are_disjoint(folder: Path) -> None:
    prompts = Counter(
        json.loads(line)["prompt"].split(": ")[0]
        for split in ("teacher", "corpus", "gold", "dev", "test")
        for line in (folder / f"{split}.jsonl").read_text().splitlines()
    )
    assert max(prompts.values()) == 1
