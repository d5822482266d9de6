"""Gates select the positions at which the teacher is used: pure functions of the cache, known before any forward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.core.runtime import to_device
from pipeline.core.topk import log_probabilities
from pipeline.core.types import Batch, InputError, TopK
from pipeline.objective.trust import TrustScore, measure


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Thresholds:
    """The least that a measure of the teacher must reach at a position, by the position's class.

    The class of a position is the teacher's most likely token.
    """

    by: str
    """A measure: see `objective/trust.py`."""
    least: float
    """In a class of which no threshold is given."""
    classes_L: Tensor
    """int64, ascending: the classes that have a threshold of their own."""
    least_L: Tensor
    """float64: these thresholds."""
    score: TrustScore | None = None
    """For the measure `learnt`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """The conditions that a position must meet for the teacher to be used there."""

    min_confidence: float = 0.0
    """Minimum probability of the teacher's most likely token, at T = 1."""
    max_entropy: float = float("inf")
    """Maximum entropy of the teacher's full distribution, in nats."""
    drop_wrong: bool = False
    """Where the true target is known, the position passes only if the target is the teacher's most likely token."""
    thresholds: Thresholds | None = None
    """Of a measure; None: no further condition."""

    @property
    def is_open(self) -> bool:
        """Whether every position passes."""
        return self == Gate()


def gate_mask(batch: Batch, gate: Gate) -> Tensor:
    """bool [M]: which of the positions with a captured distribution pass the gate.

    InputError if the gate needs the entropy and the cache does not have it.
    """
    assert batch.teacher is not None
    passed_M = top_probability(batch.teacher) >= gate.min_confidence
    if gate.max_entropy < float("inf"):
        assert batch.entropy_M is not None
        if batch.entropy_M.isnan().any():
            raise InputError(
                "loss.kd.gate: expected the teacher's entropy at every position, found a cache without it "
                "(an import or a pool); use min_confidence, or capture with this project"
            )
        passed_M &= batch.entropy_M <= gate.max_entropy
    if gate.drop_wrong:
        passed_M &= teacher_is_right(batch) | ~is_known(batch)[batch.weak_N]
    if gate.thresholds is not None:
        assert batch.entropy_M is not None
        passed_M &= reaches(gate.thresholds, batch.teacher, batch.entropy_M)
    return passed_M


def reaches(thresholds: Thresholds, top: TopK, entropy_N: Tensor) -> Tensor:
    """bool [N]: whether the measure of a position is at least the threshold of its class."""
    values_N = measure(thresholds.by, top, entropy_N, thresholds.score)
    if not len(thresholds.classes_L):
        return values_N >= thresholds.least
    classes_L, least_L = (to_device(column, values_N.device) for column in (thresholds.classes_L, thresholds.least_L))
    class_N = top_token(top)
    places_N = torch.searchsorted(classes_L, class_N).clamp(max=len(classes_L) - 1)
    has_own_N = classes_L[places_N] == class_N
    return values_N >= torch.where(has_own_N, least_L[places_N], thresholds.least)


def top_probability(top: TopK) -> Tensor:
    """float32 [M]: probability of the teacher's most likely token at T = 1."""
    return log_probabilities(top, temperature=1.0)[0].amax(dim=1).exp()


def top_token(top: TopK) -> Tensor:
    """int64 [M]: the teacher's most likely token."""
    return top.ids_NK.gather(1, top.relative_logits_NK.argmax(dim=1, keepdim=True)).squeeze(1).long()


def teacher_is_right(batch: Batch) -> Tensor:
    """bool [M]: whether the teacher's most likely token is the true target."""
    assert batch.teacher is not None
    return top_token(batch.teacher) == batch.target_ids_N[batch.weak_N]


def is_known(batch: Batch) -> Tensor:
    """bool [N]: whether the true target of the position is known."""
    return batch.target_ids_N >= 0


def threshold(values_N: Tensor, keep_fraction: float, *, largest: bool) -> float:
    """The value that `keep_fraction` of the positions reach: those with the largest values, or with the smallest.

    InputError if a value is unknown (NaN).
    """
    if values_N.isnan().any():
        raise InputError(
            "loss.kd.gate.by: expected the teacher's entropy at every position, found a cache without it (an import "
            "or a pool); use gate.by=confidence, or capture with this project"
        )
    ordered_N = values_N.sort(descending=largest).values  # torch.quantile accepts at most 16 million values
    return float(ordered_N[max(round(keep_fraction * len(ordered_N)), 1) - 1])


def class_thresholds(values_N: Tensor, classes_N: Tensor, keep_fraction: float) -> tuple[Tensor, Tensor]:
    """The classes, int64 [L] ascending, and what `keep_fraction` of the positions of each reach, float64 [L].

    At least one position of a class is kept, and positions as sure as the last one kept are kept with it. A threshold
    lies halfway between the last value kept and the next one, -inf where all are kept: a device that rounds otherwise
    then keeps the same positions.
    """
    order_N = values_N.argsort(descending=True, stable=True)
    order_N = order_N[classes_N[order_N].argsort(stable=True)]  # by class, the surest first
    values_N, classes_N = values_N[order_N].double(), classes_N[order_N]
    classes_L, counts_L = classes_N.unique_consecutive(return_counts=True)
    ends_L = counts_L.cumsum(0)
    kept_L = (keep_fraction * counts_L.double()).round().long().clamp(min=1)
    last_L = values_N[ends_L - counts_L + kept_L - 1]
    # the first position of each class that is less sure than the last one kept, among its `counts` positions
    is_less_N = values_N < last_L.repeat_interleave(counts_L)
    num_reaching_L = torch.zeros_like(counts_L).index_add(
        0, torch.arange(len(counts_L)).repeat_interleave(counts_L), (~is_less_N).long()
    )
    next_L = values_N[(ends_L - counts_L + num_reaching_L).clamp(max=len(values_N) - 1)]
    middle_L = last_L / 2 + next_L / 2
    middle_L = torch.where(middle_L > next_L, middle_L, last_L)  # they may be neighbours
    return classes_L, torch.where(num_reaching_L < counts_L, middle_L, -torch.inf)
