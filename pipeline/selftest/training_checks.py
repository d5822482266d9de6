"""Checks of stage two with the real driver and tiny runs: ZeRO stages, offload, resume, export, and the ranks' sums."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import torch

from pipeline.config.schema import (
    CheckpointConfig,
    DeepspeedConfig,
    LauncherConfig,
    Offload,
    OptimizerConfig,
    StudentConfig,
    TextConfig,
    TrainConfig,
)
from pipeline.core.files import RunPaths
from pipeline.core.runtime import module_command
from pipeline.core.stopping import Stopped
from pipeline.models.model_files import tensor_sizes
from pipeline.monitoring.metrics import MetricsFile, StepMetrics
from pipeline.selftest.outcomes import Finding, judged, skipped
from pipeline.selftest.place import Place, captured, missing_gpus
from pipeline.training import driver

STEPS = 6
SEQUENCES = 4  # of each rank in a step
CPU_RANKS = 2
HANG_SECONDS = 120.0  # a step here takes a fraction of one
MAX_LOSS_DIFFERENCE = 1e-4  # relative, between ZeRO stages in float32: they add in another order
REDUCED_BYTES = 256_000_000  # on GPUs; gloo takes a second for so many
REDUCED_BYTES_CPU = 8_000_000


def num_ranks() -> int:
    """One for each GPU; two on a CPU, so that there is something to partition."""
    return torch.cuda.device_count() or CPU_RANKS


def options(place: Place, runs_dir: Path, zero_stage: int, offload: Offload = Offload.none) -> TrainConfig:
    """A short combined run over the place's cache and gold set."""
    return TrainConfig(
        name="selftest",
        runs_dir=str(runs_dir),
        student=StudentConfig(path=str(place.model), dtype=place.dtype),
        cache=str(captured(place)),
        gold=TextConfig(files=[str(place.folder / "gold.jsonl")]),
        gold_fraction=0.25,
        window=place.size.positions,
        global_batch=SEQUENCES * num_ranks(),
        micro_batch=SEQUENCES // 2,  # two micro-batches a step
        steps=STEPS,
        optimizer=OptimizerConfig(learning_rate=1e-3),
        deepspeed=DeepspeedConfig(zero_stage=zero_stage, offload=offload),
        checkpoint=CheckpointConfig(every_steps=0),
        launcher=LauncherConfig(num_processes=num_ranks(), quiet=True, hang_seconds=HANG_SECONDS),
    )


def trained(place: Place, zero_stage: int, offload: Offload = Offload.none) -> RunPaths:
    """The finished run of a ZeRO stage; it is trained at the first call."""
    runs_dir = place.folder / "runs" / f"zero{zero_stage}-{offload.name}"
    driver.run(options(place, runs_dir, zero_stage, offload))
    return run_in(runs_dir)


def run_in(runs_dir: Path) -> RunPaths:
    """The only run of a folder."""
    (folder,) = (path for path in runs_dir.iterdir() if path.is_dir() and not path.name.startswith("."))
    return RunPaths(folder=folder)


def steps_of(paths: RunPaths) -> list[StepMetrics]:
    """The metrics of each step."""
    return MetricsFile.read(paths.metrics)


def furthest(paths: RunPaths, other: RunPaths) -> float:
    """The largest relative difference between the losses of two runs, step by step."""
    pairs = zip(steps_of(paths), steps_of(other), strict=True)
    return max(abs(one["loss"] - two["loss"]) / abs(two["loss"]) for one, two in pairs)


# --------------------------------------------------------------------------------------------- checks


def zero(place: Place, zero_stage: int, offload: Offload = Offload.none) -> Finding:
    """The losses of a ZeRO stage on all devices, against those of ZeRO 0."""
    if (offload is not Offload.none or zero_stage == 2) and (reason := missing_gpus(1)):
        return skipped(f"{reason} (on a CPU left out: ZeRO 1 and 3 run)")
    found = trained(place, zero_stage, offload)
    off, last = furthest(found, trained(place, 0)), steps_of(found)[-1]["loss"]
    figures = f"{STEPS} losses off by at most {off:.1e} of ZeRO 0's ({MAX_LOSS_DIFFERENCE:g}), the last {last:.4f}"
    return judged(off <= MAX_LOSS_DIFFERENCE, f"{num_ranks()} ranks: {figures}")


def resume(place: Place) -> Finding:
    """A run that is stopped after its first step and goes on, against one that was not, both at ZeRO 1."""
    undisturbed = trained(place, 1)
    runs_dir = place.folder / "runs" / "stopped"
    config = options(place, runs_dir, 1)
    config.launcher.time_limit, config.launcher.leave_seconds = 1e-9, 0.0  # it is over when the first step ends
    was_stopped = False
    try:
        driver.run(config)
    except Stopped as stopped:
        if stopped.signals:  # by the user, and not by the limit
            raise
        was_stopped = True
    before = len(steps_of(run_in(runs_dir)))
    driver.run(options(place, runs_dir, 1))
    resumed = run_in(runs_dir)
    off = furthest(resumed, undisturbed)
    weights = [(paths.model / "model.safetensors").read_bytes() for paths in (resumed, undisturbed)]
    is_same = weights[0] == weights[1]
    figures = f"stopped after {before} of {STEPS} steps; losses off by {off:.1e}, weights "
    figures += "the same bit for bit" if is_same else "not the same bits"
    limit = 0.0 if missing_gpus(1) else MAX_LOSS_DIFFERENCE  # GPUs add in an order that changes
    return judged(was_stopped and before < STEPS and off <= limit and (is_same or limit > 0), figures)


def tied_head(place: Place) -> Finding:
    """How often the exported model has the matrix that is both embedding and head, from each ZeRO stage."""
    stages = (0, 1, 3) if missing_gpus(1) else (0, 1, 2, 3)
    counts = {}
    for stage in stages:
        sizes = tensor_sizes(trained(place, stage).model)
        rows = max(sizes, key=lambda name: sizes[name][0])  # the embedding has the most rows
        counts[stage] = sum(size == sizes[rows] for size in sizes.values())
    figures = ", ".join(f"ZeRO {stage}: {count} time{'s' * (count != 1)}" for stage, count in counts.items())
    return judged(set(counts.values()) == {1}, f"exported by {figures}")


def all_reduce(place: Place) -> Finding:
    """A sum over all ranks against the exact one: NCCL over the GPUs, gloo between two processes of a CPU."""
    is_cpu = missing_gpus(1) is not None
    if not is_cpu and (reason := missing_gpus(2)):
        return skipped(reason)
    num_bytes = REDUCED_BYTES_CPU if is_cpu else REDUCED_BYTES
    rank = module_command("pipeline.selftest.all_reduce", str(num_bytes))
    torchrun = ("torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks()}", "--no-python")
    done = subprocess.run(module_command(*torchrun, *rank), capture_output=True, text=True, check=False, timeout=120)
    if done.returncode != 0:
        return judged(False, f"the ranks ended with exit code {done.returncode}: {done.stderr[-300:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    figures = f"error {found['error']:g} (0), {found['bytes_per_second'] / 1e9:.2f} GB/s of each rank"
    return judged(found["error"] == 0, f"{'gloo' if is_cpu else 'NCCL'}, {num_ranks()} ranks: {figures}")
