"""Checks of stage one: what a device captures against what the CPU captures, and how it reaches host memory."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from pipeline.capture.teacher import PendingBatch, finish_copy, forward_batch, start_copy, timestamp
from pipeline.config.schema import Dtype
from pipeline.core.types import Captured, map_tensors
from pipeline.selftest.outcomes import Finding, judged, skipped
from pipeline.selftest.place import Place, missing_gpus, open_place_model

CPU = torch.device("cpu")
BUSY_SIZE, BUSY_PRODUCTS = 4096, 20  # matrix products that keep a GPU at work before each forward


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How far a capture may be from that of the CPU in float32."""

    overlap: float
    """The least fraction of the kept ids in common."""
    mean: float
    """Of the difference of a target's log-probability, in nats."""
    largest: float
    """The same for a single position: a row of another batch is several nats away."""


LIMITS = {  # a cache keeps a log-probability in float16, which rounds it by up to 0.004 nats
    Dtype.float32: Limits(overlap=0.995, mean=0.001, largest=0.02),
    Dtype.bfloat16: Limits(overlap=0.9, mean=0.05, largest=1.0),
}


@lru_cache(maxsize=4)
def captured_on(place: Place, device: torch.device, dtype: Dtype) -> Captured:
    """What a device captures of the place's corpus, in host memory."""
    teacher = open_place_model(place, device, dtype)
    parts = [forward_batch(teacher, batch, place.manifest) for batch in place.batches()]
    return map_tensors(Captured.cat(parts), lambda column: column.cpu())


def overlap(expected: Captured, found: Captured) -> float:
    """The mean fraction of the kept ids that two captures of the same positions have in common."""
    is_same_NKK = expected.top.ids_NK[:, :, None] == found.top.ids_NK[:, None, :]
    return float(is_same_NKK.any(dim=2).float().mean())


def differences(expected: Captured, found: Captured) -> tuple[float, float]:
    """Mean and largest difference of a target's log-probability, in nats."""
    off_N = (expected.next_log_prob_N.float() - found.next_log_prob_N.float()).abs()
    return float(off_N.mean()), float(off_N.max())


def compared(place: Place, device: torch.device, dtype: Dtype) -> Finding:
    """A device in a dtype against the CPU in float32."""
    limits = LIMITS[dtype]
    expected, found = captured_on(place, CPU, Dtype.float32), captured_on(place, device, dtype)
    shared, (mean, largest) = overlap(expected, found), differences(expected, found)
    figures = f"{dtype.name}: {shared:.2%} of the ids shared ({limits.overlap:.1%}), log-prob off by {mean:.2g} in "
    figures += f"the mean ({limits.mean:g}), {largest:.2g} at most ({limits.largest:g})"
    is_near = shared >= limits.overlap and mean <= limits.mean and largest <= limits.largest
    return judged(is_near, figures)


def cpu(place: Place) -> Finding:
    """The CPU in bfloat16 against itself in float32."""
    return compared(place, CPU, Dtype.bfloat16)


def gpu(place: Place, dtype: Dtype) -> Finding:
    """The first GPU against the CPU."""
    reason = missing_gpus(1)
    return skipped(reason) if reason else compared(place, torch.device("cuda", 0), dtype)


def other_gpu(place: Place, dtype: Dtype) -> Finding:
    """The last GPU, in a process whose current device is the first, against the CPU."""
    reason = missing_gpus(2)
    return skipped(reason) if reason else compared(place, torch.device("cuda", torch.cuda.device_count() - 1), dtype)


def copies(place: Place) -> Finding:
    """What the copies on a second stream bring to host memory, against copies that block, to the last bit.

    Before each forward the GPU has other work, and its memory is free for the next one as soon as its copy has begun:
    a copy that does not wait for the forward, or memory that is used again too soon, brings other numbers.
    """
    if reason := missing_gpus(1):
        return skipped(reason)
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    teacher = open_place_model(place, device, Dtype.bfloat16)
    busy_HH = torch.randn(BUSY_SIZE, BUSY_SIZE, device=device)
    pending: list[PendingBatch] = []
    kept: list[Captured] = []
    with torch.inference_mode():
        for batch in place.batches():
            for _ in range(BUSY_PRODUCTS):
                torch.mm(busy_HH, busy_HH)
            started = timestamp(device)
            captured = forward_batch(teacher, batch, place.manifest)
            kept.append(map_tensors(captured, torch.clone))
            pending.append(start_copy(batch, captured, started))
            del captured  # its memory is the allocator's again
    num_different = sum(not same(finish_copy(one)[0], other) for one, other in zip(pending, kept, strict=True))
    return judged(num_different == 0, f"{device}: {num_different} of {len(pending)} batches differ (0)")


def same(sequences: list[Captured], on_device: Captured) -> bool:
    """Whether the sequences of a batch hold the numbers that the device has."""
    whole, expected = Captured.cat(sequences), map_tensors(on_device, lambda column: column.cpu())
    pairs = (
        (whole.top.ids_NK, expected.top.ids_NK),
        (whole.top.relative_logits_NK, expected.top.relative_logits_NK),
        (whole.top.log_tail_NC, expected.top.log_tail_NC),
        (whole.next_log_prob_N, expected.next_log_prob_N),
        (whole.entropy_N, expected.entropy_N),
    )
    return all(torch.equal(found, wanted) for found, wanted in pairs)
