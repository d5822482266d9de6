"""Run folders in any state, made of real files, for tests of scripts/status.py."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.config.options import identity_options, save_config
from pipeline.config.schema import TrainConfig
from pipeline.core.files import RunPaths, write_json
from pipeline.core.processes import this_process

SCORES = {"num_records": 20, "nll": 1.5, "perplexity": 4.48, "accuracy": 0.75, "exact_match": None}
ELSEWHERE = "node7 another-boot/pid:[1] 12 345"


def make_run(folder: Path, *, steps: int = 60, options: dict[str, Any] | None = None) -> RunPaths:
    """A run that has not begun: what its driver writes before its ranks start."""
    folder.mkdir(parents=True)
    paths, config = RunPaths(folder=folder), TrainConfig(name=folder.name.rpartition("-")[0], steps=steps)
    for name, value in (options or {}).items():
        *parents, last = name.split(".")
        place: Any = config
        for parent in parents:
            place = getattr(place, parent)
        setattr(place, last, value)
    write_json(paths.identity, {"options": identity_options(config), "gold": "a hash", "cache": "another"})
    save_config(config, paths.config)
    paths.lock.write_text("free since")
    return paths


def write_steps(paths: RunPaths, done: int) -> None:
    rows = [
        {"step": step, "seconds": 1.5, "data_wait_seconds": 0.5, "tokens_per_second": 1000.0 + step}
        for step in range(1, done + 1)
    ]
    paths.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_state(paths: RunPaths, state: str, *, process: str | None = None, **fields: Any) -> None:
    content = {"state": state, "since": time.time(), "process": this_process() if process is None else process}
    write_json(paths.state, content | fields)


def write_checkpoint(paths: RunPaths, step: int) -> None:
    paths.checkpoints.mkdir()
    write_json(paths.published, {"state": {"step": step}})


def write_result(paths: RunPaths, **more: Any) -> None:
    write_json(paths.result, {"name": "x", "seed": 1, "dev": SCORES, "test": SCORES, "steps": 60} | more)


def let_age(folder: Path, seconds: float) -> None:
    """Make everything in a folder older."""
    for path in [*sorted(folder.rglob("*"), reverse=True), folder]:
        os.utime(path, (time.time() - seconds,) * 2)


def ended_process() -> str:
    """The name of a process of this machine that has ended."""
    code = "from pipeline.core.processes import this_process; print(this_process())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@contextlib.contextmanager
def locked(paths: RunPaths) -> Iterator[None]:
    """The lock of a run, held as a driver holds it."""
    with paths.lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
