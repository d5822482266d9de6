"""Which positions a teacher is believed on: pure functions of what was captured, known before any forward."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pipeline.core.topk import log_probabilities
from pipeline.core.types import Batch, InputError, TopK


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """What a position has to fulfil for the teacher to be heard on it."""

    min_confidence: float = 0.0
    """Least probability of the teacher's most likely token, at T = 1."""
    max_entropy: float = float("inf")
    """Most entropy of the teacher's full distribution, nats."""
    drop_wrong: bool = False
    """Where the true target is known: only if it is the teacher's most likely token."""

    @property
    def is_open(self) -> bool:
        """It lets everything through."""
        return self == Gate()


def gate_mask(batch: Batch, gate: Gate) -> Tensor:
    """bool [M]: of the positions with a captured distribution, those on which the teacher is heard."""
    assert batch.teacher is not None
    passed_M = confidence(batch.teacher) >= gate.min_confidence
    if gate.max_entropy < float("inf"):
        assert batch.entropy_M is not None
        if batch.entropy_M.isnan().any():
            raise InputError(
                "loss.kd.gate: expected the teacher's entropy at every position, found a cache that does not know it "
                "(an imported one); use min_confidence, or capture with this project"
            )
        passed_M &= batch.entropy_M <= gate.max_entropy
    if gate.drop_wrong:
        passed_M &= teacher_is_right(batch) | ~is_known(batch)[batch.weak_N]
    return passed_M


def confidence(top: TopK) -> Tensor:
    """float32 [M]: probability of the teacher's most likely token at T = 1."""
    return log_probabilities(top, temperature=1.0)[0].amax(dim=1).exp()


def top_token(top: TopK) -> Tensor:
    """int64 [M]: the teacher's most likely token."""
    return top.ids_NK.gather(1, top.relative_logits_NK.argmax(dim=1, keepdim=True)).squeeze(1).long()


def teacher_is_right(batch: Batch) -> Tensor:
    """bool [M]: the teacher's most likely token is the known target."""
    assert batch.teacher is not None
    return top_token(batch.teacher) == batch.target_ids_N[batch.weak_N]


def is_known(batch: Batch) -> Tensor:
    """bool [N]: the position's true target is known."""
    return batch.target_ids_N >= 0


def threshold(values_N: Tensor, keep_fraction: float, *, largest: bool) -> float:
    """The value that this fraction of positions reaches from above (`largest`) or from below."""
    if values_N.isnan().any():
        raise InputError(
            "loss.kd.gate: expected a known value at every position to choose the surest by, found a cache that does "
            "not know the teacher's entropy (an imported one); use gate.by=confidence, or capture with this project"
        )
    ordered_N = values_N.sort(descending=largest).values  # torch.quantile takes 16 million values at most
    return float(ordered_N[max(round(keep_fraction * len(ordered_N)), 1) - 1])
