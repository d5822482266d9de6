"""Ramps and schedules: pure functions from a step to a factor on a weight or on the learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

# Each shape maps progress in [0, 1] to how far the factor has moved from its start value to its end value. They are the
# names of the enum `Shape` in config/schema.py, which a new one joins; only wsd is computed in `ramp` itself.
SHAPES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 0.0,
    "linear": lambda progress: progress,
    "cosine": lambda progress: 0.5 * (1.0 - math.cos(math.pi * progress)),
    "step": lambda progress: 1.0 if progress > 0.0 else 0.0,
}


def adaptive_kd_factor(
    value: float, *, student: float, teacher: float, margin: float, factor: float, least: float
) -> float:
    """The adaptive factor of the KD weight after an evaluation on dev: lower while the student is better, higher again
    while it is worse, unchanged between.

    Between teacher - margin and teacher + margin nothing changes, so that noise does not change it.
    """
    if student > teacher + margin:
        return max(value * factor, least)
    if student < teacher - margin:
        return min(value / factor, 1.0)
    return value


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
    soon as start_fraction is passed. wsd (warm-up, stable, decay) rises linearly from 0 to start_value until
    start_fraction, and falls linearly from end_fraction on, to end_value at the last step.
    """
    done_fraction = step / max(num_steps, 1)
    if shape == "wsd":
        risen = min(done_fraction / start_fraction, 1.0) if start_fraction > 0.0 else 1.0
        fallen = max(done_fraction - end_fraction, 0.0) / (1.0 - end_fraction) if end_fraction < 1.0 else 0.0
        return start_value * risen + (end_value - start_value) * min(fallen, 1.0)
    width = end_fraction - start_fraction
    if width > 0.0:
        progress = min(max((done_fraction - start_fraction) / width, 0.0), 1.0)
    else:
        progress = 1.0 if done_fraction >= end_fraction else 0.0
    moved = SHAPES[shape](progress)
    return start_value + (end_value - start_value) * moved


def learning_rate(
    step: int,
    *,
    num_steps: int,
    peak: float,
    warmup_fraction: float,
    shape: str,
    final_fraction: float,
    decay_fraction: float,
) -> float:
    """Learning rate of the update that leads from `step` to `step + 1`.

    Rises linearly over the first warmup_fraction of the steps, reaching `peak` on the last of them, then
    follows `shape` down to final_fraction * peak: wsd over the last decay_fraction of the steps.
    """
    num_warmup = math.ceil(warmup_fraction * num_steps)
    if step < num_warmup:
        return peak * (step + 1) / num_warmup
    rest = max(num_steps - num_warmup, 1)
    falls_from = {"end_fraction": max(1.0 - decay_fraction * num_steps / rest, 0.0)} if shape == "wsd" else {}
    return peak * ramp(step - num_warmup, num_steps=rest, shape=shape, end_value=final_fraction, **falls_from)


def step_decay(
    step: int,
    *,
    num_steps: int,
    peak: float,
    warmup_fraction: float,
    at_fractions: Sequence[float],
    factor: float,
) -> float:
    """Learning rate of the update that leads from `step` to `step + 1`: peak * factor^(number of fractions passed).

    torch's MultiStepLR with milestones at_fractions * num_steps and gamma = factor, after the same warm-up.
    """
    num_warmup = math.ceil(warmup_fraction * num_steps)
    if step < num_warmup:
        return peak * (step + 1) / num_warmup
    return peak * factor ** sum(step >= fraction * num_steps for fraction in at_fractions)


def is_due(every_steps: int, step: int) -> bool:
    """Whether something that happens every `every_steps` steps (0: never) happens after this one."""
    return every_steps > 0 and step % every_steps == 0
