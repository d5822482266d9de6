"""Linear students: softmax regression on standardised features, to its optimum, in float64 on the CPU.

    minimise over W, b   sum_N weight_N CE(targets_N, softmax(x_N W + b))  +  l2 / 2 * |W|^2

The function is convex and, but for a shift of b, strictly so: the student is a function of its data alone, whatever it
starts from. F counts features, C outcomes.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pipeline.core.progress import log

MAX_ITERATIONS = 400
GRADIENT = 1e-6  # largest entry of the gradient, in scaled parameters, at which a student is at its optimum
CHANGE = 1e-13  # of the function, in nats, below which a step only follows the rounding of float64
CURVATURE = 0.3  # about the part of an outcome's variance that features leave: only the speed depends on it
LEAST_CURVATURE = 1e-4  # of an outcome that hardly occurs
L2_GRID = (3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reduction:
    """Features -> their standardised values -> their first principal components."""

    mean_F: Tensor
    scale_F: Tensor
    """1 / standard deviation; 0 of a feature that is constant."""
    axes_FP: Tensor

    def __call__(self, features_NF: Tensor) -> Tensor:
        """float64 [N, P]."""
        return ((features_NF.double() - self.mean_F) * self.scale_F) @ self.axes_FP


def fit_reduction(features_NF: Tensor, *, components: int) -> Reduction:
    """The reduction by which a text keeps most of its variance in at most so many components.

    A rotation changes neither the optimum nor |W|: with all components the student is that on all features.
    """
    features_NF = features_NF.double()
    mean_F, deviation_F = features_NF.mean(dim=0), features_NF.std(dim=0, unbiased=False)
    scale_F = torch.where(deviation_F > 1e-6 * deviation_F.max(), 1 / deviation_F, 0.0)
    standard_NF = (features_NF - mean_F) * scale_F
    _, axes_FF = torch.linalg.eigh(standard_NF.T @ standard_NF / len(standard_NF))  # ascending
    return Reduction(mean_F=mean_F, scale_F=scale_F, axes_FP=axes_FF.flip(1)[:, :components].contiguous())


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LinearStudent:
    """A trained student."""

    weight_FC: Tensor
    bias_C: Tensor
    gradient: float
    """Largest entry of the gradient by weight and bias: 0 at the optimum."""

    def log_probs(self, features_NF: Tensor) -> Tensor:
        """float64 [N, C], nats."""
        return (features_NF @ self.weight_FC + self.bias_C).log_softmax(dim=1)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Threads would wait for each other in every small product: beside other work that took 5 s instead of 10 ms."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@_one_thread()
def fit(
    features_NF: Tensor, targets_NC: Tensor, weights_N: Tensor, *, l2: float, start: LinearStudent | None = None
) -> LinearStudent:
    """The student that minimises the function above, by L-BFGS on all positions at once (Liu & Nocedal 1989).

    Each parameter is scaled by about the root of the function's second derivative, which makes it ten times faster.
    """
    mean_C = weights_N @ targets_NC / weights_N.sum()
    variance_C = (CURVATURE * mean_C * (1 - mean_C)).clamp(min=LEAST_CURVATURE)
    scale_FC = ((weights_N @ features_NF.square())[:, None] * variance_C + l2).rsqrt()
    bias_scale_C, size = (weights_N.sum() * variance_C).rsqrt(), targets_NC.shape[1]
    parameters = torch.zeros(features_NF.shape[1] + 1, size, dtype=torch.float64)
    if start is not None:
        parameters[:-1], parameters[-1] = start.weight_FC / scale_FC, start.bias_C / bias_scale_C
    mass_N1 = targets_NC.sum(dim=1, keepdim=True)

    def value_and_gradient(values: Tensor) -> tuple[Tensor, Tensor]:
        weight_FC = scale_FC * values[:-1]
        log_q_NC = (features_NF @ weight_FC + bias_scale_C * values[-1]).log_softmax(dim=1)
        loss = -(weights_N @ (targets_NC * log_q_NC).sum(dim=1)) + l2 / 2 * weight_FC.square().sum()
        by_logit_NC = weights_N[:, None] * (log_q_NC.exp() * mass_N1 - targets_NC)
        by_weight_FC = scale_FC * (features_NF.T @ by_logit_NC + l2 * weight_FC)
        return loss, torch.cat([by_weight_FC, (bias_scale_C * by_logit_NC.sum(dim=0))[None]])

    parameters.requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [parameters],
        max_iter=MAX_ITERATIONS,
        tolerance_grad=GRADIENT,
        tolerance_change=CHANGE,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        loss, parameters.grad = value_and_gradient(parameters.detach())
        return float(loss)

    optimizer.step(closure)
    parameters = parameters.detach()
    gradient = value_and_gradient(parameters)[1]
    largest = float(torch.cat([gradient[:-1] / scale_FC, gradient[-1:] / bias_scale_C]).abs().max())
    return LinearStudent(weight_FC=scale_FC * parameters[:-1], bias_C=bias_scale_C * parameters[-1], gradient=largest)


# --------------------------------------------------------------------------------- crossed over folds


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Lesson:
    """Positions to learn from."""

    features_NP: Tensor
    targets_NC: Tensor
    folds_N: Tensor
    """int64: the fold of each position's sequence."""
    weight: float = 1.0
    """Of the mean cross entropy over these positions in the sum over lessons."""


