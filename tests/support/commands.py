"""The scripts as a user runs them: options, processes, waiting, what a run left."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from pipeline.cache.sequence_files import MappedSequences, write_mapped_sequences
from pipeline.config.commands import ROOTS
from pipeline.config.compose import chosen_groups, register, take_study
from pipeline.config.groups import CONF_DIR
from pipeline.config.options import save_config, to_typed
from pipeline.config.overrides import completed_overrides
from pipeline.config.schema import (
    CaptureConfig,
    Dtype,
    ModelConfig,
    TextConfig,
    TrainConfig,
)
from pipeline.core.files import RunPaths
from pipeline.data.mixture import Mixture
from pipeline.data.text_files import open_text
from pipeline.data.tokenize import load_labeled_sequences
from pipeline.models.tokenizer import open_tokenizer
from pipeline.training.builders import open_mixture
from pipeline.training.identity import identity_of
from pipeline.training.inputs import save_inputs

ROOT = Path(__file__).resolve().parents[2]


def script(name: str, *arguments: str, cwd: Path, check: bool = True, **settings: Any) -> subprocess.CompletedProcess:
    """Run scripts/NAME.py as a user does, from some folder of theirs."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / f"{name}.py"), *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=900,
        **settings,
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def labeled(text: str, data: Path) -> dict[str, Any]:
    """A text of prompts with completions of the tiny data."""
    return {
        f"text@{text}": "own",
        f"{text}.files": f"[{data}/{text}.jsonl]",
        f"{text}.targets": "completion",
        f"{text}.end_token": "false",
    }


def train_arguments(student: Path, data: Path, cache: str, **changes: Any) -> list[str]:
    """A short fp32 run on the tiny models; `changes` are options, dots written as double underscores."""
    chosen: dict[str, Any] = {
        "experiment": "combined",
        "student.path": student,
        "student.dtype": "float32",
        "student.attention": "sdpa",
        "cache": cache,
        "runs_dir": "runs",
        "window": 48,
        **labeled("gold", data),
        **labeled("dev", data),
        **labeled("test", data),
        "scoring.teacher_predictions": "null",
        "scoring.teacher_dev_predictions": "null",
        "global_batch": 4,
        "micro_batch": 2,
        "gold_fraction": 0.25,
        "epochs": "null",
        "steps": 6,
        "optimizer.learning_rate": 0.001,
        "checkpoint.every_steps": 0,
        **{name.replace("__", "."): value for name, value in changes.items()},
    }
    # a text that is null has no options
    without = [name for name in ("gold", "dev", "test") if chosen.get(name) == "null"]
    unused = tuple(f"{name}." for name in without) + tuple(f"text@{name}" for name in without)
    return [f"{name}={value}" for name, value in chosen.items() if not name.startswith(unused)]


def capture_arguments(teacher: Path, data: Path, **changes: Any) -> list[str]:
    chosen: dict[str, Any] = {
        "name": "tiny",
        "caches_dir": "caches",
        "teacher.path": teacher,
        "teacher.dtype": "float32",
        "teacher.attention": "sdpa",
        "corpus.files": f"[{data}/corpus.jsonl]",
        "corpus.targets": "next",
        "corpus.end_token": "false",
        "window": 48,
        "k": 8,
        "temperatures": "[1.0,2.0]",
        "records_per_shard": 25,
        "batch_sequences": 4,
        **{name.replace("__", "."): value for name, value in changes.items()},
    }
    return [f"{name}={value}" for name, value in chosen.items()]


def losses_of(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def start(arguments: list[str], cwd: Path) -> subprocess.Popen:
    """The script in the background, its output in a file, so that it can be interrupted."""
    with (cwd / "output.txt").open("a") as output:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "scripts" / "train.py"), *arguments], cwd=cwd, stdout=output, stderr=output
        )


