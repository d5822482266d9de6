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

from pipeline.cache import manifest as manifests
from pipeline.config.options import result_options, save_config
from pipeline.config.schema import Source, Take, TrainConfig
from pipeline.config.validate_train import check_train
from pipeline.core.files import RunPaths, content_hash, write_json
from pipeline.core.object_store import one_place
from pipeline.core.progress import log, start_logging
from pipeline.core.topk import temperature_index
from pipeline.core.types import InputError, RunFailed, Scores
from pipeline.data.mixture import fitting_micro_batch
from pipeline.data.records import open_text
from pipeline.data.tokenize import survey, text_hash
from pipeline.evaluation.requests import check_questions, open_exam
from pipeline.evaluation.scoring import decisive, teacher_choices, teacher_score
from pipeline.models import loading as models
from pipeline.models import lora as adapters
from pipeline.objective.divergences import NEEDS_TAIL
from pipeline.training import checkpoints
from pipeline.training.builders import class_ids

STARTED = time.time()  # of this command, whose time may be limited
EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped on request with a checkpoint; the same command goes on
PATIENCE_SECONDS = 60.0  # how long to wait for the ranks of a driver that was killed to notice


# On a CPU an optimizer step moves gigabytes, and an allocator that returns them to the kernel after each step
# has every page faulted in anew: a step of SmolLM2 took 0.5 to 1.5 s so, 0.2 s with these. What the
# user's environment says stands.
CPU_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TOP_PAD_": str(1 << 28),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "THP_MEM_ALLOC_ENABLE": "1",
}


class Stopped(SystemExit):
    """The run was stopped on request and can go on; a sweep ends with it."""


def train(config: TrainConfig) -> float | None:
    """Bring one run to its result, from nothing or from where it stands; returns its score on dev (else test)."""
    start_logging()
    check_train(config)
    batch = config.global_batch if config.global_batch_tokens is None else config.global_batch_tokens // config.window
    config = dataclasses.replace(config, student=models.settled(config.student), global_batch=batch)
    models.check_trained_dtype(config.student)
    ranks = num_processes(config)
    fitting_micro_batch(config.global_batch, world_size=ranks, at_most=config.micro_batch)
    identity = identify(config)
    paths = RunPaths(folder=Path(config.runs_dir) / f"{config.name}-{content_hash(identity)[:12]}")
    if not paths.result.exists():
        # refuse one that is not whole before waiting for anybody
        checkpoints.needed(paths, config)
        adapters.check(config.student)
        paths.folder.mkdir(parents=True, exist_ok=True)
        with alone(paths) as lock:
            if not paths.result.exists():  # else somebody finished it while we waited
                bring_to_result(config, identity, paths, ranks, lock)
                return objective(paths)
    log.info("%s is finished; nothing to do", paths.folder)
    return objective(paths)


def bring_to_result(config: TrainConfig, identity: dict[str, Any], paths: RunPaths, ranks: int, lock: int) -> None:
    """Run the ranks until there is a result; Stopped if asked to stop, RunFailed if they end without one."""
    paths.stop.unlink(missing_ok=True)
    with stopping(paths):
        write_json(paths.identity, identity)
        save_config(config, paths.config)
        bring_checkpoint(config, paths, ranks)
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


def identify(config: TrainConfig) -> dict[str, Any]:
    """All that decides the result of a run: its options, and its inputs by their content.

    Reads and checks every input on the way, so that a bad one stops here, before any model loads.
    """
    folder, tokenizer = models.open_tokenizer(config.student)
    models.check_window(folder, config.window)
    class_ids(config.loss.confidence.choices, tokenizer)
    identity: dict[str, Any] = {
        "options": result_options(config),
        "student": [models.weights_hash(folder), models.tokenizer_hash(tokenizer), models.text_rules(tokenizer)],
    }
    if config.cache is not None and config.gold_fraction < 1:
        identity["cache"] = check_cache(config, config.cache, "cache", folder, tokenizer)
        further = [check_cache(config, address, "more_caches", folder, tokenizer) for address in config.more_caches]
        identity |= {"more_caches": further} if further else {}
        check_alike([config.cache, *config.more_caches, *([config.gold_cache] if config.gold_cache else [])])
    if config.gold_cache is not None and config.gold_fraction > 0:
        identity["gold_cache"] = check_cache(config, config.gold_cache, "gold_cache", folder, tokenizer)
    follows = config.loss.kd.overtaken
    if config.gold is not None and config.gold_cache is None and config.gold_fraction > 0:
        gold = open_text(config.gold, "gold")
        identity["gold"] = survey(gold, tokenizer, window=config.window, require_targets=True).sha256
    longest, exams = models.longest_sequence(folder), []
    for split, held_out in (("dev", config.dev), ("test", config.test)):
        if held_out is not None:
            text = open_text(held_out, split)
            exam = open_exam(text, tokenizer, longest=longest, max_new_tokens=config.scoring.max_new_tokens)
            exams.append(exam)
            identity[split] = text_hash(text)
            if split == "dev" and follows.every_steps > 0 and follows.teacher_predictions is not None:
                identity["dev_goal"] = teacher_score(exam, follows.teacher_predictions)
            if split == "test" and config.scoring.teacher_predictions is not None:
                chosen = teacher_choices(exam, config.scoring.teacher_predictions)
                identity["teacher_predictions"] = content_hash(chosen.to_list())
    check_questions(exams)
    return identity


