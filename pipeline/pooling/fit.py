"""The weights of a pool by maximum likelihood on gold: pure functions of the members' predictions of known targets.

E members of a pool, J outcomes of a position, G records. At a gold position the outcomes are the tokens that all
members kept, and all other tokens together as one, the tail. The log-likelihood of the weights is concave in both kinds
of pool. One active-set Newton method finds its maximum over weights of 0 or more. Standard errors are robust: records
are independent of each other, the positions of one record need not be (sandwich estimator clustered by record: Huber
1967; Liang & Zeger 1986).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_STEPS = 200  # of Newton; some ten are usual
DECREMENT = 1e-7  # the maximum is found when it is closer than this fraction of a standard error
SINGULAR = 1e-10  # least eigenvalue of the scaled information; below it some direction of the weights has no effect


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outcomes:
    """N gold positions with a known target, and each member's distribution over the J outcomes there."""

    log_p_ENJ: Tensor
    """Nats; -inf in the columns that are no outcome of a position, the same ones for all members."""
    targets_N: Tensor
    """int64: the column of the outcome that is true."""
    records_N: Tensor
    """int64: the record that the position is of."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Likelihood:
    """The log-likelihood of weights, its derivatives for each position, and its negative second derivative."""

    log_p_N: Tensor
    scores_NE: Tensor
    information_EE: Tensor

    @property
    def value(self) -> float:
        """Nats, the sum over positions."""
        return float(self.log_p_N.sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """Fitted weights with what is known about them; a value for each member where it is a tuple."""

    weights: tuple[float, ...]
    standard_errors: tuple[float, ...]
    """Robust. At a border: of the weight if there were none. inf: gold does not determine it; NaN: nothing to fit."""
    model_errors: tuple[float, ...]
    """The same from the information alone, as if all positions were independent and the pool were true."""
    share_errors: tuple[float, ...]
    """Of the weights divided by their sum: the larger of both kinds."""
    sum_error: float
    """Of the logarithm of the sum, so of the temperature, relative: the larger of both kinds; 0 of a linear pool."""
    at_border: tuple[bool, ...]
    """Whether the weight is as small (or in a linear pool as large) as weights may be."""
    alone: tuple[float, ...]
    """Mean log-likelihood of a position, nats: of each member without the others."""
    equal: float
    """Of the pool with equal weights, whose sum is 1."""
    fitted: float
    num_positions: int
    num_records: int


Evaluate = Callable[[Tensor], Likelihood]


def logarithmic_likelihood(parts: Sequence[Outcomes], weights_E: Tensor) -> Likelihood:
    """log p(y) = sum_m w_m log p_m(y) - log Z(w),  Z(w) = sum over outcomes of  prod_m p_m^w_m.

    An exponential family with the members' log-probabilities as statistics: the score is their value at the target less
    their mean under the pool, the information is their covariance. (Genest & Zidek 1986; Heskes 1998.)
    """
    found = [_logarithmic_part(part, weights_E) for part in parts]
    log_p, scores, information = zip(*found, strict=True)
    return Likelihood(
        log_p_N=torch.cat(log_p), scores_NE=torch.cat(scores), information_EE=torch.stack(information).sum(dim=0)
    )


def _logarithmic_part(part: Outcomes, weights_E: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    is_outcome_NJ = part.log_p_ENJ[0] > -torch.inf
    log_p_ENJ = part.log_p_ENJ.double().masked_fill(~is_outcome_NJ, 0.0)
    pooled_NJ = torch.einsum("e,enj->nj", weights_E, log_p_ENJ).masked_fill(~is_outcome_NJ, -torch.inf)
    log_pooled_NJ = pooled_NJ.log_softmax(dim=1)
    p_NJ, targets_N1 = log_pooled_NJ.exp(), part.targets_N[:, None]
    means_NE = torch.einsum("nj,enj->ne", p_NJ, log_p_ENJ)
    centered_ENJ = log_p_ENJ - means_NE.T[:, :, None]  # before they are multiplied: the difference of squares cancels
    information_EE = (centered_ENJ * p_NJ).flatten(1) @ centered_ENJ.flatten(1).T
    scores_NE = centered_ENJ.gather(2, targets_N1.expand(len(weights_E), -1, -1))[:, :, 0].T
    return log_pooled_NJ.gather(1, targets_N1)[:, 0], scores_NE, information_EE


def linear_likelihood(log_p_NE: Tensor, weights_E: Tensor) -> Likelihood:
    """log sum_m w_m p_m(y) - (sum_m w_m - 1), from each member's log-probability of the target.

    The last summand makes the maximum over all weights of 0 or more that over those whose sum is 1: multiplying the
    weights by c adds log c - (c - 1) sum w to a position, which is largest where the sum becomes 1.
    """
    relative_NE = (log_p_NE - log_p_NE.amax(dim=1, keepdim=True)).exp()
    mixture_N = relative_NE @ weights_E
    ratios_NE = relative_NE / mixture_N[:, None]
    return Likelihood(
        log_p_N=mixture_N.log() + log_p_NE.amax(dim=1) - (weights_E.sum() - 1.0),
        scores_NE=ratios_NE - 1.0,
        information_EE=ratios_NE.T @ ratios_NE,
    )


def target_log_p(parts: Sequence[Outcomes]) -> Tensor:
    """Each member's log-probability of the outcome that is true: fp64 [N, E]."""
    found = []
    for part in parts:
        targets = part.targets_N[None, :, None].expand(len(part.log_p_ENJ), -1, -1)
        found.append(part.log_p_ENJ.gather(2, targets)[:, :, 0].T.double())
    return torch.cat(found)


