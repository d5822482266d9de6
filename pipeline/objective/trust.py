"""How far the teacher is trusted at a position: measures of its distribution there, and a score learnt on gold.

With p the teacher's distribution at T = 1, p1 and p2 its two most likely kept tokens (where it kept one token alone, p2
is the smaller of p1 and the mass of the tail, which both bound it) and H its entropy in nats:

    measure       orders positions by     trust, between 0 and 1
    confidence    log p1                  p1
    entropy       -H                      exp(-H)
    margin        log p1 - log p2         1 - p2 / p1
    learnt        z of `TrustScore`       sigmoid(z), an estimate of P(the most likely token is right)
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.core.topk import temperature_index
from pipeline.core.types import Batch, InputError, TopK

FEATURES = ("log_odds", "margin", "log_confidence", "entropy")
"""What the learnt score reads of a position, in nats: log p1 / (1 - p1), log p1 / p2, log p1 and H."""
LARGEST_FEATURE = 30.0  # nats; a distribution with one token has infinite log-odds


@dataclass(frozen=True, slots=True, kw_only=True)
class TrustScore:
    """A logistic regression: z = bias + sum over features f of  weight_f (x_f - mean_f) / scale_f."""

    features: tuple[str, ...]
    """Those of `FEATURES` that it reads."""
    means: tuple[float, ...]
    scales: tuple[float, ...]
    weights: tuple[float, ...]
    bias: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PositionWeight:
    """The weight of a position in the terms that read the teacher: trust^power."""

    by: str
    """A measure; see the head of this file."""
    power: float
    score: TrustScore | None = None
    """For the measure `learnt`."""


def measure(by: str, top: TopK, entropy_N: Tensor, score: TrustScore | None = None) -> Tensor:
    """float64 [N]: a measure of each position, nats; the larger, the surer is the teacher.

    InputError if it reads an entropy that the cache does not have.
    """
    first_N, second_N, _ = _leading(top)
    if by == "confidence":
        return first_N
    if by == "margin":
        return first_N - second_N
    if by == "entropy":
        return -_known(entropy_N)
    assert by == "learnt"
    assert score is not None
    return linear(features(top, entropy_N), score)


def trust(by: str, top: TopK, entropy_N: Tensor, score: TrustScore | None = None) -> Tensor:
    """float64 [N], 0 to 1: how far the teacher is trusted at each position."""
    measure_N = measure(by, top, entropy_N, score)
    if by == "learnt":
        return torch.sigmoid(measure_N)
    return -torch.expm1(-measure_N) if by == "margin" else measure_N.exp()


def weighted(batch: Batch, weight: PositionWeight | None) -> Batch:
    """The batch with `weights_N` times trust^power at every position with a captured distribution.

    The terms that read the teacher multiply by `weights_N` in S and N alike, so what they compute stays a mean over the
    global batch, however that is split.
    """
    if weight is None or batch.teacher is None:
        return batch
    assert batch.entropy_M is not None
    trust_M = trust(weight.by, batch.teacher, batch.entropy_M, weight.score) ** weight.power
    weights_N = batch.weights_N.clone()
    weights_N[batch.weak_N] *= trust_M.float()
    return dataclasses.replace(batch, weights_N=weights_N)


def features(top: TopK, entropy_N: Tensor) -> Tensor:
    """float64 [N, F]: the columns of `FEATURES`, at most LARGEST_FEATURE; NaN where the entropy is unknown."""
    first_N, second_N, rest_N = _leading(top)
    columns = (first_N - rest_N, first_N - second_N, first_N, entropy_N.double())
    return torch.stack(columns, dim=1).clamp(max=LARGEST_FEATURE)


def linear(features_NF: Tensor, score: TrustScore) -> Tensor:
    """float64 [N]: z of the score at each position; `features_NF` has the columns of `FEATURES`."""
    columns = [FEATURES.index(name) for name in score.features]
    means_F, scales_F, weights_F = (
        torch.tensor(values, dtype=torch.float64, device=features_NF.device)
        for values in (score.means, score.scales, score.weights)
    )
    features_NF = features_NF[:, columns]
    if features_NF.isnan().any():
        features_NF = _known(features_NF)
    return (features_NF - means_F) / scales_F @ weights_F + score.bias


def _leading(top: TopK) -> tuple[Tensor, Tensor, Tensor]:
    """float64 [N] each: log-probability of the most likely kept token, of the second, and of all but the first."""
    relative_NK = top.relative_logits_NK.double()
    log_tail_N = top.log_tail_NC[:, temperature_index(top.temperatures, 1.0)].double()
    first_N, index_N = relative_NK.max(dim=1)
    others_NK = relative_NK.scatter(1, index_N[:, None], -torch.inf)
    second_N = others_NK.amax(dim=1)
    second_N = torch.where(second_N > -torch.inf, second_N, torch.minimum(log_tail_N, first_N))
    # relative logits are 0 at most: exp needs no maximum, and one pass over the entries is enough
    log_rest_N = (others_NK.exp().sum(dim=1) + log_tail_N.exp()).log()
    log_z_N = torch.logaddexp(first_N, log_rest_N)
    return first_N - log_z_N, second_N - log_z_N, log_rest_N - log_z_N


def _known(values: Tensor) -> Tensor:
    if values.isnan().any():
        raise InputError(
            "loss.kd: expected the teacher's entropy at every position, found a cache without it (an import or a "
            "pool); use by=confidence or by=margin, or capture with this project"
        )
    return values.double()
