"""The stored distribution is exact: it sums to one, and a smaller k is a view of a larger one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.topk import (
    hybrid,
    keep_also,
    kept_ids,
    largest_k,
    log_probabilities,
    narrow,
    sampled,
    top_k_and_entropy,
    uniform_draws,
)
from pipeline.core.types import InputError, TopK

SHAPES = st.tuples(st.integers(1, 6), st.integers(2, 40), st.integers(0, 1000), st.floats(0.1, 30))


def random_logits(shape: tuple[int, int, int, float]) -> torch.Tensor:
    num_positions, vocabulary, seed, scale = shape
    return torch.randn(num_positions, vocabulary, generator=torch.Generator().manual_seed(seed)) * scale


@settings(deadline=None)
@given(shape=SHAPES, k=st.integers(1, 40), temperature=st.sampled_from([1.0, 2.0, 0.5]))
def test_matches_the_dense_distribution_in_fp64_and_sums_to_one(shape: tuple, k: int, temperature: float) -> None:
    logits_NV = random_logits(shape)
    k = min(k, shape[1])
    top = top_k_and_entropy(logits_NV, k=k, temperatures=(0.5, 1.0, 2.0))[0]
    log_p_NK, log_tail_N = log_probabilities(top, temperature=temperature)
    total_N = log_p_NK.double().exp().sum(1) + log_tail_N.double().exp()
    assert torch.allclose(total_N, torch.ones_like(total_N), atol=1e-5)
    dense_NV = torch.log_softmax(logits_NV.double() / temperature, dim=1)
    # fp16 keeps 11 bits of a logit's distance to the largest: 1/2048 of it at most, doubled by z
    spread = (logits_NV.max(1).values - logits_NV.min(1).values).max().item() / temperature
    tolerance = spread / 1024 + 1e-5
    assert torch.allclose(log_p_NK.double(), dense_NV.gather(1, top.ids_NK), atol=tolerance)
    tail_NV = dense_NV.scatter(1, top.ids_NK, -torch.inf)
    if k < shape[1]:
        assert torch.allclose(log_tail_N.double(), tail_NV.logsumexp(1), atol=tolerance)
    else:
        assert (log_tail_N == -torch.inf).all()


@settings(deadline=None, max_examples=30)
@given(shape=SHAPES, k=st.integers(1, 40))
def test_keeping_more_tokens_moves_them_out_of_the_tail(shape: tuple, k: int) -> None:
    """None, half of the vocabulary, and all of it, at -inf here and there: against the sum over the other tokens."""
    logits_NV = random_logits(shape)
    vocabulary, k = shape[1], min(k, shape[1] - 1)
    logits_NV[0, vocabulary // 2 :] = -torch.inf
    top = top_k_and_entropy(logits_NV, k=k, temperatures=(1.0, 2.0))[0]
    everything_NV = torch.arange(vocabulary).repeat(len(logits_NV), 1)
    nothing_NV = torch.full_like(everything_NV, -1)
    some_NV = torch.where(everything_NV % 2 == 0, everything_NV, -1)
    for also_NV in (nothing_NV, some_NV, everything_NV):
        more = keep_also(top, logits_NV, also_NV)
        assert torch.equal(more.ids_NK[:, :k], top.ids_NK)
        assert torch.equal(more.relative_logits_NK[:, :k], top.relative_logits_NK)
        assert (more.relative_logits_NK[:, 1:] <= more.relative_logits_NK[:, :-1]).all()
        is_kept_NV = torch.zeros_like(logits_NV, dtype=torch.bool).scatter(1, more.ids_NK, True)
        wanted_NV = is_kept_NV.new_zeros(logits_NV.shape).scatter(1, top.ids_NK, True) | (also_NV >= 0)
        exists_NV = logits_NV > -torch.inf
        assert torch.equal(is_kept_NV & exists_NV, wanted_NV & exists_NV)
        relative_NV = logits_NV.double() - logits_NV.double().amax(dim=1, keepdim=True)
        for c, T in enumerate((1.0, 2.0)):
            expected_N = (relative_NV / T).masked_fill(wanted_NV, -torch.inf).logsumexp(1)
            assert torch.allclose(more.log_tail_NC[:, c].double(), expected_N, atol=1e-4)
        counts_N = (kept_ids(more)[:, k:] >= 0).sum(1)
        assert torch.equal(
            counts_N,
            (wanted_NV & exists_NV).sum(1) - (top.ids_NK >= 0).logical_and(exists_NV.gather(1, top.ids_NK)).sum(1),
        )


@settings(deadline=None)
@given(shape=SHAPES)
def test_narrow_equals_a_capture_with_the_smaller_k(shape: tuple) -> None:
    logits_NV = random_logits(shape).half().float()
    logits_NV -= logits_NV.max(1, keepdim=True).values  # representable in fp16, so that a capture rounds nothing
    logits_NV = logits_NV.half().float()
    wide = top_k_and_entropy(logits_NV, k=shape[1], temperatures=(1.0, 2.0))[0]
    for k in range(1, shape[1] + 1):
        direct, narrowed = top_k_and_entropy(logits_NV, k=k, temperatures=(1.0, 2.0))[0], narrow(wide, k=k)
        assert torch.equal(direct.relative_logits_NK, narrowed.relative_logits_NK)
        assert torch.allclose(direct.log_tail_NC, narrowed.log_tail_NC, atol=1e-5)


def test_a_k_or_temperature_that_is_not_there_is_rejected() -> None:
    logits_NV = torch.randn(2, 10)
    with pytest.raises(InputError, match=r"expected 1 to 10 \(the vocabulary\), found 11"):
        top_k_and_entropy(logits_NV, k=11, temperatures=(1.0,))
    top = top_k_and_entropy(logits_NV, k=4, temperatures=(1.0,))[0]
    with pytest.raises(InputError, match=r"expected one of the captured \[1.0\], found 2.0"):
        log_probabilities(top, temperature=2.0)
    with pytest.raises(InputError, match="expected 1 to the captured 4, found 5"):
        narrow(top, k=5)


@settings(deadline=None)
@given(shape=SHAPES, k=st.integers(1, 40), num_impossible=st.integers(0, 30))
def test_log_z_and_entropy_of_the_full_distribution(shape: tuple, k: int, num_impossible: int) -> None:
    """Against fp64, with one-hot positions, ids without mass (-inf) and tails too small for fp32's exp."""
    logits_NV = random_logits(shape)
    logits_NV[:, 1 : 1 + num_impossible] = -torch.inf
    logits_NV[0, 0] = 500.0
    _, log_z_N, entropy_N = top_k_and_entropy(logits_NV, k=min(k, shape[1]), temperatures=(1.0,))
    dense_NV = logits_NV.double()
    p_NV = torch.softmax(dense_NV, dim=1)
    expected_z_N = (dense_NV - dense_NV.max(1, keepdim=True).values).logsumexp(1)
    assert torch.allclose(log_z_N.double(), expected_z_N, atol=1e-5)
    assert torch.allclose(entropy_N.double(), torch.special.entr(p_NV).sum(1), atol=1e-4)
    assert entropy_N.isfinite().all()


