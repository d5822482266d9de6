"""The driver of stage two: names a run by what decides its result, starts its ranks, waits, reads the result.

No DeepSpeed and no CUDA here: a sweep's driver lives through many runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pipeline.config.options import save_config
from pipeline.config.schema import TrainConfig
from pipeline.config.validate_train import check_train
from pipeline.core.files import RunPaths, content_hash, write_json
from pipeline.core.progress import log, start_logging
from pipeline.core.types import InputError, RunFailed, Scores
from pipeline.data.mixture import fitting_micro_batch
from pipeline.evaluation.predictions import main_score
from pipeline.models import loading as models
from pipeline.models import lora as adapters
from pipeline.training import checkpoints
from pipeline.training.identity import identity_of

STARTED = time.time()  # of this command, whose time may be limited
EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped on request with a checkpoint; the same command goes on
LOCK_WAIT_SECONDS = 60.0  # how long to wait for the ranks of a driver that was killed to notice


# On a CPU an optimizer step moves gigabytes, and an allocator that returns them to the kernel after each step
# has every page faulted in anew: a step of SmolLM2 took 0.5 to 1.5 s so, 0.2 s with these. What the
# user's environment says stands.
ALLOCATOR_SETTINGS = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TOP_PAD_": str(1 << 28),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "THP_MEM_ALLOC_ENABLE": "1",
}


class Stopped(SystemExit):
    """The run was stopped on request and can go on; a sweep ends with it."""


def run(config: TrainConfig) -> float | None:
    """Bring one run to its result, from nothing or from where it stands; returns its score on dev (else test)."""
    start_logging()
    check_train(config)
    batch = config.global_batch if config.global_batch_tokens is None else config.global_batch_tokens // config.window
    config = dataclasses.replace(config, student=models.resolve_dtype(config.student), global_batch=batch)
    models.check_trained_dtype(config.student)
    ranks = num_processes(config)
    fitting_micro_batch(config.global_batch, world_size=ranks, at_most=config.micro_batch)
    identity = identity_of(config)
    paths = RunPaths(folder=Path(config.runs_dir) / f"{config.name}-{content_hash(identity)[:12]}")
    if not paths.result.exists():
        # refuse one that is not whole before waiting for anybody
        checkpoints.needed(paths, config)
        adapters.check_adapter(config.student)
        paths.folder.mkdir(parents=True, exist_ok=True)
        with run_lock(paths) as lock:
            if not paths.result.exists():  # else somebody finished it while we waited
                run_to_result(config, identity, paths, ranks, lock)
                return sweep_objective(paths)
    log.info("%s is finished; nothing to do", paths.folder)
    return sweep_objective(paths)


def run_to_result(config: TrainConfig, identity: dict[str, Any], paths: RunPaths, ranks: int, lock: int) -> None:
    """Run the ranks until there is a result; Stopped if asked to stop, RunFailed if they end without one."""
    paths.stop.unlink(missing_ok=True)
    with forward_signals(paths):
        write_json(paths.identity, identity)
        save_config(config, paths.config)
        convert_checkpoints(config, paths, ranks)
        log.info("%s: %s", "going on with" if paths.published.exists() else "starting", paths.folder)
        exit_code = run_ranks(config, paths, ranks, lock)
    # a rank may have been told to stop by a signal of its own, or by the clock
    stopped = paths.stop.exists() or (exit_code == 0 and not paths.result.exists())
    paths.stop.unlink(missing_ok=True)
    if paths.result.exists():
        log.info("finished: %s", paths.folder)
    elif stopped and exit_code == 0:
        log.info("stopped: %s; the same command goes on from its checkpoint", paths.folder)
    else:
        raise RunFailed(f"{paths.folder} failed (exit code {exit_code}); the reason stands above and in {paths.log}")
    if stopped:
        raise Stopped(EXIT_STOPPED)


def convert_checkpoints(config: TrainConfig, paths: RunPaths, ranks: int) -> None:
    """Convert the checkpoints that these ranks cannot load as they lie, before they start."""
    if paths.model.exists():
        return
    for found in checkpoints.needed(paths, config):
        if not checkpoints.fits(found, config, ranks):
            log.info(
                "the checkpoint of step %d is of %d ranks at ZeRO %d: converting it for %d ranks at ZeRO %d",
                *(found.step, found.world_size, found.zero_stage, ranks, config.deepspeed.zero_stage),
            )
            checkpoints.convert(paths, found)


def num_processes(config: TrainConfig) -> int:
    """Ranks on this machine: as asked, else one a GPU, else one."""
    if config.launcher.num_processes is not None:
        return config.launcher.num_processes
    return max(torch.cuda.device_count(), 1)


def run_ranks(config: TrainConfig, paths: RunPaths, ranks: int, lock: int) -> int:
    """Start the ranks under torchrun and wait for them."""
    threads = {"OMP_NUM_THREADS": str(max(len(os.sched_getaffinity(0)) // ranks, 1))}
    defaults = threads if torch.cuda.is_available() else threads | ALLOCATOR_SETTINGS
    environment = defaults | os.environ | {"PIPELINE_DRIVER_PID": str(os.getpid())}
    if config.launcher.time_limit is not None:
        stop_at = STARTED + 60.0 * config.launcher.time_limit - config.launcher.leave_seconds
        environment["PIPELINE_STOP_AT"] = str(stop_at)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += ["-m", "pipeline.training.worker", str(paths.folder)]

    # a session of its own: Ctrl-C reaches this process alone, and the ranks through the stop file; the lock goes along,
    # so that it is held until the last rank has left even if this process is killed
    return subprocess.Popen(command, env=environment, start_new_session=True, pass_fds=(lock,)).wait()


@contextlib.contextmanager
def forward_signals(paths: RunPaths) -> Iterator[None]:
    """Turn signals to this process into the stop file, which its ranks look for at their next step."""

    def ask_to_stop(number: int, frame: object) -> None:
        paths.stop.touch()
        log.info("asked to stop: the ranks save at their next step and leave")

    handled = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.signal(number, ask_to_stop) for number in handled}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def run_lock(paths: RunPaths) -> Iterator[int]:
    """Hold a run folder's lock; waits for ranks whose driver was killed, which notice, save and leave."""
    deadline = time.monotonic() + LOCK_WAIT_SECONDS
    with paths.lock.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise InputError(
                        f"{paths.folder}: expected nobody at work there, found {paths.lock.name} held for "
                        f"{LOCK_WAIT_SECONDS:.0f} s; wait for that run or stop it"
                    ) from None
                log.info("%s: somebody is at work there; waiting", paths.folder)
                time.sleep(2.0)
        yield file.fileno()


def sweep_objective(paths: RunPaths) -> float | None:
    """What a sweep maximises: what decides on dev, else on test, else nothing."""
    result = json.loads(paths.result.read_text())
    split = result.get("dev") or result.get("test")
    return main_score(Scores(**split)) if split else None