def cross_fitted(lessons: Sequence[Lesson], *, folds: int, l2: float) -> list[Tensor]:
    """float64 [N, C], nats, for each lesson: log-probabilities at a position of the student that left out its fold.

    The student of a fold learns the positions of all other folds in all lessons. ValueError where one fold has all
    positions of the first lesson; a later lesson with all in one fold is then not learnt.
    """
    found = [torch.empty_like(lesson.targets_NC) for lesson in lessons]
    for fold in range(folds):
        features, targets, weights = list[Tensor](), list[Tensor](), list[Tensor]()
        for place, lesson in enumerate(lessons):
            is_learnt_N = lesson.folds_N != fold
            count = int(is_learnt_N.sum())
            if count == 0 and place == 0:
                raise ValueError("one fold has all positions")
            features.append(lesson.features_NP[is_learnt_N])
            targets.append(lesson.targets_NC[is_learnt_N])
            weights.append(torch.full((count,), lesson.weight / max(count, 1), dtype=torch.float64))
        # without a start: one that has learnt this fold could leave something of it in the last bits
        student = fit(torch.cat(features), torch.cat(targets), torch.cat(weights), l2=l2)
        for log_q_NC, lesson in zip(found, lessons, strict=True):
            is_left_N = lesson.folds_N == fold
            log_q_NC[is_left_N] = student.log_probs(lesson.features_NP[is_left_N])
    return found


def choose_l2(lesson: Lesson, *, folds: int, grid: Sequence[float] = L2_GRID) -> tuple[float, dict[float, float]]:
    """The l2 whose cross-fitted students have the least cross entropy with the teacher, and that of each one tried.

    The grid falls and ends where the cross entropy rises. The student of a fold starts from its last one, which has
    learnt the same other folds. No label is read.
    """
    found: dict[float, float] = {}
    students: list[LinearStudent | None] = [None] * folds
    for l2 in grid:
        found[l2] = 0.0
        for fold in range(folds):
            is_left_N = lesson.folds_N == fold
            features_NP, targets_NC = lesson.features_NP[~is_left_N], lesson.targets_NC[~is_left_N]
            weights_N = torch.full((len(targets_NC),), 1 / max(len(targets_NC), 1), dtype=torch.float64)
            student = students[fold] = fit(features_NP, targets_NC, weights_N, l2=l2, start=students[fold])
            log_q_NC = student.log_probs(lesson.features_NP[is_left_N])
            found[l2] -= float((lesson.targets_NC[is_left_N] * log_q_NC).sum()) / len(lesson.folds_N)
        log.info("l2 %g: cross entropy with the teacher %.4f", l2, found[l2])
        if found[l2] > min(found.values()):
            break
    best = min(found, key=found.__getitem__)
    if best in (grid[0], grid[-1]):
        log.warning("l2: the best of %s is the outermost, %g", list(found), best)
    return best, found