def test_a_far_tail_keeps_its_mass() -> None:
    """exp(-200) is 0 in fp32, its logarithm is not -inf."""
    top = top_k_and_entropy(torch.tensor([[0.0, -200.0, -200.0]]), k=1, temperatures=(1.0,))[0]
    assert top.log_tail_NC.item() == pytest.approx(-200.0 + torch.tensor(2.0).log().item())


@pytest.mark.parametrize("size", [999, 4096, 49_152])
@pytest.mark.parametrize("with_ties", [False, True])
def test_largest_k_equals_torch_topk(size: int, with_ties: bool) -> None:
    """With ties, as in bfloat16 logits, other ids of equal value may be kept; the values must be the same."""
    logits_NV = random_logits((20, size, 3, 4.0))
    logits_NV = logits_NV.round() if with_ties else logits_NV
    for k in (1, 8, 64, 300):
        values_NK, ids_NK = largest_k(logits_NV, k)
        assert torch.equal(values_NK, logits_NV.topk(k, dim=1).values)
        assert torch.equal(logits_NV.gather(1, ids_NK), values_NK)
        assert all(len(set(row)) == k for row in ids_NK.tolist())


def dense(top: TopK, vocabulary: int) -> torch.Tensor:
    """[N, V] probabilities at T = 1 of the kept entries, in fp64; padding adds nothing."""
    log_p_NK, _ = log_probabilities(top, temperature=1.0)
    zeros = torch.zeros(len(log_p_NK), vocabulary, dtype=torch.float64)
    return zeros.scatter_add(1, top.ids_NK, log_p_NK.double().exp())


