"""Speed and memory of both stages: on GPUs with a model large enough for the figures to mean something."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections import deque

import torch

from pipeline.capture.teacher import PendingBatch, capture_batch, finish_copy
from pipeline.config.schema import Dtype
from pipeline.core.runtime import compute_device
from pipeline.models.model_files import tensor_sizes
from pipeline.monitoring.health import model_flops, model_size, peak_flops
from pipeline.objective.fused_head import CHUNK_BYTES
from pipeline.selftest.memory import RunSize, forecast
from pipeline.selftest.outcomes import Finding, judged, skipped
from pipeline.selftest.place import Place, larger, missing_gpus, open_place_model
from pipeline.selftest.training_checks import SEQUENCES, num_ranks, steps_of, trained

MEMORY_FACTOR = 2.0  # between forecast and measurement, either way
CHUNKS = 3  # of logits at once: themselves, in float32, and a product
FIRST_STEPS = 2  # slower: kernels are chosen, memory is allocated
MIN_SECONDS = 2.0


def measured_place(place: Place) -> Place:
    """Where speed is measured: the larger model on a GPU."""
    return place if missing_gpus(1) else larger(place)


def capture(place: Place) -> Finding:
    """Tokens a second of stage one on one device, and the fraction of its peak FLOP/s."""
    place, device = measured_place(place), compute_device()
    teacher = open_place_model(place, device, place.dtype)
    size, batches = model_size(teacher), list(place.batches())
    pending: deque[PendingBatch] = deque()
    tokens, supervised, started = 0, 0, time.perf_counter()
    for index, batch in enumerate(itertools.cycle(batches)):
        if index == FIRST_STEPS:
            tokens, supervised, started = 0, 0, time.perf_counter()
        pending.append(capture_batch(teacher, batch, place.manifest))
        if len(pending) > 1:  # one forward runs while the batch before it is copied
            finish_copy(pending.popleft())
        tokens += sum(len(sequence.input_ids_S) for sequence in batch)
        supervised += sum(len(sequence.target_ids_N) for sequence in batch)
        if index > FIRST_STEPS and time.perf_counter() - started > MIN_SECONDS:
            break
    finish_copy(pending.popleft())
    seconds = time.perf_counter() - started
    # a forward is a third of forward and backward
    flops = model_flops(size, tokens=tokens, supervised=supervised, window=place.size.positions) / 3
    peak = peak_flops(device, place.dtype.name)
    return shown(tokens / seconds, None if peak is None else flops / seconds / peak, place, device)


def training(place: Place) -> Finding:
    """Tokens a second of stage two on all devices, and the fraction of their peak FLOP/s, at ZeRO 1."""
    place = measured_place(place)
    rows = steps_of(trained(place, 1))[FIRST_STEPS:]
    speed = statistics.median(row["tokens_per_second"] for row in rows)
    mfus = [row["mfu"] for row in rows if "mfu" in row]
    return shown(speed, statistics.median(mfus) if mfus else None, place, compute_device())


def shown(speed: float, mfu: float | None, place: Place, device: torch.device) -> Finding:
    """The finding of a speed: wrong if it is no number, or if more FLOPs were counted than the device can do."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
    used = f"no MFU: the peak of {name} is not known" if mfu is None else f"MFU {mfu:.1%}"
    is_right = math.isfinite(speed) and speed > 0 and (mfu is None or 0 < mfu <= 1)
    kind = f"hidden {place.size.hidden}, {place.size.layers} layers, {place.dtype.name}"
    return judged(is_right, f"{speed:,.0f} tokens/s ({kind}), {used}")


def memory(place: Place) -> Finding:
    """The peak memory of a rank in stage two, against the forecast."""
    if reason := missing_gpus(1):
        return skipped(f"{reason} (a CPU's peak is that of the whole process)")
    place = larger(place)
    measured = max(row["peak_memory_bytes"] for row in steps_of(trained(place, 1)))
    expected = forecast(run_size(place, zero_stage=1))
    figures = f"{measured / 1e9:.2f} GB, forecast {expected / 1e9:.2f} GB"
    is_near = expected / MEMORY_FACTOR <= measured <= expected * MEMORY_FACTOR
    return judged(is_near, f"{figures}, ratio {measured / expected:.2f} ({1 / MEMORY_FACTOR:g} to {MEMORY_FACTOR:g})")


def run_size(place: Place, *, zero_stage: int) -> RunSize:
    """The size of the place's own run."""
    tokens, vocabulary = SEQUENCES // 2 * place.size.positions, place.manifest.vocabulary_size
    width = 4 if place.dtype is Dtype.float32 else 2
    logits_bytes = min(width * tokens * vocabulary, CHUNK_BYTES)
    return RunSize(
        parameters=sum(math.prod(size) for size in tensor_sizes(place.model).values()),
        zero_stage=zero_stage,
        ranks=num_ranks(),
        is_half=place.dtype is not Dtype.float32,
        accumulates=True,
        offloads=False,
        tokens=tokens,
        hidden=place.size.hidden,
        layers=place.size.layers,
        head_bytes=CHUNKS * logits_bytes + 4 * vocabulary * place.size.hidden,
    )
