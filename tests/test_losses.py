"""Every term against a slow fp64 twin on dense distributions; sums and counts; extreme inputs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.losses import TermOptions, combine, count_positions, evaluate_terms, forward_kl
from pipeline.topk import hybrid, log_probabilities, sampled, top_k
from pipeline.types import UNKNOWN_TARGET, Batch, TopK

TEMPERATURES = (0.5, 1.0, 2.0)


def twin_forward_kl(logits_NV: Tensor, top: TopK, temperature: float) -> Tensor:
    """sum_K p log(p/q) + (1-P) log((1-P)/(1-Q)) written out with dense fp64 probabilities."""
    log_p_NK, log_p_tail_N = (x.double() for x in log_probabilities(top, temperature=temperature))
    q_NV = torch.softmax(logits_NV.double() / temperature, dim=1)
    kept_NV = torch.zeros_like(q_NV, dtype=torch.bool).scatter(1, top.ids_NK, True)
    total = logits_NV.double().new_zeros(())
    for n in range(q_NV.shape[0]):
        for j, token in enumerate(top.ids_NK[n].tolist()):
            p = log_p_NK[n, j].exp()
            if p > 0:
                total = total + p * (p.log() - q_NV[n, token].log())
        p_tail = log_p_tail_N[n].exp()
        if p_tail > 0:
            total = total + p_tail * (p_tail.log() - q_NV[n][~kept_NV[n]].sum().log())
    return total


def gradient(function, logits_NV: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits_NV.clone().requires_grad_()
    value = function(leaf)
    value.backward()
    assert leaf.grad is not None
    return value.detach(), leaf.grad


def close(ours: Tensor, exact: Tensor, *, relative: float = 1e-5) -> bool:
    scale = exact.abs().max().clamp(min=1.0)
    return bool((ours.double() - exact.double()).abs().max() <= relative * scale)


@settings(deadline=None, max_examples=60)
@given(
    num=st.integers(1, 5),
    vocabulary=st.integers(2, 30),
    k=st.integers(1, 30),
    seed=st.integers(0, 10_000),
    scale=st.sampled_from([0.1, 1.0, 5.0]),
    temperature=st.sampled_from(TEMPERATURES),
)
def test_forward_kl_value_and_gradient(
    num: int, vocabulary: int, k: int, seed: int, scale: float, temperature: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    teacher_NV, student_NV = (torch.randn(num, vocabulary, generator=generator) * scale for _ in range(2))
    top = top_k(teacher_NV, k=min(k, vocabulary), temperatures=TEMPERATURES)
    value, grad = gradient(lambda z: forward_kl(z, top, temperature=temperature), student_NV)
    exact, exact_grad = gradient(lambda z: twin_forward_kl(z, top, temperature), student_NV.double())
    assert close(value, exact)
    assert close(grad, exact_grad)
    assert value >= -1e-5 * num


def test_k_equal_to_the_vocabulary_is_dense_kl() -> None:
    teacher_NV, student_NV = torch.randn(7, 50), torch.randn(7, 50)
    top = top_k(teacher_NV, k=50, temperatures=(1.0,))
    dense = torch.nn.functional.kl_div(
        student_NV.double().log_softmax(1), teacher_NV.double().log_softmax(1), log_target=True, reduction="sum"
    )
    # the teacher's stored logits are fp16: 2**-11 of the spread
    assert abs(forward_kl(student_NV, top, temperature=1.0).item() - dense.item()) < 1e-2
    stored_NV = torch.zeros_like(teacher_NV).scatter(1, top.ids_NK, top.relative_logits_NK.float())
    exact = torch.nn.functional.kl_div(
        student_NV.double().log_softmax(1), stored_NV.double().log_softmax(1), log_target=True, reduction="sum"
    )
    assert abs(forward_kl(student_NV, top, temperature=1.0).item() - exact.item()) < 1e-5 * abs(exact.item())


def test_a_perfect_copy_costs_nothing_and_pulls_nowhere() -> None:
    logits_NV = torch.randn(4, 40).half().float()
    logits_NV = (logits_NV - logits_NV.max(1, keepdim=True).values).half().float()
    top = top_k(logits_NV, k=8, temperatures=(1.0,))
    value, grad = gradient(lambda z: forward_kl(z, top, temperature=1.0), logits_NV)
    assert value.abs() < 1e-5
    assert grad.abs().max() < 1e-6


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_closed_form_gradient_of_the_design(temperature: float) -> None:
    """On K: (q - p)/T; on the tail: q (P - Q)/(1 - Q)/T."""
    teacher_NV, student_NV = torch.randn(5, 20, dtype=torch.float64), torch.randn(5, 20)
    top = top_k(teacher_NV, k=6, temperatures=TEMPERATURES)
    _, grad = gradient(lambda z: forward_kl(z, top, temperature=temperature), student_NV)
    q_NV = torch.softmax(student_NV.double() / temperature, 1)
    p_NK = log_probabilities(top, temperature=temperature)[0].double().exp()
    P, Q = p_NK.sum(1, keepdim=True), q_NV.gather(1, top.ids_NK).sum(1, keepdim=True)
    expected = (q_NV * (P - Q) / (1 - Q)).scatter(1, top.ids_NK, q_NV.gather(1, top.ids_NK) - p_NK) / temperature
    assert close(grad, expected)


EXTREMES = {
    "one-hot teacher": (torch.tensor([[0.0, -1e4, -1e4, -1e4, -1e4]]), torch.randn(1, 5)),
    "ties": (torch.zeros(1, 5), torch.zeros(1, 5)),
    "-inf teacher": (torch.tensor([[1.0, 0.5, -torch.inf, -torch.inf, -torch.inf]]), torch.randn(1, 5)),
    "tiny tail": (torch.tensor([[0.0, -1.0, -28.0, -28.0, -28.0]]), torch.randn(1, 5)),
    "certain student": (torch.randn(1, 5), torch.tensor([[80.0, 0.0, 0.0, 0.0, 0.0]])),
    "student tail of 1e-12": (torch.randn(1, 5), torch.tensor([[0.0, 0.0, -28.0, -28.0, -28.0]])),
}


@pytest.mark.parametrize("name", EXTREMES)
@pytest.mark.parametrize("k", [1, 2, 5])
def test_extremes_are_finite_and_never_negative(name: str, k: int) -> None:
    teacher_NV, student_NV = EXTREMES[name]
    top = top_k(teacher_NV, k=k, temperatures=TEMPERATURES)
    for temperature in TEMPERATURES:
        value, grad = gradient(lambda z, t=temperature: forward_kl(z, top, temperature=t), student_NV)
        assert torch.isfinite(value)
        assert torch.isfinite(grad).all()
        assert value >= -1e-5


def make_batch(*, num_gold: int, num_corpus: int, vocabulary: int = 30, unknown: bool = True, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    total = num_gold + num_corpus
    gold_N = torch.arange(total) < num_gold
    targets_N = torch.randint(0, vocabulary, (total,), generator=generator)
    if unknown:
        targets_N = torch.where(gold_N, targets_N, UNKNOWN_TARGET)
    teacher = None
    if num_corpus:
        teacher = top_k(torch.randn(num_corpus, vocabulary, generator=generator), k=5, temperatures=(1.0, 2.0))
    return Batch(
        input_ids_BS=torch.zeros(1, max(total, 1), dtype=torch.int64),
        position_ids_BS=torch.zeros(1, max(total, 1), dtype=torch.int64),
        flat_positions_N=torch.arange(total),
        target_ids_N=targets_N,
        gold_N=gold_N,
        weak_N=~gold_N,
        teacher=teacher,
    )


BOTH = {"lm": TermOptions(on=("gold",)), "kd": TermOptions(on=("corpus",), temperature=2.0)}


def test_lm_against_the_twin_and_only_on_gold() -> None:
    batch, logits_NV = make_batch(num_gold=4, num_corpus=3, unknown=False), torch.randn(7, 30)
    exact = -torch.log_softmax(logits_NV.double(), 1)[torch.arange(4), batch.target_ids_N[:4]].sum()
    term = evaluate_terms(logits_NV, batch, BOTH)["lm"]
    assert term.count == 4
    assert close(term.total, exact)
    both = {"lm": TermOptions(on=("gold", "corpus"))}
    assert evaluate_terms(logits_NV, batch, both)["lm"].count == 7


@pytest.mark.parametrize("squared", [True, False])
def test_temperature_squared_multiplies_what_is_differentiated(squared: bool) -> None:
    batch, logits_NV = make_batch(num_gold=0, num_corpus=6), torch.randn(6, 30)
    assert batch.teacher is not None
    options = {"kd": TermOptions(on=("corpus",), temperature=2.0, temperature_squared=squared)}
    value, grad = gradient(lambda z: evaluate_terms(z, batch, options)["kd"].total, logits_NV)
    exact, exact_grad = gradient(lambda z: twin_forward_kl(z, batch.teacher, 2.0), logits_NV.double())
    factor = 4.0 if squared else 1.0
    assert close(value, factor * exact)
    assert close(grad, factor * exact_grad)


@pytest.mark.parametrize(("num_gold", "num_corpus"), [(0, 0), (3, 0), (0, 3)])
def test_a_batch_without_one_of_the_streams(num_gold: int, num_corpus: int) -> None:
    batch = make_batch(num_gold=num_gold, num_corpus=num_corpus)
    logits_NV = torch.randn(num_gold + num_corpus, 30, requires_grad=True)
    terms = evaluate_terms(logits_NV, batch, BOTH)
    assert count_positions(batch, BOTH).tolist() == [num_gold, num_corpus]
    assert [int(term.count) for term in terms.values()] == [num_gold, num_corpus]
    combine(terms, weights={"lm": 1.0, "kd": 1.0}, divisors={"lm": 3.0, "kd": 0.0}).backward()
    assert logits_NV.grad is not None
    assert torch.isfinite(logits_NV.grad).all()


def test_splitting_a_batch_changes_neither_value_nor_gradient() -> None:
    batch, logits_NV = make_batch(num_gold=3, num_corpus=5), torch.randn(8, 30)
    counts = dict(zip(BOTH, count_positions(batch, BOTH).tolist(), strict=True))
    weights = {"lm": 0.7, "kd": 1.3}
    whole = gradient(lambda z: combine(evaluate_terms(z, batch, BOTH), weights=weights, divisors=counts), logits_NV)

    def part(z: Tensor, rows: Tensor) -> Tensor:
        assert batch.teacher is not None
        kept = rows[batch.weak_N]
        piece = Batch(
            input_ids_BS=batch.input_ids_BS,
            position_ids_BS=batch.position_ids_BS,
            flat_positions_N=batch.flat_positions_N[rows],
            target_ids_N=batch.target_ids_N[rows],
            gold_N=batch.gold_N[rows],
            weak_N=batch.weak_N[rows],
            teacher=TopK(
                ids_NK=batch.teacher.ids_NK[kept],
                relative_logits_NK=batch.teacher.relative_logits_NK[kept],
                log_tail_NC=batch.teacher.log_tail_NC[kept],
                temperatures=batch.teacher.temperatures,
            ),
        )
        return combine(evaluate_terms(z[rows], piece, BOTH), weights=weights, divisors=counts)

    for rows in (torch.arange(8) < 2, torch.arange(8) % 2 == 0, torch.arange(8) < 3):
        split = gradient(lambda z, rows=rows: part(z, rows) + part(z, ~rows), logits_NV)
        assert close(split[0], whole[0])
        assert close(split[1], whole[1])


@pytest.mark.parametrize("kind", ["sampled", "hybrid"])
def test_drawn_targets_value_and_gradient_against_the_twin(kind: str) -> None:
    teacher_NV, student_NV = torch.randn(6, 25), torch.randn(6, 25)
    uniforms_ND = torch.rand(6, 9, dtype=torch.float64)
    top = sampled(teacher_NV, uniforms_ND=uniforms_ND)
    if kind == "hybrid":
        top = hybrid(teacher_NV, k=4, uniforms_ND=uniforms_ND)
    value, grad = gradient(lambda z: forward_kl(z, top, temperature=1.0), student_NV)
    exact, exact_grad = gradient(lambda z: twin_forward_kl(z, top, 1.0), student_NV.double())
    assert close(value, exact)
    assert close(grad, exact_grad)


@pytest.mark.parametrize("kind", ["sampled", "hybrid"])
def test_the_mean_gradient_over_many_draws_is_the_dense_one(kind: str) -> None:
    """Each logit's mean gradient over 20,000 captures within 5 standard errors of q - p."""
    teacher_1V, student_1V = torch.randn(1, 10) * 2, torch.randn(1, 10)
    repeats = 20_000
    uniforms_ND = torch.rand(repeats, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    many_NV = teacher_1V.expand(repeats, -1)
    top = sampled(many_NV, uniforms_ND=uniforms_ND)
    if kind == "hybrid":
        top = hybrid(many_NV, k=2, uniforms_ND=uniforms_ND)
    _, grad_NV = gradient(lambda z: forward_kl(z, top, temperature=1.0), student_1V.expand(repeats, -1).clone())
    exact_V = (torch.softmax(student_1V.double(), 1) - torch.softmax(teacher_1V.double(), 1))[0]
    standard_error_V = grad_NV.double().std(dim=0) / repeats**0.5
    assert ((grad_NV.double().mean(dim=0) - exact_V).abs() <= 5 * standard_error_V + 1e-3).all()
