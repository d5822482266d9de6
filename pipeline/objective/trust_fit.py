"""The trust score: where the teacher's most likely token is right, learnt from positions with known targets.

    minimise over b, w:  sum over positions of log(1 + exp(-y z)) + PENALTY / 2 |w|^2,   z = b + w . x,   y = 1 or -1

x are the features at mean 0 and standard deviation 1: logistic regression with an L2 penalty (le Cessie & van
Houwelingen 1992, Applied Statistics 41, section 2), by Newton's method in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.core.types import InputError
from pipeline.objective.trust import FEATURES, TrustScore, linear

PENALTY = 1.0  # that of a normal prior with standard deviation 1 on each weight
BIAS_PENALTY = 1e-6  # so that the minimum exists where all are right
NUM_FOLDS = 5
LEAST_POSITIONS, LEAST_OF_A_KIND = 30, 5  # with fewer, cross-validation is noise
DIGITS = 10  # of each coefficient: machines that add up in another order then find the same
MAX_ITERATIONS, MAX_HALVINGS = 100, 40


@dataclass(frozen=True, slots=True, kw_only=True)
class TrustFit:
    """A trust score, and what shows that it predicts."""

    score: TrustScore
    standard_errors: tuple[float, ...]
    """Of the weights, then of the bias: from the inverse of the penalised Hessian."""
    num_positions: int
    num_wrong: int
    """Positions whose target is not the teacher's most likely token."""
    log_loss: float
    """Nats a position, cross-validated over `NUM_FOLDS` parts of the records."""
    base_log_loss: float
    """The same of the fraction of right positions alone, without features."""


def fit_trust(features_NF: Tensor, is_right_N: Tensor, records_N: Tensor, *, has_entropy: bool) -> TrustFit:
    """The score fitted on all positions; `features_NF` has the columns of `FEATURES`, `records_N` each one's record.

    InputError where so few positions, errors or records can tell nothing, or where the score predicts no better than
    the fraction of right positions does.
    """
    names = FEATURES if has_entropy else tuple(name for name in FEATURES if name != "entropy")
    num, num_wrong = len(is_right_N), int((~is_right_N).sum())
    folds_N = records_N % NUM_FOLDS
    fewest = min(num_wrong, num - num_wrong)
    if num < LEAST_POSITIONS or fewest < LEAST_OF_A_KIND or len(folds_N.unique()) < 2:
        raise InputError(
            f"loss.kd.gate.learn_on: expected {LEAST_POSITIONS} known targets or more of several records, the teacher "
            f"right at {LEAST_OF_A_KIND} and wrong at {LEAST_OF_A_KIND} of them, found {num} with {num_wrong} wrong, "
            f"{len(records_N.unique())} records; capture more gold, or use by=confidence"
        )
    held_out_N, base_N = torch.empty(num, dtype=torch.float64), torch.empty(num, dtype=torch.float64)
    for fold in folds_N.unique():
        is_out_N = folds_N == fold
        score, _ = _fit(features_NF[~is_out_N], is_right_N[~is_out_N], names)
        held_out_N[is_out_N] = linear(features_NF[is_out_N], score)
        right = (is_right_N[~is_out_N].sum() + 0.5) / (num - is_out_N.sum() + 1)  # never 0 or 1
        base_N[is_out_N] = torch.logit(right.double())
    log_loss, base_log_loss = (_log_losses(z_N, is_right_N).mean().item() for z_N in (held_out_N, base_N))
    if not log_loss < base_log_loss:
        raise InputError(
            "loss.kd.gate.learn_on: expected gold to show where the teacher is right, found a cross-validated log-loss "
            f"of {log_loss:.4f} nats, where the fraction of right positions alone has {base_log_loss:.4f} ({num} known "
            f"targets, {num_wrong} wrong); capture more gold, or use by=confidence"
        )
    score, errors = _fit(features_NF, is_right_N, names)
    return TrustFit(
        score=score,
        standard_errors=errors,
        num_positions=num,
        num_wrong=num_wrong,
        log_loss=_rounded(log_loss),
        base_log_loss=_rounded(base_log_loss),
    )


def _fit(features_NF: Tensor, is_right_N: Tensor, names: tuple[str, ...]) -> tuple[TrustScore, tuple[float, ...]]:
    """The score with these features, and the standard errors of its weights and its bias."""
    x_NF = features_NF[:, [FEATURES.index(name) for name in names]]
    means_F, scales_F = x_NF.mean(dim=0), x_NF.std(dim=0, correction=0)
    scales_F = torch.where(scales_F > 1e-9, scales_F, 1.0)
    ones_N1 = torch.ones(len(x_NF), 1, dtype=torch.float64)
    penalties_F = torch.tensor([*(PENALTY for _ in names), BIAS_PENALTY], dtype=torch.float64)
    solution_F, hessian_FF = newton(torch.cat([(x_NF - means_F) / scales_F, ones_N1], dim=1), is_right_N, penalties_F)
    *weights, bias = map(_rounded, solution_F.tolist())
    score = TrustScore(
        features=names,
        means=tuple(map(_rounded, means_F.tolist())),
        scales=tuple(map(_rounded, scales_F.tolist())),
        weights=tuple(weights),
        bias=bias,
    )
    return score, tuple(map(_rounded, hessian_FF.inverse().diagonal().sqrt().tolist()))


def newton(x_NF: Tensor, is_right_N: Tensor, penalties_F: Tensor) -> tuple[Tensor, Tensor]:
    """float64 [F] and [F, F]: the minimum of the penalised log-loss, and its Hessian there.

    A step is halved until the value falls, so that it converges from zero on any data.
    """

    def value(w_F: Tensor) -> float:
        return float(_log_losses(x_NF @ w_F, is_right_N).sum() + (penalties_F * w_F.square()).sum() / 2)

    w_F = torch.zeros_like(penalties_F)
    for _ in range(MAX_ITERATIONS):
        p_N = torch.sigmoid(x_NF @ w_F)
        gradient_F = x_NF.T @ (p_N - is_right_N.double()) + penalties_F * w_F
        hessian_FF = (x_NF * (p_N * (1 - p_N))[:, None]).T @ x_NF + torch.diag(penalties_F)
        step_F, before = torch.linalg.solve(hessian_FF, gradient_F), value(w_F)
        for _ in range(MAX_HALVINGS):
            if value(w_F - step_F) <= before:
                break
            step_F = step_F / 2
        w_F = w_F - step_F
        if step_F.abs().max() < 1e-13 * w_F.abs().max().clamp(min=1.0):
            break
    return w_F, hessian_FF


def _log_losses(z_N: Tensor, is_right_N: Tensor) -> Tensor:
    return functional.softplus(torch.where(is_right_N, -z_N, z_N))


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
