"""Pools of distributions against dense ones in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.topk import log_probabilities, narrow, top_k_and_entropy
from pipeline.core.types import InputError, TopK
from pipeline.pooling.distributions import Pooled, aligned, linear_pool, logarithmic_pool

VOCABULARY, POSITIONS = 97, 150  # more positions than a table of places holds


def members(
    *, count: int, k: int, seed: int = 0, agreement: float = 3.0
) -> tuple[list[TopK], list[torch.Tensor], list[torch.Tensor]]:
    """Captured distributions, their log-probabilities of a target, and what was captured as dense logits in float64.

    The dense logits are those that float16 stores, so that rounding is no part of a comparison.
    """
    generator = torch.Generator().manual_seed(seed)
    common_NV = agreement * torch.randn(POSITIONS, VOCABULARY, generator=generator)
    targets_N1 = torch.randint(VOCABULARY, (POSITIONS, 1), generator=generator)
    tops, targets, dense = [], [], []
    for _ in range(count):
        logits_NV = common_NV + torch.randn(POSITIONS, VOCABULARY, generator=generator)
        logits_NV = (logits_NV - logits_NV.amax(dim=1, keepdim=True)).half().float()
        tops.append(top_k_and_entropy(logits_NV, k=k, temperatures=(0.5, 1.0, 2.0))[0])
        dense.append(logits_NV.double())
        targets.append(logits_NV.log_softmax(dim=1).gather(1, targets_N1)[:, 0])
    return tops, targets, dense


def common_ids(tops: list[TopK]) -> torch.Tensor:
    """Whether all members kept a token: [N, V] bool."""
    kept = [torch.zeros(POSITIONS, VOCABULARY, dtype=torch.bool).scatter(1, top.ids_NK.long(), True) for top in tops]
    return torch.stack(kept).all(dim=0)


def coarse(log_p_NV: torch.Tensor, is_kept_NV: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [N, V + 1] of the kept tokens, -inf for others, and last of all others together."""
    tail_N1 = log_p_NV.masked_fill(is_kept_NV, -torch.inf).logsumexp(dim=1, keepdim=True)
    return torch.cat([log_p_NV.masked_fill(~is_kept_NV, -torch.inf), tail_N1], dim=1)


def coarse_of(top: TopK, temperature: float = 1.0) -> torch.Tensor:
    log_p_NK, log_tail_N = log_probabilities(top, temperature=temperature, dtype=torch.float64)
    is_kept_NK = top.relative_logits_NK > -torch.inf
    ids_NK = torch.where(is_kept_NK, top.ids_NK.long(), VOCABULARY + 1)  # padding into a column that is cut off
    found_NV = torch.full((len(ids_NK), VOCABULARY + 2), -torch.inf, dtype=torch.float64).scatter(1, ids_NK, log_p_NK)
    return torch.cat([found_NV[:, :VOCABULARY], log_tail_N[:, None]], dim=1)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.equal(found == -torch.inf, expected == -torch.inf)
    torch.testing.assert_close(found.exp(), expected.exp(), rtol=2e-3, atol=1e-6)  # relative logits are float16


@pytest.mark.parametrize("pool", [logarithmic_pool, linear_pool])
def test_a_pool_of_one_member_is_that_member(pool) -> None:
    (top,), (target_N,), _ = members(count=1, k=16)
    found = pool([top], [target_N], [1.0], vocabulary_size=VOCABULARY)
    if pool is logarithmic_pool:  # bit for bit, at each temperature
        for name in ("ids_NK", "relative_logits_NK", "log_tail_NC"):
            assert torch.equal(getattr(found.top, name), getattr(top, name)), name
        assert found.top.temperatures == top.temperatures
    assert_close(coarse_of(found.top), coarse_of(top))
    torch.testing.assert_close(found.target_log_prob_N, target_N, atol=1e-5, rtol=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 4), st.integers(8, VOCABULARY), st.integers(0, 10**6), st.booleans())
def test_the_linear_pool_is_the_mean_of_the_distributions(count: int, k: int, seed: int, is_weighted: bool) -> None:
    tops, targets, dense = members(count=count, k=k, seed=seed)
    weights = [w / sum(range(1, count + 1)) for w in range(1, count + 1)] if is_weighted else [1 / count] * count
    found = pooled_or_nothing(lambda: linear_pool(tops, targets, weights, vocabulary_size=VOCABULARY))
    if found is None:
        return
    p_NV = sum(w * logits_NV.softmax(dim=1) for w, logits_NV in zip(weights, dense, strict=True))
    assert_close(coarse_of(found.top), coarse(p_NV.log(), common_ids(tops)))
    expected_N = sum(w * target_N.double().exp() for w, target_N in zip(weights, targets, strict=True)).log()
    torch.testing.assert_close(found.target_log_prob_N.double(), expected_N, atol=1e-4, rtol=1e-4)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(2, 4), st.integers(8, VOCABULARY), st.integers(0, 10**6), st.sampled_from([0.25, 0.5, 0.7, 1.0, 2.0])
)
def test_the_logarithmic_pool_of_kept_entries_and_tail(count: int, k: int, seed: int, temperature: float) -> None:
    """The product of powers of what is known: the entries that all kept, and each member's tail as one outcome."""
    tops, targets, dense = members(count=count, k=k, seed=seed)
    weights = [w / sum(range(1, count + 1)) for w in range(1, count + 1)]
    options = {"vocabulary_size": VOCABULARY, "temperature": temperature}
    found = pooled_or_nothing(lambda: logarithmic_pool(tops, targets, weights, **options))
    if found is None:
        return
    is_kept_NV = common_ids(tops)
    # exp(z / t) of a tail is summed at t where that was captured, else its sum at 1 is taken to the power
    at = temperature if temperature in (0.5, 1.0, 2.0) else 1.0
    kept = sum(w * logits_NV for w, logits_NV in zip(weights, dense, strict=True)) / temperature
    tails = [(logits_NV / at).masked_fill(is_kept_NV, -torch.inf).logsumexp(dim=1) for logits_NV in dense]
    tail_N = sum(w * tail_N for w, tail_N in zip(weights, tails, strict=True)) * (at / temperature)
    unnormalised_NV = torch.cat([kept.masked_fill(~is_kept_NV, -torch.inf), tail_N[:, None]], dim=1)
    expected = unnormalised_NV.log_softmax(dim=1)
    assert_close(coarse_of(found.top), expected)
    # the tail is an upper bound of what it would be if all were known
    exact_NV = sum(w * logits_NV for w, logits_NV in zip(weights, dense, strict=True)) / temperature
    exact = coarse(exact_NV.log_softmax(dim=1), is_kept_NV)
    if temperature <= 1.0:
        assert (coarse_of(found.top)[:, -1] >= exact[:, -1] - 1e-3).all()


