"""The stored distribution is exact: it sums to one, and a smaller k is a view of a larger one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.topk import entropy, log_probabilities, narrow, top_k
from pipeline.types import InputError

SHAPES = st.tuples(st.integers(1, 6), st.integers(2, 40), st.integers(0, 1000), st.floats(0.1, 30))


def draw(shape: tuple[int, int, int, float]) -> torch.Tensor:
    num, vocabulary, seed, scale = shape
    return torch.randn(num, vocabulary, generator=torch.Generator().manual_seed(seed)) * scale


@settings(deadline=None)
@given(shape=SHAPES, k=st.integers(1, 40), temperature=st.sampled_from([1.0, 2.0, 0.5]))
def test_matches_the_dense_distribution_in_fp64_and_sums_to_one(shape: tuple, k: int, temperature: float) -> None:
    logits_NV = draw(shape)
    k = min(k, shape[1])
    top = top_k(logits_NV, k=k, temperatures=(0.5, 1.0, 2.0))
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


@settings(deadline=None)
@given(shape=SHAPES)
def test_a_smaller_k_is_an_exact_view(shape: tuple) -> None:
    logits_NV = draw(shape).half().float()
    logits_NV -= logits_NV.max(1, keepdim=True).values  # representable, so that capturing at k rounds nothing
    logits_NV = logits_NV.half().float()
    wide = top_k(logits_NV, k=shape[1], temperatures=(1.0, 2.0))
    for k in range(1, shape[1] + 1):
        direct, seen = top_k(logits_NV, k=k, temperatures=(1.0, 2.0)), narrow(wide, k=k)
        assert torch.equal(direct.relative_logits_NK, seen.relative_logits_NK)
        assert torch.allclose(direct.log_tail_NC, seen.log_tail_NC, atol=1e-5)


def test_refusals() -> None:
    logits_NV = torch.randn(2, 10)
    with pytest.raises(InputError, match=r"expected 1 to 10 \(the vocabulary\), found 11"):
        top_k(logits_NV, k=11, temperatures=(1.0,))
    top = top_k(logits_NV, k=4, temperatures=(1.0,))
    with pytest.raises(InputError, match=r"expected one of the captured \[1.0\], found 2.0"):
        log_probabilities(top, temperature=2.0)
    with pytest.raises(InputError, match="expected 1 to the captured 4, found 5"):
        narrow(top, k=5)


def test_entropy_of_uniform_and_certain() -> None:
    logits_NV = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, -torch.inf, -torch.inf, -torch.inf]])
    assert torch.allclose(entropy(logits_NV), torch.tensor([4.0, 1.0]).log())