# ------------------------------------------------------------------------------------------ the maximum


def maximum(evaluate: Evaluate, start_E: Tensor) -> Tensor:
    """The weights of 0 or more with the largest likelihood, where it is concave; NaN where no maximum is reached.

    Newton's direction among the weights that may move, shortened where one becomes 0, with Armijo's line search
    (Nocedal & Wright 2006, chapters 3 and 16). A weight of 0 moves where its score is positive.
    """
    weights_E = start_E.double()
    at = evaluate(weights_E)
    for _ in range(MAX_STEPS):
        direction_E, slope = _direction(at, weights_E)
        if slope <= DECREMENT**2:
            return weights_E
        falls_E = direction_E < 0
        limits = -weights_E[falls_E] / direction_E[falls_E]
        longest = min(1.0, float(limits.min())) if len(limits) else 1.0
        step, least = longest, at.value - 1e-13 * abs(at.value)  # a sum of logarithms is no more exact
        while True:
            moved_E = (weights_E + step * direction_E).clamp(min=0.0)
            if step == longest < 1.0:  # exactly, not up to rounding
                moved_E[falls_E.nonzero()[limits.argmin(), 0]] = 0.0
            then = evaluate(moved_E)
            if then.value >= least + 1e-4 * step * slope:
                break
            step /= 2
            if step < 1e-12:
                return torch.full_like(weights_E, torch.nan)
        weights_E, at = moved_E, then
    return torch.full_like(weights_E, torch.nan)


def _direction(at: Likelihood, weights_E: Tensor) -> tuple[Tensor, float]:
    """Newton's direction, 0 for weights that stay 0, and the slope of the likelihood along it."""
    gradient_E, information_EE = at.scores_NE.sum(dim=0), at.information_EE
    ridge = 1e-12 * float(information_EE.diagonal().max()) + torch.finfo(torch.float64).tiny
    moves_E = (weights_E > 0) | (gradient_E > 0)
    while True:
        index = moves_E.nonzero()[:, 0]
        direction_E = torch.zeros_like(weights_E)
        matrix = information_EE[index][:, index] + ridge * torch.eye(len(index), dtype=torch.float64)
        direction_E[index] = torch.linalg.solve(matrix, gradient_E[index])
        is_blocked_E = (weights_E == 0) & (direction_E < 0)
        if not is_blocked_E.any():
            return direction_E, float(direction_E @ gradient_E)
        moves_E &= ~is_blocked_E


# -------------------------------------------------------------------------------------- standard errors


@dataclass(frozen=True, slots=True, kw_only=True)
class Errors:
    """Standard errors at the maximum of the likelihood, by one kind of covariance; see `Fit`."""

    weights: list[float]
    shares: list[float]
    sum: float


def standard_errors(at: Likelihood, weights_E: Tensor, records_N: Tensor, *, sum_is_one: bool) -> tuple[Errors, Errors]:
    """Robust and model-based standard errors of the weights at the maximum of the likelihood.

    With H the information and s_g the sum of the scores of record g, among the weights above 0:
    robust H^-1 (G / (G - 1) sum_g s_g s_g') H^-1, model-based H^-1; with `sum_is_one` along directions of sum 0. A
    weight of 0 gets the error that it would have if it could move, too. inf: H is singular; NaN: of a single member.
    Shares w / sum and the logarithm of the sum: by the delta method.
    """
    is_positive_E = weights_E > 0
    _, groups_N = records_N.unique(return_inverse=True)
    num_groups = int(groups_N.max()) + 1
    scores_GE = torch.zeros(num_groups, len(weights_E), dtype=torch.float64).index_add(0, groups_N, at.scores_NE)
    scores_GE = scores_GE - scores_GE.mean(dim=0)  # at a border their sum is not 0
    spread_EE = scores_GE.T @ scores_GE * (num_groups / max(num_groups - 1, 1))
    covariances = []
    for m in range(len(weights_E)):
        moves = (is_positive_E | (torch.arange(len(weights_E)) == m)).nonzero()[:, 0]
        basis = torch.eye(len(weights_E), dtype=torch.float64)[:, moves]
        if sum_is_one:
            basis = basis[:, 1:] - basis[:, :1]
        covariances.append(_covariances(at.information_EE, spread_EE, basis))
    robust, model = zip(*covariances, strict=True)
    return _errors(robust, weights_E), _errors(model, weights_E)


