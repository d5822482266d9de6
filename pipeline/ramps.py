"""Ramps: pure functions from a step to the factor on a weight or on the learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable

# Each shape maps progress in [0, 1] to how far the factor has moved from its start value to its end value.
SHAPES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 0.0,
    "linear": lambda progress: progress,
    "cosine": lambda progress: 0.5 * (1.0 - math.cos(math.pi * progress)),
    "step": lambda progress: 1.0 if progress > 0.0 else 0.0,
}


def ramp(
    step: int,
    *,
    num_steps: int,
    shape: str,
    start_fraction: float = 0.0,
    end_fraction: float = 1.0,
    start_value: float = 1.0,
    end_value: float = 0.0,
) -> float:
    """The factor at `step` of `num_steps`: start_value before the ramp, end_value after it, `shape` between.

    factor = start + (end - start) * shape(progress), where progress runs from 0 to 1 while the step runs from
    start_fraction to end_fraction of num_steps. A constant ramp stays at start_value; a step ramp jumps as
    soon as start_fraction is passed.
    """
    done_fraction = step / max(num_steps, 1)
    width = end_fraction - start_fraction
    if width > 0.0:
        progress = min(max((done_fraction - start_fraction) / width, 0.0), 1.0)
    else:
        progress = 1.0 if done_fraction >= end_fraction else 0.0
    moved = SHAPES[shape](progress)
    return start_value + (end_value - start_value) * moved


def learning_rate(
    step: int, *, num_steps: int, peak: float, warmup_fraction: float, shape: str, final_fraction: float
) -> float:
    """Learning rate of the update that leads from `step` to `step + 1`.

    Rises linearly over the first warmup_fraction of the steps, reaching `peak` on the last of them, then
    follows `shape` down to final_fraction * peak.
    """
    num_warmup = math.ceil(warmup_fraction * num_steps)
    if step < num_warmup:
        return peak * (step + 1) / num_warmup
    rest = max(num_steps - num_warmup, 1)
    return peak * ramp(step - num_warmup, num_steps=rest, shape=shape, end_value=final_fraction)
