"""How training curves end: the level of a loss, whether it still falls, whether it rose from its minimum.

A curve is a list of (step, value), one pair for each step at which a value was logged.
"""

from __future__ import annotations

import math
from statistics import fmean, linear_regression

from pipeline.analysis.values import ArmFigures, StudyFigures, Training

Curve = list[tuple[int, float]]

LAST_FRACTION = 0.2
"""The end of a curve: its last fifth."""
FALL_FRACTION = 0.05
"""A loss still falls where a line through the end falls by at least this fraction of its mean ..."""
FALL_NATS = 0.01
"""... and by this much, because 5 % of almost nothing is nothing ..."""
FALL_ERRORS = 3.0
"""... and by as many standard errors of the line: the losses of steps differ by their batches."""
MIN_POINTS = 5
"""Fewer points at the end show no slope."""
MIN_LOOKS = 3
"""Fewer evaluations on dev show no minimum."""


def curve(study: StudyFigures, key: str, arm: ArmFigures | None) -> Curve:
    """The curve of an arm by its key in metrics.jsonl; empty where it was not logged."""
    training = None if arm is None else _training(study, arm)
    if training is None or key not in training.curves:
        return []
    pairs = zip(training.steps, training.curves[key], strict=True)
    return [(step, value) for step, value in pairs if value is not None]


def num_steps(study: StudyFigures, arm: ArmFigures) -> int | None:
    """The last step of an arm's curves; None without curves."""
    training = _training(study, arm)
    return None if training is None or not training.steps else max(training.steps)


def _training(study: StudyFigures, arm: ArmFigures) -> Training | None:
    return next((training for training in study.training if training.label == arm.arm.label), None)


def last_part(points: Curve) -> Curve:
    """The points of the last fifth of all steps."""
    return [(step, value) for step, value in points if step > (1 - LAST_FRACTION) * points[-1][0]]


def end(points: Curve) -> float | None:
    """Mean over the last fifth; None for an empty curve."""
    return fmean(value for _, value in last_part(points)) if points else None


def fraction_left(points: Curve) -> float | None:
    """The mean over the last fifth divided by the first value."""
    return fmean(value for _, value in last_part(points)) / points[0][1] if points and points[0][1] > 0 else None


def falls(points: Curve) -> bool | None:
    """Whether the least-squares line through the last fifth falls by more than noise; None below MIN_POINTS."""
    last = last_part(points) if points else []
    if len(last) < MIN_POINTS:
        return None
    steps, values = [float(step) for step, _ in last], [value for _, value in last]
    slope, start = linear_regression(steps, values)
    squares = sum((value - start - slope * step) ** 2 for step, value in last)
    spread = sum((step - fmean(steps)) ** 2 for step in steps)
    standard_error = math.sqrt(squares / (len(last) - 2) / spread)
    fall = -slope * (steps[-1] - steps[0])
    return fall >= max(FALL_FRACTION * fmean(values), FALL_NATS) and -slope >= FALL_ERRORS * standard_error


def rise(points: Curve) -> float | None:
    """The last value divided by the minimum, minus 1; None below MIN_LOOKS."""
    values = [value for _, value in points]
    return None if len(values) < MIN_LOOKS or min(values) <= 0 else values[-1] / min(values) - 1
