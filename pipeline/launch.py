"""The driver of stage two: names a run by what decides its result, starts its ranks, waits, reads the result.

No DeepSpeed and no CUDA here: a sweep's driver lives through many runs.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from pipeline import config as configs
from pipeline import manifest as manifests
from pipeline import models
from pipeline.config import TrainConfig
from pipeline.corpus import known_sequences
from pipeline.dataset import micro_batches_per_step
from pipeline.runtime import (
    RunPaths,
    content_hash,
    file_hash,
    log,
    one_path,
    start_logging,
    write_json,
)
from pipeline.text import open_text, survey
from pipeline.topk import temperature_index
from pipeline.types import InputError

EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped on request with a checkpoint; the same command goes on
PATIENCE_SECONDS = 60.0  # how long to wait for the ranks of a driver that was killed to notice


# On a CPU an optimizer step moves gigabytes, and an allocator that returns them to the kernel after each step
# has every page faulted in anew: a step of SmolLM2 took 0.5 to 1.5 s so, 0.2 s with these (the user's own win).
CPU_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TOP_PAD_": str(1 << 28),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "THP_MEM_ALLOC_ENABLE": "1",
}


class Stopped(SystemExit):
    """The run was stopped on request and can go on."""


def train(config: TrainConfig) -> float | None:
    """Bring one run to its result, from nothing or from where it stands; returns dev (else test) accuracy."""
    start_logging()
    configs.check_train(config)
    identity = identify(config)
    paths = RunPaths(folder=Path(config.runs_dir) / f"{config.name}-{content_hash(identity)[:12]}")
    if paths.result.exists():
        log.info("%s is finished; nothing to do", paths.folder)
        return objective(paths)
    paths.folder.mkdir(parents=True, exist_ok=True)
    wait_until_free(paths)
    paths.stop.unlink(missing_ok=True)
    write_json(paths.identity, identity)
    configs.save(config, paths.config)
    log.info("%s: %s", "going on with" if paths.published.exists() else "starting", paths.folder)
    exit_code = run_ranks(config, paths)
    if paths.result.exists():
        log.info("finished: %s", paths.folder)
        return objective(paths)
    if exit_code == 0 and paths.stop.exists():
        log.info("stopped: %s; the same command goes on from its checkpoint", paths.folder)
        raise Stopped(EXIT_STOPPED)
    log.error("%s failed (exit code %d); its last lines stand above and in %s", paths.folder, exit_code, paths.log)
    raise SystemExit(exit_code or 1)


def identify(config: TrainConfig) -> dict[str, Any]:
    """All that decides the result of a run: its options, and its inputs by their content.

    Reads and checks every input on the way, so that a bad one stops here, before any model loads.
    """
    folder = models.model_folder(config.student.path, revision=config.student.revision)
    tokenizer = models.load_tokenizer(folder, trust_remote_code=config.student.trust_remote_code)
    models.check_window(folder, config.window)
    identity: dict[str, Any] = {
        "options": configs.result_options(config),
        "student": [models.weights_hash(folder), models.tokenizer_hash(tokenizer), tokenizer.chat_template],
    }
    if config.cache is not None and config.gold_fraction < 1:
        identity["cache"] = check_cache(config, folder, tokenizer)
    for split, text in (("gold", config.gold), ("dev", config.dev), ("test", config.test)):
        if text is not None:
            identity[split] = survey(open_text(text, split), tokenizer).sha256
    if config.gold is not None and config.gold_fraction > 0:
        known_sequences(open_text(config.gold, "gold"), tokenizer, window=config.window)
    if config.scoring.teacher_predictions is not None:
        path = one_path(config.scoring.teacher_predictions, "scoring.teacher_predictions")
        identity["teacher_predictions"] = file_hash(path)
    return identity


def check_cache(config: TrainConfig, folder: Path, tokenizer: Any) -> str:
    """The fingerprint of a whole cache that this student can read."""
    assert config.cache is not None
    cache = one_path(config.cache, "cache")
    manifest = manifests.load(cache)
    manifests.whole(cache, manifest)
    models.check_same_tokenizer(
        manifest.made_of["tokenizer"], models.tokenizer_hash(tokenizer), cache=str(cache), student=str(folder)
    )
    models.check_window(folder, manifest.window)
    temperature_index(manifest.temperatures, config.loss.kd.temperature)
    if config.k is not None and not 1 <= config.k <= manifest.k:
        raise InputError(f"k: expected 1 to {manifest.k} (captured in {cache}), found {config.k}")
    return manifest.fingerprint


def num_processes(config: TrainConfig) -> int:
    """Ranks on this machine: as asked, else one a GPU, else one."""
    if config.launcher.num_processes is not None:
        return config.launcher.num_processes
    return max(torch.cuda.device_count(), 1)


def run_ranks(config: TrainConfig, paths: RunPaths) -> int:
    """Start the ranks under torchrun and wait for them; a signal to this process asks them to stop."""
    ranks = num_processes(config)
    micro_batches_per_step(config.global_batch, world_size=ranks, micro_batch=config.micro_batch)
    threads = {"OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // ranks, 1))}
    defaults = threads if torch.cuda.is_available() else threads | CPU_MEMORY
    environment = defaults | os.environ | {"PIPELINE_DRIVER_PID": str(os.getpid())}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += ["-m", "pipeline.train", str(paths.folder)]

    def ask_to_stop(number: int, frame: object) -> None:
        paths.stop.touch()

    handled = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.signal(number, ask_to_stop) for number in handled}
    try:
        # a session of its own: Ctrl-C reaches this process alone, and the ranks through the stop file
        return subprocess.Popen(command, env=environment, start_new_session=True).wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def wait_until_free(paths: RunPaths) -> None:
    """Wait for ranks whose driver was killed: they notice at their next step, save and leave."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    with paths.lock.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError:
                if time.monotonic() > deadline:
                    raise InputError(
                        f"{paths.folder}: expected nobody at work there, found {paths.lock.name} held for "
                        f"{PATIENCE_SECONDS:.0f} s; wait for that run or stop it"
                    ) from None
                time.sleep(0.5)


def objective(paths: RunPaths) -> float | None:
    """What a sweep maximises: accuracy on dev, else on test, else nothing."""
    result = json.loads(paths.result.read_text())
    split = result.get("dev") or result.get("test")
    return split["accuracy"] if split else None