def bring_checkpoint(config: TrainConfig, paths: RunPaths, ranks: int) -> None:
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


def check_cache(config: TrainConfig, address: str, what: str, folder: Path, tokenizer: Any) -> str:
    """The fingerprint of a whole cache that this student and this objective can read."""
    cache, kd, hard = one_place(address, what), config.loss.kd, config.loss.hard
    manifest = manifests.load(cache)
    manifests.whole(cache, manifest)
    models.check_same_tokenizer(
        manifest.made_of["tokenizer"], models.tokenizer_hash(tokenizer), cache=str(cache), student=str(folder)
    )
    models.check_window(folder, manifest.window)
    temperature_index(manifest.temperatures, kd.temperature)
    if config.k is not None and not 1 <= config.k <= manifest.k:
        raise InputError(f"k: expected 1 to {manifest.k} (captured in {cache}), found {config.k}")
    if kd.divergence.name in NEEDS_TAIL and kd.weight > 0 and (manifest.kind, manifest.tail) != ("topk", "exact"):
        raise InputError(
            f"divergence={kd.divergence.name}: expected a topk cache with an exact tail, because it is not "
            f"linear in what the teacher says, found {manifest.kind}, tail {manifest.tail} ({cache}); use forward_kl"
        )
    if config.curriculum_parts > 1 and what != "gold_cache" and manifest.tail != "exact":
        raise InputError(
            f"curriculum_parts: expected caches that know the teacher's entropy, found one with tail {manifest.tail} "
            f"({cache}), which was imported; capture with this project, or use curriculum_parts=1"
        )
    if hard.weight == 0 or (Source.gold if what == "gold_cache" else Source.corpus) not in hard.on:
        return manifest.fingerprint
    if hard.take is Take.likeliest and manifest.kind == "sampled":
        raise InputError(
            f"loss.hard.take=likeliest: expected a cache that keeps the largest logits, found {manifest.kind} "
            f"({cache}), whose likeliest draw is chance; capture with kind=topk or hybrid"
        )
    if hard.take is Take.said and "complete" not in manifest.made_of:
        raise InputError(
            f"loss.hard.take=said: expected a cache whose records the teacher completed, found none in {cache}; "
            "capture with complete.how, or use loss.hard.take=likeliest"
        )
    return manifest.fingerprint


def check_alike(addresses: list[str]) -> None:
    """Refuse caches of different temperatures: their distributions stand in one batch."""
    found = {address: manifests.load(one_place(address, "cache")).temperatures for address in addresses}
    if len(set(found.values())) > 1:
        raise InputError(
            f"cache: expected the same captured temperatures in all that are read together, found "
            f"{ {address: list(temperatures) for address, temperatures in found.items()} }; capture them alike"
        )


def num_processes(config: TrainConfig) -> int:
    """Ranks on this machine: as asked, else one a GPU, else one."""
    if config.launcher.num_processes is not None:
        return config.launcher.num_processes
    return max(torch.cuda.device_count(), 1)


def run_ranks(config: TrainConfig, paths: RunPaths, ranks: int, lock: int) -> int:
    """Start the ranks under torchrun and wait for them."""
    threads = {"OMP_NUM_THREADS": str(max(len(os.sched_getaffinity(0)) // ranks, 1))}
    defaults = threads if torch.cuda.is_available() else threads | CPU_MEMORY
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
def stopping(paths: RunPaths) -> Iterator[None]:
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
def alone(paths: RunPaths) -> Iterator[int]:
    """Hold a run folder's lock; waits for ranks whose driver was killed, which notice, save and leave."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    with paths.lock.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise InputError(
                        f"{paths.folder}: expected nobody at work there, found {paths.lock.name} held for "
                        f"{PATIENCE_SECONDS:.0f} s; wait for that run or stop it"
                    ) from None
                log.info("%s: somebody is at work there; waiting", paths.folder)
                time.sleep(2.0)
        yield file.fileno()


def objective(paths: RunPaths) -> float | None:
    """What a sweep maximises: what decides on dev, else on test, else nothing."""
    result = json.loads(paths.result.read_text())
    split = result.get("dev") or result.get("test")
    return decisive(Scores(**split)) if split else None