def _errors(covariances: Sequence[Tensor], weights_E: Tensor) -> Errors:
    """`covariances`: for each weight that of all that move where it may move."""
    size, total = len(weights_E), weights_E.sum()
    identity_EE = torch.eye(size, dtype=torch.float64)
    # d (w_m / s) = (d w_m - w_m / s * sum of d w) / s,  d log s = sum of d w / s
    of_shares_EE = (identity_EE - (weights_E / total)[:, None]) / total
    of_sum_E = torch.ones(size, dtype=torch.float64) / total

    def error(covariance_EE: Tensor, gradient_E: Tensor) -> float:
        if not covariance_EE.isfinite().all():
            return float(covariance_EE[0, 0])
        return math.sqrt(max(float(gradient_E @ covariance_EE @ gradient_E), 0.0))

    return Errors(
        weights=_filled([error(covariances[m], identity_EE[m]) for m in range(size)]),
        shares=_filled([error(covariances[m], of_shares_EE[m]) for m in range(size)]),
        sum=max(error(covariance_EE, of_sum_E) for covariance_EE in covariances),
    )


def _filled(errors: list[float]) -> list[float]:
    """A linear pool's member that has all the weight moves against the others: it gets the largest of their errors."""
    known = [error for error in errors if not math.isnan(error)]
    return [max(known, default=math.nan) if math.isnan(error) else error for error in errors]


def _covariances(information_EE: Tensor, spread_EE: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Robust and model-based, where weights move along the columns of `basis`; all inf where not determined."""
    size = len(information_EE)
    unknown_EE = torch.full((size, size), math.inf, dtype=torch.float64)
    if basis.shape[1] == 0:
        return unknown_EE * math.nan, unknown_EE * math.nan
    information = basis.T @ information_EE @ basis
    scale = information.diagonal().clamp(min=torch.finfo(torch.float64).tiny).sqrt()
    least = float(torch.linalg.eigvalsh(information / scale[:, None] / scale)[0])
    if not least > SINGULAR:
        return unknown_EE, unknown_EE
    covariance = basis @ torch.linalg.inv(information) @ basis.T
    return covariance @ spread_EE @ covariance, covariance


# ------------------------------------------------------------------------------------------------ fits


def fit_logarithmic(parts: Sequence[Outcomes]) -> Fit:
    """Weights of 0 or more with a free sum: 1 / sum is the temperature of the pool whose weights have sum 1."""
    records_N = torch.cat([part.records_N for part in parts])
    return _fit(lambda w_E: logarithmic_likelihood(parts, w_E), target_log_p(parts), records_N, sum_is_one=False)


def fit_linear(log_p_NE: Tensor, records_N: Tensor) -> Fit:
    """Weights of 0 or more whose sum is 1, from each member's log-probability of the target."""
    log_p_NE = log_p_NE.double()
    return _fit(lambda w_E: linear_likelihood(log_p_NE, w_E), log_p_NE, records_N, sum_is_one=True)


def _fit(evaluate: Evaluate, log_p_NE: Tensor, records_N: Tensor, *, sum_is_one: bool) -> Fit:
    size = log_p_NE.shape[1]
    equal_E = torch.full((size,), 1.0 / size, dtype=torch.float64)
    weights_E = maximum(evaluate, equal_E)
    weights_E = weights_E / weights_E.sum() if sum_is_one else weights_E  # it is 1 up to rounding
    is_found = bool(weights_E.isfinite().all())
    at = evaluate(weights_E if is_found else equal_E)
    unknown = Errors(weights=[math.inf] * size, shares=[math.inf] * size, sum=math.inf)
    robust, model = standard_errors(at, weights_E, records_N, sum_is_one=sum_is_one) if is_found else (unknown, unknown)
    is_at_border_E = weights_E == 0
    if sum_is_one and int((weights_E > 0).sum()) == 1:
        is_at_border_E = torch.ones_like(is_at_border_E)
    return Fit(
        weights=tuple(weights_E.tolist()),
        standard_errors=tuple(robust.weights),
        model_errors=tuple(model.weights),
        share_errors=tuple(max(pair) for pair in zip(robust.shares, model.shares, strict=True)),
        sum_error=0.0 if sum_is_one else max(robust.sum, model.sum),
        at_border=tuple(is_at_border_E.tolist()),
        alone=tuple(log_p_NE.mean(dim=0).tolist()),
        equal=evaluate(equal_E).value / len(log_p_NE),
        fitted=at.value / len(log_p_NE),
        num_positions=len(log_p_NE),
        num_records=len(records_N.unique()),
    )