KINDS = {
    "sampled": lambda logits_NV, uniforms_ND: sampled(logits_NV, uniforms_ND=uniforms_ND),
    "hybrid": lambda logits_NV, uniforms_ND: hybrid(logits_NV, k=3, uniforms_ND=uniforms_ND),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_of_many_draws_is_the_distribution(kind: str) -> None:
    """20,000 independent captures of one position: each token's mean within 5 standard errors of its probability."""
    logits_1V = torch.randn(1, 12, generator=torch.Generator().manual_seed(0)) * 2
    repeats, draws = 20_000, 8
    uniforms_ND = torch.rand(repeats, draws, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    estimates_NV = dense(KINDS[kind](logits_1V.expand(repeats, -1), uniforms_ND), 12)
    exact_V = torch.softmax(logits_1V[0].double(), dim=0)
    standard_error_V = estimates_NV.std(dim=0) / repeats**0.5
    # fp16 keeps a weight to one part in 2048
    assert ((estimates_NV.mean(dim=0) - exact_V).abs() <= 5 * standard_error_V + exact_V / 2048).all()
    assert torch.allclose(estimates_NV.sum(dim=1), torch.ones(repeats, dtype=torch.float64), atol=1e-6)


def test_hybrid_is_exact_for_the_k_largest() -> None:
    logits_NV = torch.randn(50, 40)
    top = hybrid(logits_NV, k=5, uniforms_ND=torch.rand(50, 10, dtype=torch.float64))
    exact_NV = torch.softmax(logits_NV.double(), dim=1)
    head_NK = exact_NV.topk(5, dim=1).indices
    hybrid_NV = dense(top, 40)
    assert torch.allclose(hybrid_NV.gather(1, head_NK), exact_NV.gather(1, head_NK), rtol=2e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_distributions(kind: str) -> None:
    certain = torch.tensor([[0.0, -torch.inf, -torch.inf, -torch.inf], [50.0, 0.0, 0.0, 0.0]])
    top = KINDS[kind](certain, torch.rand(2, 6, dtype=torch.float64))
    assert torch.allclose(dense(top, 4)[:, 0], torch.ones(2, dtype=torch.float64))
    edges = torch.tensor([[0.0] * 6, [1 - 2**-53] * 6], dtype=torch.float64)
    assert torch.isfinite(dense(KINDS[kind](torch.zeros(2, 4), edges), 4)).all()


def test_draws_are_a_function_of_seed_key_and_position() -> None:
    key, other = b"a" * 16, b"b" * 16
    assert torch.equal(uniform_draws(key, 5, draws=3, seed=1), uniform_draws(key, 5, draws=3, seed=1))
    assert torch.equal(uniform_draws(key, 3, draws=3, seed=1), uniform_draws(key, 5, draws=3, seed=1)[:3])
    assert not torch.equal(uniform_draws(key, 5, draws=3, seed=1), uniform_draws(other, 5, draws=3, seed=1))
    assert not torch.equal(uniform_draws(key, 5, draws=3, seed=1), uniform_draws(key, 5, draws=3, seed=2))
    assert not torch.equal(*uniform_draws(key, 2, draws=3, seed=1))


def test_padding_to_a_width_changes_no_probability() -> None:
    top = sampled(torch.randn(4, 30), uniforms_ND=torch.rand(4, 9, dtype=torch.float64))
    assert torch.equal(dense(top.pad_to_width(20), 30), dense(top, 30))