def test_with_all_entries_kept_the_logarithmic_pool_is_exact() -> None:
    tops, targets, dense = members(count=3, k=VOCABULARY)
    weights = [0.5, 0.3, 0.2]
    found = logarithmic_pool(tops, targets, weights, vocabulary_size=VOCABULARY, temperature=0.5)
    log_p_NV = (sum(w * d for w, d in zip(weights, dense, strict=True)) / 0.5).log_softmax(dim=1)
    assert_close(coarse_of(found.top)[:, :-1], log_p_NV)


def test_entries_that_are_dropped_join_the_tail() -> None:
    """Narrowing before and after give the same distribution of what is kept in the end."""
    tops, targets, _ = members(count=2, k=24)
    weights = [0.6, 0.4]
    wide = linear_pool(tops, targets, weights, vocabulary_size=VOCABULARY).top
    slim = linear_pool([narrow(top, k=16) for top in tops], targets, weights, vocabulary_size=VOCABULARY).top
    wide_NV, slim_NV = coarse_of(wide), coarse_of(slim)
    is_kept_NV = slim_NV > -torch.inf
    assert_close(slim_NV[:, :-1], wide_NV[:, :-1].masked_fill(~is_kept_NV[:, :-1], -torch.inf))
    left_N = wide_NV.exp().sum(dim=1) - wide_NV[:, :-1].exp().masked_fill(~is_kept_NV[:, :-1], 0).sum(dim=1)
    torch.testing.assert_close(slim_NV[:, -1].exp(), left_N, rtol=2e-3, atol=1e-6)
    (one,), (target_N,), _ = members(count=1, k=24)
    first = logarithmic_pool([narrow(one, k=8)], [target_N], [1.0], vocabulary_size=VOCABULARY).top
    then = narrow(logarithmic_pool([one], [target_N], [1.0], vocabulary_size=VOCABULARY).top, k=8)
    assert torch.equal(first.log_tail_NC, then.log_tail_NC)


def test_a_tail_too_small_for_float32_keeps_its_logarithm() -> None:
    """exp(-120) is 0 in float32; in a product of powers its logarithm counts."""
    ids_NK = torch.tensor([[0, 1, 2], [0, 1, 2]])
    one, two = (
        TopK(
            ids_NK=ids,
            relative_logits_NK=torch.tensor([[0.0, -1.0, last], [0.0, -1.0, last]]).half(),
            log_tail_NC=torch.full((2, 2), -torch.inf),
            temperatures=(0.5, 1.0),
        )
        for ids, last in ((ids_NK, -120.0), (torch.where(ids_NK == 2, 3, ids_NK), -2.0))
    )
    _, (first, second) = aligned([one, two], VOCABULARY)
    assert first.log_tail_NC.tolist() == [[-240.0, -120.0]] * 2
    assert second.log_tail_NC[0].tolist() == pytest.approx([-4.0, -2.0])
    assert first.relative_logits_NK.tolist() == [[0.0, -1.0, -torch.inf]] * 2


def test_equal_logits_stay_in_the_order_of_the_first_member() -> None:
    """As a stable sort has them: the ids by falling logit of the pool, and then as they were."""
    generator = torch.Generator().manual_seed(0)
    relative_NK = -torch.randint(4, (50, 12), generator=generator).half().sort(dim=1).values
    ids_NK = torch.stack([torch.randperm(VOCABULARY, generator=generator)[:12] for _ in range(50)])
    tail_NC = torch.zeros(50, 1)
    one = TopK(ids_NK=ids_NK, relative_logits_NK=relative_NK, log_tail_NC=tail_NC, temperatures=(1.0,))
    shift_NK = -torch.randint(3, (50, 12), generator=generator).half()
    two = TopK(ids_NK=ids_NK, relative_logits_NK=shift_NK, log_tail_NC=tail_NC, temperatures=(1.0,))
    found = logarithmic_pool([one, two], [tail_NC[:, 0]] * 2, [0.5, 0.5], vocabulary_size=VOCABULARY).top
    summed_NK, order_NK = ((relative_NK + shift_NK) / 2).sort(dim=1, descending=True, stable=True)
    assert torch.equal(found.ids_NK, ids_NK.gather(1, order_NK))
    assert torch.equal(found.relative_logits_NK, summed_NK - summed_NK[:, :1])


def test_positions_without_a_common_token_are_refused() -> None:
    tops, targets, _ = members(count=2, k=1, agreement=0.0)
    with pytest.raises(InputError, match="a token that all of them kept"):
        linear_pool(tops, targets, [0.5, 0.5], vocabulary_size=VOCABULARY)


def pooled_or_nothing(pool) -> Pooled | None:
    try:
        return pool()
    except InputError:  # by chance a position has no common token
        return None
