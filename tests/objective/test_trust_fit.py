"""Trust learnt on gold: the minimum and its curvature against autograd, known coefficients, and what is refused."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor

from pipeline.core.types import InputError
from pipeline.objective.trust import FEATURES, linear
from pipeline.objective.trust_fit import BIAS_PENALTY, NUM_FOLDS, PENALTY, TrustFit, fit_trust

TRUE = (0.8, 0.0, -0.5, -0.9)
"""Weights of the simulated teacher's features, which have mean 0 and standard deviation 1."""


def simulated(num: int, *, seed: int = 0, weights: tuple[float, ...] = TRUE) -> tuple[Tensor, Tensor, Tensor]:
    """Features, whether the teacher is right there, and the record: two positions each."""
    generator = torch.Generator().manual_seed(seed)
    features_NF = torch.randn(num, len(FEATURES), generator=generator, dtype=torch.float64)
    z_N = features_NF @ torch.tensor(weights, dtype=torch.float64) + 0.4
    is_right_N = torch.rand(num, generator=generator) < torch.sigmoid(z_N)
    return features_NF, is_right_N, torch.arange(num) // 2


def objective(w_F: Tensor, x_NF: Tensor, is_right_N: Tensor) -> Tensor:
    """The penalised log-loss by the textbook; the last column of x is 1."""
    y_N = is_right_N.double() * 2 - 1
    penalty = PENALTY / 2 * w_F[:-1].square().sum() + BIAS_PENALTY / 2 * w_F[-1] ** 2
    return torch.log1p(torch.exp(-y_N * (x_NF @ w_F))).sum() + penalty


def standardised(features_NF: Tensor) -> Tensor:
    x_NF = (features_NF - features_NF.mean(0)) / features_NF.std(0, correction=0)
    return torch.cat([x_NF, torch.ones(len(x_NF), 1, dtype=torch.float64)], dim=1)


def solution_of(fit: TrustFit) -> Tensor:
    return torch.tensor([*fit.score.weights, fit.score.bias], dtype=torch.float64)


@pytest.mark.parametrize("has_entropy", [True, False])
def test_the_fit_is_the_minimum_and_its_errors_the_inverse_curvature(has_entropy: bool) -> None:
    features_NF, is_right_N, records_N = simulated(300)
    if not has_entropy:
        features_NF[:, FEATURES.index("entropy")] = torch.nan
        features_NF[:, 0] *= 7  # on any scale
    fit = fit_trust(features_NF, is_right_N, records_N, has_entropy=has_entropy)
    assert fit.score.features == (FEATURES if has_entropy else FEATURES[:3])
    x_NF = standardised(features_NF[:, : len(fit.score.features)])
    w_F = solution_of(fit).requires_grad_()
    (gradient_F,) = torch.autograd.grad(objective(w_F, x_NF, is_right_N), w_F)
    assert gradient_F.abs().max() < 1e-6
    hessian_FF = torch.autograd.functional.hessian(lambda w: objective(w, x_NF, is_right_N), w_F.detach())
    assert list(fit.standard_errors) == pytest.approx(hessian_FF.inverse().diagonal().sqrt().tolist(), rel=1e-6)
    assert torch.allclose(linear(features_NF, fit.score), x_NF @ w_F.detach(), atol=1e-8)
    assert (fit.num_positions, fit.num_wrong) == (300, int((~is_right_N).sum()))


def test_known_coefficients_are_found_within_their_errors() -> None:
    """In 12 simulated sets the standardised distances have about the spread of a standard normal."""
    distances = []
    for seed in range(12):
        features_NF, is_right_N, records_N = simulated(1000, seed=seed)
        fit = fit_trust(features_NF, is_right_N, records_N, has_entropy=True)
        raw = [weight / scale for weight, scale in zip(fit.score.weights, fit.score.scales, strict=True)]
        found = zip(raw, TRUE, fit.standard_errors, fit.score.scales, strict=False)
        distances += [(weight - true) / (error / scale) for weight, true, error, scale in found]
    assert torch.tensor(distances).abs().max() < 4.5
    assert 0.7 < torch.tensor(distances).square().mean().sqrt() < 1.3


