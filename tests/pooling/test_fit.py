"""Weights fitted on gold: against other maximisers, in simulation, and where gold does not determine them."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from pipeline.pooling.fit import (
    Fit,
    Outcomes,
    fit_linear,
    fit_logarithmic,
    linear_likelihood,
    logarithmic_likelihood,
    target_log_p,
)

NUM_OUTCOMES = 6


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Of small tensors, which threads only slow down."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def members(num_positions: int, size: int, generator: torch.Generator, *, agreement: float = 1.0) -> Tensor:
    """Log-probabilities [E, N, J] in fp64 of members that agree a little; the first position lacks an outcome."""
    common_NJ = agreement * torch.randn(num_positions, NUM_OUTCOMES, generator=generator, dtype=torch.float64)
    own_ENJ = 1.5 * torch.randn(size, num_positions, NUM_OUTCOMES, generator=generator, dtype=torch.float64)
    logits_ENJ = common_NJ + own_ENJ
    logits_ENJ[:, 0, 2] = -torch.inf
    return logits_ENJ.log_softmax(dim=2)


def pooled(log_p_ENJ: Tensor, weights_E: Tensor, *, is_linear: bool) -> Tensor:
    """The twin: the probabilities [N, J] of the pool, as its definition reads."""
    if is_linear:
        return (weights_E[:, None, None] * log_p_ENJ.exp()).sum(dim=0)
    is_outcome_NJ = log_p_ENJ[0] > -torch.inf
    p_ENJ = torch.where(is_outcome_NJ, log_p_ENJ.exp(), 1.0)
    product_NJ = torch.where(is_outcome_NJ, (p_ENJ ** weights_E[:, None, None]).prod(dim=0), 0.0)
    return product_NJ / product_NJ.sum(dim=1, keepdim=True)


def simulated(
    num_positions: int, weights: list[float], seed: int, *, is_linear: bool, per_record: int = 1
) -> list[Outcomes]:
    """Gold whose targets are drawn from a pool with known weights, in two parts."""
    generator = torch.Generator().manual_seed(seed)
    log_p_ENJ = members(num_positions, len(weights), generator)
    p_NJ = pooled(log_p_ENJ, torch.tensor(weights, dtype=torch.float64), is_linear=is_linear)
    targets_N = p_NJ.multinomial(1, generator=generator)[:, 0]
    records_N = torch.arange(num_positions) // per_record
    cut = num_positions // 3
    return [
        Outcomes(log_p_ENJ=log_p_ENJ[:, rows], targets_N=targets_N[rows], records_N=records_N[rows])
        for rows in (slice(cut), slice(cut, None))
    ]


def fitted(parts: list[Outcomes], *, is_linear: bool) -> Fit:
    if is_linear:
        return fit_linear(target_log_p(parts), torch.cat([part.records_N for part in parts]))
    return fit_logarithmic(parts)


def log_likelihood(parts: list[Outcomes], weights_E: Tensor, *, is_linear: bool) -> Tensor:
    values = []
    for part in parts:
        p_NJ = pooled(part.log_p_ENJ, weights_E, is_linear=is_linear)
        values.append(p_NJ.gather(1, part.targets_N[:, None])[:, 0].log())
    return torch.cat(values).sum()


KINDS = pytest.mark.parametrize("is_linear", [False, True], ids=["logarithmic", "linear"])


@KINDS
def test_the_fit_is_the_maximum_that_another_method_finds(is_linear: bool) -> None:
    """LBFGS over log-weights for the product, expectation maximisation for the mean."""
    parts = simulated(300, [0.6, 0.3, 0.1], 0, is_linear=is_linear)
    found = fitted(parts, is_linear=is_linear)
    if is_linear:
        p_NE, twin_E = target_log_p(parts).exp(), torch.full((3,), 1 / 3, dtype=torch.float64)
        for _ in range(3000):
            shares_NE = twin_E * p_NE
            twin_E = (shares_NE / shares_NE.sum(dim=1, keepdim=True)).mean(dim=0)
        assert sum(found.weights) == pytest.approx(1.0, abs=1e-9)
    else:
        logs_E = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        search = torch.optim.LBFGS([logs_E], max_iter=300, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            search.zero_grad()
            loss = -log_likelihood(parts, logs_E.exp(), is_linear=False)
            loss.backward()
            return loss

        search.step(closure)
        twin_E = logs_E.detach().exp()
    assert found.weights == pytest.approx(twin_E.tolist(), abs=2e-5)
    weights_E = torch.tensor(found.weights, dtype=torch.float64)
    best = log_likelihood(parts, weights_E, is_linear=is_linear)
    assert found.fitted * found.num_positions == pytest.approx(float(best), rel=1e-12)
    generator = torch.Generator().manual_seed(1)
    for size in (1e-3, 1e-2, 0.1):
        change_E = size * torch.randn(3, generator=generator, dtype=torch.float64)
        other_E = (weights_E + change_E - (change_E.mean() if is_linear else 0.0)).clamp(min=0.0)
        other_E = other_E / other_E.sum() if is_linear else other_E
        assert log_likelihood(parts, other_E, is_linear=is_linear) < best


@KINDS
def test_scores_and_information_are_the_derivatives(is_linear: bool) -> None:
    parts = simulated(40, [0.5, 0.7] if not is_linear else [0.4, 0.6], 2, is_linear=is_linear)
    weights_E = torch.tensor([0.8, 0.35], dtype=torch.float64)

    def value(weights_E: Tensor) -> Tensor:
        excess = weights_E.sum() - 1.0 if is_linear else 0.0
        return log_likelihood(parts, weights_E, is_linear=is_linear) - 40 * excess

    log_p_NE = target_log_p(parts)
    at = linear_likelihood(log_p_NE, weights_E) if is_linear else logarithmic_likelihood(parts, weights_E)
    assert at.value == pytest.approx(float(value(weights_E)), rel=1e-12)
    gradient_E = torch.autograd.functional.jacobian(value, weights_E)
    torch.testing.assert_close(at.scores_NE.sum(dim=0), gradient_E, rtol=1e-9, atol=1e-9)
    hessian_EE = torch.autograd.functional.hessian(value, weights_E)
    torch.testing.assert_close(at.information_EE, -hessian_EE, rtol=1e-9, atol=1e-9)


@KINDS
def test_planted_weights_are_recovered(is_linear: bool) -> None:
    planted = [0.5, 0.3, 0.2] if is_linear else [0.7, 0.4, 0.25]  # a product of sum 1.35: sharper
    found = fitted(simulated(20_000, planted, 3, is_linear=is_linear), is_linear=is_linear)
    assert max(found.standard_errors) < 0.02
    for weight, error, true in zip(found.weights, found.standard_errors, planted, strict=True):
        assert abs(weight - true) < 3 * error
    # the pool is true and its positions are independent: both kinds of error agree
    assert found.standard_errors == pytest.approx(found.model_errors, rel=0.05)
    assert found.fitted > max(found.equal, *found.alone)
    assert (found.num_positions, found.num_records) == (20_000, 20_000)


@KINDS
def test_intervals_cover_the_planted_weights(is_linear: bool) -> None:
    """Of 200 texts, 95 % intervals should hold the weight in 190, with a standard deviation of 3.1."""
    planted = [0.6, 0.4] if is_linear else [0.8, 0.4]
    share, total = planted[0] / sum(planted), sum(planted)
    covered = covered_shares = covered_sums = 0
    for seed in range(200):
        found = fitted(simulated(300, planted, 100 + seed, is_linear=is_linear), is_linear=is_linear)
        covered += abs(found.weights[0] - planted[0]) < 1.96 * found.standard_errors[0]
        covered_shares += abs(found.weights[0] / sum(found.weights) - share) < 1.96 * found.share_errors[0]
        covered_sums += abs(math.log(sum(found.weights) / total)) < 1.96 * found.sum_error + 1e-9
    assert 180 <= covered <= 198
    assert 180 <= covered_shares <= 199  # these take the larger one of two errors
    assert covered_sums == 200 if is_linear else 180 <= covered_sums <= 199


def test_errors_of_shares_and_sum_do_not_depend_on_how_flat_all_members_are() -> None:
    """Members to the power 1/2, and normalised, have twice the weights and twice their errors in the same pool."""
    parts = simulated(300, [0.8, 0.4], 10, is_linear=False)
    flat = [
        Outcomes(log_p_ENJ=(part.log_p_ENJ / 2).log_softmax(dim=2), targets_N=part.targets_N, records_N=part.records_N)
        for part in parts
    ]
    one, other = fit_logarithmic(parts), fit_logarithmic(flat)
    assert other.weights == pytest.approx([2 * weight for weight in one.weights], rel=1e-5)
    assert other.standard_errors == pytest.approx([2 * error for error in one.standard_errors], rel=1e-5)
    assert other.share_errors == pytest.approx(one.share_errors, rel=1e-5)
    assert other.sum_error == pytest.approx(one.sum_error, rel=1e-5)
    assert one.share_errors[0] == pytest.approx(one.share_errors[1], rel=1e-9)  # their sum is 1


def test_positions_of_a_record_that_repeat_each_other_count_once() -> None:
    """Each position three times, in one record: the errors are those of the single positions, not smaller by sqrt 3."""
    parts = simulated(400, [0.7, 0.4], 4, is_linear=False)
    thrice = [
        Outcomes(
            log_p_ENJ=part.log_p_ENJ.repeat_interleave(3, dim=1),
            targets_N=part.targets_N.repeat_interleave(3),
            records_N=part.records_N.repeat_interleave(3),
        )
        for part in parts
    ]
    once, repeated = fit_logarithmic(parts), fit_logarithmic(thrice)
    assert repeated.weights == pytest.approx(once.weights, abs=1e-9)
    assert repeated.standard_errors == pytest.approx(once.standard_errors, rel=1e-9)
    assert repeated.model_errors == pytest.approx([error / math.sqrt(3) for error in once.model_errors], rel=1e-6)
    assert (repeated.num_positions, repeated.num_records) == (1200, 400)


@KINDS
def test_a_member_that_only_disturbs_gets_weight_0(is_linear: bool) -> None:
    """The fit is that of the pool without it; its error is marked as one at a border."""
    parts = simulated(500, [0.6, 0.4], 5, is_linear=is_linear)
    generator = torch.Generator().manual_seed(6)
    disturbed = []
    for part in parts:  # makes the target unlikely
        is_target_NJ = torch.nn.functional.one_hot(part.targets_N, NUM_OUTCOMES)
        noise_NJ = torch.randn(is_target_NJ.shape, generator=generator, dtype=torch.float64)
        bad_NJ = (noise_NJ - 2.0 * is_target_NJ).masked_fill(part.log_p_ENJ[0] == -torch.inf, -torch.inf)
        log_p_ENJ = torch.cat([part.log_p_ENJ, bad_NJ.log_softmax(dim=1)[None]])
        disturbed.append(Outcomes(log_p_ENJ=log_p_ENJ, targets_N=part.targets_N, records_N=part.records_N))
    found, without = fitted(disturbed, is_linear=is_linear), fitted(parts, is_linear=is_linear)
    assert found.weights[2] == 0.0
    assert found.at_border == (False, False, True)
    assert found.weights[:2] == pytest.approx(without.weights, abs=1e-6)
    assert found.standard_errors[:2] == pytest.approx(without.standard_errors, rel=1e-4)
    assert 0.0 < found.standard_errors[2] < 1.0
    gradient_E = (
        linear_likelihood(target_log_p(disturbed), torch.tensor(found.weights, dtype=torch.float64))
        if is_linear
        else logarithmic_likelihood(disturbed, torch.tensor(found.weights, dtype=torch.float64))
    ).scores_NE.sum(dim=0)
    assert gradient_E[2] < 0  # the likelihood would grow beyond the border
    assert gradient_E[:2].abs().max() < 1e-4


def test_a_linear_pool_of_which_one_member_is_always_better_is_that_member() -> None:
    log_p_NE = torch.tensor([[-1.0, -2.0], [-0.5, -0.7], [-2.0, -2.5]], dtype=torch.float64).repeat(20, 1)
    found = fit_linear(log_p_NE, torch.arange(60))
    assert found.weights == pytest.approx((1.0, 0.0), abs=1e-9)
    assert found.weights[1] == 0.0
    assert found.at_border == (True, True)
    assert all(0 < error < math.inf for error in found.standard_errors)


@KINDS
def test_members_that_are_alike_are_not_told_apart(is_linear: bool) -> None:
    parts = simulated(200, [1.0], 7, is_linear=is_linear)
    twice = [
        Outcomes(log_p_ENJ=part.log_p_ENJ.repeat(2, 1, 1), targets_N=part.targets_N, records_N=part.records_N)
        for part in parts
    ]
    found = fitted(twice, is_linear=is_linear)
    assert found.standard_errors == found.share_errors == (math.inf, math.inf)
    assert sum(found.weights) == pytest.approx(sum(fitted(parts, is_linear=is_linear).weights), abs=1e-4)


def test_a_product_that_should_be_infinitely_sharp_has_an_infinite_error() -> None:
    """Where each target is the most likely outcome, no weight is large enough."""
    parts = simulated(200, [0.6, 0.4], 8, is_linear=False)
    certain = [
        Outcomes(log_p_ENJ=part.log_p_ENJ, targets_N=part.log_p_ENJ.sum(dim=0).argmax(dim=1), records_N=part.records_N)
        for part in parts
    ]
    found = fit_logarithmic(certain)
    assert max(max(found.model_errors), max(found.standard_errors)) > 10
    assert found.sum_error > 1


def test_the_temperature_of_one_member_is_fitted_too() -> None:
    found = fit_logarithmic(simulated(20_000, [0.5], 9, is_linear=False))
    assert abs(found.weights[0] - 0.5) < 3 * found.standard_errors[0] < 0.1