def wait_for(condition: Any, process: subprocess.Popen | None = None, *, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        assert process is None or process.poll() is None, "ended too soon"
        time.sleep(0.05)


def steps_done(folder: Path) -> int:
    return sum(len(path.read_text().splitlines()) for path in folder.glob("*/metrics.jsonl"))


def wait_for_steps(runs: Path, steps: int, process: subprocess.Popen) -> None:
    """Until the runs of a folder have made so many steps: however slow the machine, a step each five minutes."""
    while (done := steps_done(runs)) < steps:
        wait_for(lambda before=done: steps_done(runs) > before, process)


def composed(root: str, *overrides: str) -> Any:
    study, rest = take_study(list(overrides))
    register(study, chosen=chosen_groups(rest))
    completed, _ = completed_overrides(root, rest)
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return to_typed(compose(root, overrides=completed), ROOTS[root])


@functools.cache
def _experiment(name: str) -> TrainConfig:
    return composed("train", f"experiment={name}", "student.path=x")


def merged(arguments: list[str]) -> TrainConfig:
    """Options of a training run; as `composed`, but composed once for each experiment, which takes Hydra a second."""
    experiment = next(one for one in arguments if one.startswith("experiment="))
    groups = (experiment, "text@")  # a text that is null becomes one by its options
    chosen = OmegaConf.from_dotlist([one.removeprefix("+") for one in arguments if not one.startswith(groups)])
    config: Any = OmegaConf.structured(_experiment(experiment.removeprefix("experiment=")))
    return to_typed(OmegaConf.merge(config, chosen), TrainConfig)


BIT_BY_BIT = ("model.safetensors", "config.json")


def only(folder: Path) -> Path:
    (found,) = folder.iterdir()
    return found


def stop_at(step: int, arguments: list[str], cwd: Path) -> None:
    """Start, ask to stop after a step, and wait for the checkpoint."""
    process = start(arguments, cwd)
    wait_for_steps(cwd / "runs", step, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(300) == 75, (cwd / "output.txt").read_text()[-3000:]


def config_of(teacher: Path, files: Path, folder: Path, **changes: Any) -> CaptureConfig:
    chosen: dict[str, Any] = {
        "name": "tiny",
        "caches_dir": str(folder),
        "teacher": ModelConfig(path=str(teacher), dtype=Dtype.float32),
        "corpus": TextConfig(files=[str(files)]),
        "window": 48,
        "k": 8,
        "temperatures": [1.0, 2.0],
        "records_per_shard": 25,
        **changes,
    }
    return CaptureConfig(**chosen)


def prepare_run(folder: Path, arguments: list[str], *, stop: bool = False) -> Path:
    """A run folder as the driver leaves it to the ranks; with `stop`, they are asked to stop at once."""
    folder.mkdir()
    config, paths = composed("train", "study=demo", *arguments), RunPaths(folder=folder)
    _, inputs = identity_of(config)
    save_config(config, paths.config)
    save_inputs(paths, inputs)
    if stop:
        paths.stop.touch()
    return folder


def mixture_of(config: TrainConfig) -> Mixture:
    """What a rank of this run reads."""
    gold = None
    if config.gold is not None and config.gold_cache is None and config.gold_fraction > 0:
        tokenizer = open_tokenizer(config.student)[1]
        sequences = load_labeled_sequences(open_text(config.gold, "gold"), tokenizer, window=config.window)
        with tempfile.TemporaryDirectory() as folder:
            write_mapped_sequences(Path(folder) / "gold.arrow", sequences)
            gold = MappedSequences(Path(folder) / "gold.arrow")  # the map outlives the file's name
    return open_mixture(config, gold)


def run_ranks(num_ranks: int, folders: list[Path]) -> None:
    """Train the runs of some folders one after another in one process group; a hang ends in a time-out."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    command += [str(ROOT / "tests" / "support" / "zero_worker.py"), *map(str, folders)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    seconds = 300 * len(folders)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds, check=False)
    assert done.returncode == 0, done.stderr[-5000:]


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A small file system of its own; needs root, as CI is."""
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


needs_root = pytest.mark.skipif(os.geteuid() != 0 and not os.environ.get("CI"), reason="mounting needs root")
