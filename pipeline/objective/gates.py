"""Gates select the positions at which the teacher is used: pure functions of the cache, known before any forward."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pipeline.core.topk import log_probabilities
from pipeline.core.types import Batch, InputError, TopK


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """The conditions that a position must meet for the teacher to be used there."""

    min_confidence: float = 0.0
    """Minimum probability of the teacher's most likely token, at T = 1."""
    max_entropy: float = float("inf")
    """Maximum entropy of the teacher's full distribution, in nats."""
    drop_wrong: bool = False
    """Where the true target is known, the position passes only if the target is the teacher's most likely token."""

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
                "(an imported one); use min_confidence, or capture with this project"
            )
        passed_M &= batch.entropy_M <= gate.max_entropy
    if gate.drop_wrong:
        passed_M &= teacher_is_right(batch) | ~is_known(batch)[batch.weak_N]
    return passed_M


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
            "loss.kd.gate.by: expected the teacher's entropy at every position, found a cache without it (an imported "
            "one); use gate.by=confidence, or capture with this project"
        )
    ordered_N = values_N.sort(descending=largest).values  # torch.quantile accepts at most 16 million values
    return float(ordered_N[max(round(keep_fraction * len(ordered_N)), 1) - 1])