def test_the_cross_validated_log_loss_leaves_out_whole_records() -> None:
    """Against gradient descent on the other folds."""
    features_NF, is_right_N, records_N = simulated(80)
    fit = fit_trust(features_NF, is_right_N, records_N, has_entropy=True)
    losses, base_losses = [], []
    for fold in range(NUM_FOLDS):
        is_out_N = records_N % NUM_FOLDS == fold
        learnt_on_NF, right_N = features_NF[~is_out_N], is_right_N[~is_out_N]
        x_NF, w_F = standardised(learnt_on_NF), torch.zeros(5, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([w_F], max_iter=300, tolerance_grad=1e-12, tolerance_change=1e-15)

        def closure(w_F=w_F, x_NF=x_NF, right_N=right_N, optimizer=optimizer) -> Tensor:
            optimizer.zero_grad()
            value = objective(w_F, x_NF, right_N)
            value.backward()
            return value

        optimizer.step(closure)
        scale_F = learnt_on_NF.std(0, correction=0)
        z_N = (features_NF[is_out_N] - learnt_on_NF.mean(0)) / scale_F @ w_F.detach()[:-1] + w_F.detach()[-1]
        fraction = (int(right_N.sum()) + 0.5) / (len(right_N) + 1)
        for z, right in zip(z_N.tolist(), is_right_N[is_out_N].tolist(), strict=True):
            losses.append(math.log1p(math.exp(-z if right else z)))
            base_losses.append(-math.log(fraction if right else 1 - fraction))
    assert fit.log_loss == pytest.approx(sum(losses) / 80, rel=1e-6)
    assert fit.base_log_loss == pytest.approx(sum(base_losses) / 80, rel=1e-6)
    assert fit.log_loss < fit.base_log_loss


def test_a_separable_gold_set_and_constant_features_still_have_a_fit() -> None:
    features_NF, _, records_N = simulated(60)
    features_NF[:, 1] = 2.0
    is_right_N = features_NF[:, 0] > 0
    fit = fit_trust(features_NF, is_right_N, records_N, has_entropy=True)
    assert solution_of(fit).isfinite().all()
    assert fit.score.weights[1] == 0
    assert fit.log_loss < 0.4 * fit.base_log_loss


@pytest.mark.parametrize(
    ("positions", "is_right", "records", "message"),
    [
        (29, lambda n: n % 2 == 0, lambda n: n, "found 29 with 14 wrong, 29 records"),
        (100, lambda n: n >= 4, lambda n: n, "found 100 with 4 wrong"),
        (100, lambda n: n < 4, lambda n: n, "found 100 with 96 wrong"),
        (100, lambda n: n % 2 == 0, lambda n: 7, "found 100 with 50 wrong, 1 records"),
        (200, lambda n: n * 7919 % 13 < 6, lambda n: n, "found a cross-validated log-loss of 0."),
    ],
)
def test_gold_that_cannot_tell_is_refused_with_what_to_use_instead(positions, is_right, records, message) -> None:
    features_NF = simulated(positions)[0]  # in the last case without any relation to what is right
    where = range(positions)
    is_right_N, records_N = torch.tensor([is_right(n) for n in where]), torch.tensor([records(n) for n in where])
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        fit_trust(features_NF, is_right_N, records_N, has_entropy=True)
    assert "use by=confidence" in str(caught.value)


def test_another_order_of_the_positions_gives_the_same_coefficients() -> None:
    """They are rounded, so that machines that add up in another order find the same to the bit."""
    features_NF, is_right_N, records_N = simulated(500)
    order_N = torch.randperm(500, generator=torch.Generator().manual_seed(3))
    fits = [
        fit_trust(features_NF[chosen], is_right_N[chosen], records_N[chosen], has_entropy=True)
        for chosen in (slice(None), order_N)
    ]
    assert fits[0] == fits[1]
