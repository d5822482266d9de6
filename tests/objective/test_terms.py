"""Every term against a slow fp64 twin, through the fused head and through full logits; counts; extreme inputs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.config.schema import Divergence, HardLabels, LossConfig
from pipeline.core.topk import hybrid, label_smoothed, sampled, top_k_and_entropy
from pipeline.core.types import Batch, InputError
from pipeline.objective.class_prior import harden, updated_thresholds
from pipeline.objective.divergences import (
    DIVERGENCES,
    NEEDS_EXACT_TAIL,
    divergence_by_name,
    forward_kl,
    jsd,
    reverse_kl,
    weighted_forward_kl,
)
from pipeline.objective.fused_head import combined_loss, sum_names
from pipeline.objective.gates import Gate
from pipeline.objective.position_groups import kd_of_logits
from pipeline.objective.terms import HARD_LABELS, TERMS, StepInputs, TermOptions, count_positions, term_positions
from support.twin import IdentityHead, make_batch, twin, value_at

TEMPERATURES = (0.5, 1.0, 2.0)
ALL = ("gold", "corpus")


def test_options_name_exactly_the_terms_divergences_and_hard_labels_that_exist() -> None:
    loss = LossConfig()
    names = [field.name for field in dataclasses.fields(loss)]
    assert list(TERMS) == [name for name in names if hasattr(getattr(loss, name), "weight")]
    assert list(DIVERGENCES) == [choice.name for choice in Divergence]
    assert list(HARD_LABELS) == [choice.name for choice in HardLabels]
    defaults = TermOptions(on=())
    assert defaults.take in HARD_LABELS
    assert defaults.divergence in DIVERGENCES


def ours(
    logits_NV: Tensor,
    batch: Batch,
    terms: dict[str, TermOptions],
    factors: dict[str, float],
    *,
    fused: bool,
    **more: Any,
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """(loss, gradient on the logits, sums)."""
    leaf = logits_NV.float().detach().clone().requires_grad_()
    vocabulary = logits_NV.shape[1]
    model = IdentityHead(vocabulary)
    loss, sums = combined_loss(
        model, leaf, batch, terms, StepInputs(coefficients=factors, **more), vocabulary_size=vocabulary, fused=fused
    )
    loss.backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad, dict(zip(sum_names(terms), sums.tolist(), strict=True))


def exact(
    logits_NV: Tensor, batch: Batch, terms: dict[str, TermOptions], factors: dict[str, float]
) -> tuple[Tensor, Tensor]:
    leaf = logits_NV.double().detach().requires_grad_()
    positions = {
        name: term_positions(batch, name, options).nonzero().flatten().tolist() for name, options in terms.items()
    }
    value = twin(leaf, batch, positions, terms, factors)
    value.backward()
    assert leaf.grad is not None
    return value.detach(), leaf.grad


def close(ours: Tensor, exact: Tensor, *, relative: float = 1e-5) -> bool:
    if exact.numel() == 0:
        return ours.shape == exact.shape
    scale = exact.abs().max().clamp(min=1.0)
    return bool((ours.double() - exact.double()).abs().max() <= relative * scale)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@settings(deadline=None, max_examples=12)
@given(
    num=st.integers(1, 6),
    vocabulary=st.integers(2, 30),
    k=st.integers(1, 30),
    seed=st.integers(0, 10_000),
    scale=st.sampled_from([0.1, 1.0, 4.0]),
    beta=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
)
def test_every_divergence_at_every_temperature_against_the_twin(
    divergence: str,
    temperature: float,
    fused: bool,
    num: int,
    vocabulary: int,
    k: int,
    seed: int,
    scale: float,
    beta: float,
) -> None:
    batch = make_batch(
        num_gold=0, num_corpus=num, vocabulary=vocabulary, k=k, temperatures=TEMPERATURES, scale=scale, seed=seed
    )
    options = TermOptions(on=("corpus",), temperature=temperature, divergence=divergence, beta=beta)
    logits_NV = torch.randn(num, vocabulary, generator=torch.Generator().manual_seed(seed + 1)) * scale
    value, grad, _ = ours(logits_NV, batch, {"kd": options}, {"kd": 1.0}, fused=fused)
    expected, expected_grad = exact(logits_NV, batch, {"kd": options}, {"kd": 1.0})
    assert close(value, expected)
    assert close(grad, expected_grad)
    if divergence not in ("truncated", "renormalised"):
        assert value >= -1e-5 * num


@pytest.mark.parametrize("fused", [True, False])
@settings(deadline=None, max_examples=25)
@given(
    k=st.integers(1, 20),
    seed=st.integers(0, 10_000),
    scale=st.sampled_from([0.1, 1.0, 4.0]),
    temperature=st.sampled_from(TEMPERATURES),
    tail_weight=st.sampled_from([0.0, 0.3, 4.0]),
)
def test_head_and_tail_apart_against_the_twin(
    fused: bool, k: int, seed: int, scale: float, temperature: float, tail_weight: float
) -> None:
    """With k of the whole vocabulary, 20, there is no tail, and both masses are 1."""
    batch = make_batch(num_gold=0, num_corpus=4, vocabulary=20, k=k, temperatures=TEMPERATURES, scale=scale, seed=seed)
    options = TermOptions(on=("corpus",), temperature=temperature, tail_weight=tail_weight)
    logits_NV = torch.randn(4, 20, generator=torch.Generator().manual_seed(seed + 1)) * scale
    value, grad, _ = ours(logits_NV, batch, {"kd": options}, {"kd": 1.0}, fused=fused)
    expected, expected_grad = exact(logits_NV, batch, {"kd": options}, {"kd": 1.0})
    assert close(value, expected)
    assert close(grad, expected_grad)


@given(seed=st.integers(0, 1000), tail_weight=st.floats(0.0, 8.0))
@settings(deadline=None, max_examples=30)
def test_the_gradient_of_head_and_tail_is_the_formula(seed: int, tail_weight: float) -> None:
    """On a kept logit q - p + (w - 1) (Q - P) q / Q, on one of the tail w q (P - Q) / (1 - Q), against autograd."""
    generator = torch.Generator().manual_seed(seed)
    p_NV = torch.randn(5, 12, generator=generator, dtype=torch.float64).softmax(1)
    z_NV = (2 * torch.randn(5, 12, generator=generator, dtype=torch.float64)).requires_grad_()

    def categories(log_p_NV: Tensor) -> Tensor:  # the first 4 tokens are the kept entries
        return torch.cat([log_p_NV[:, :4], log_p_NV[:, 4:].logsumexp(1, keepdim=True)], dim=1)

    log_p_NC, log_q_NC = categories(p_NV.log()), categories(z_NV.log_softmax(1))
    value_N = weighted_forward_kl(log_p_NC, log_q_NC, tail_weight=tail_weight)
    (grad_NV,) = torch.autograd.grad(value_N.sum(), z_NV)
    q_NV = z_NV.detach().softmax(1)
    P_N1, Q_N1 = p_NV[:, :4].sum(1, keepdim=True), q_NV[:, :4].sum(1, keepdim=True)
    on_kept_NK = (q_NV - p_NV)[:, :4] + (tail_weight - 1) * (Q_N1 - P_N1) * q_NV[:, :4] / Q_N1
    on_tail = tail_weight * q_NV[:, 4:] * (P_N1 - Q_N1) / (1 - Q_N1)
    torch.testing.assert_close(grad_NV, torch.cat([on_kept_NK, on_tail], dim=1))
    exact_N = forward_kl(log_p_NC, log_q_NC)
    torch.testing.assert_close(weighted_forward_kl(log_p_NC, log_q_NC, tail_weight=1.0), exact_N, rtol=0, atol=0)
    assert divergence_by_name("forward_kl", beta=0.5) is forward_kl


@pytest.mark.parametrize("fused", [True, False])
@settings(deadline=None, max_examples=40)
@given(
    num_gold=st.integers(0, 4),
    num_corpus=st.integers(0, 5),
    vocabulary=st.integers(2, 25),
    known=st.sampled_from([0.0, 0.5, 1.0]),
    gold_is_captured=st.booleans(),
    names=st.sets(st.sampled_from(list(TERMS)), min_size=1),
    on=st.sampled_from([ALL, ("gold",), ("corpus",)]),
    temperature=st.sampled_from([1.0, 2.0]),
    take=st.sampled_from(["generated", "likeliest"]),
    gate=st.sampled_from([Gate(), Gate(min_confidence=0.2), Gate(max_entropy=2.0), Gate(drop_wrong=True)]),
    seed=st.integers(0, 10_000),
)
def test_any_mix_of_terms_masks_and_gates_against_the_twin(
    fused: bool,
    num_gold: int,
    num_corpus: int,
    vocabulary: int,
    known: float,
    gold_is_captured: bool,
    names: set[str],
    on: tuple[str, ...],
    temperature: float,
    take: str,
    gate: Gate,
    seed: int,
) -> None:
    sizes = {"num_gold": num_gold, "num_corpus": num_corpus, "vocabulary": vocabulary, "seed": seed}
    batch = make_batch(**sizes, known=known, gold_is_captured=gold_is_captured, scale=2.0)
    terms = {
        name: TermOptions(on=on, temperature=temperature if name == "kd" else 1.0, take=take, gate=gate)
        for name in sorted(names)
    }
    factors = {name: 0.3 + i for i, name in enumerate(terms)}
    logits_NV = torch.randn(num_gold + num_corpus, vocabulary, generator=torch.Generator().manual_seed(seed + 1)) * 2
    for diagnose in (False, True):
        value, grad, sums = ours(logits_NV, batch, terms, factors, fused=fused, diagnose=diagnose)
        expected, expected_grad = exact(logits_NV, batch, terms, factors)
        assert close(value, expected)
        assert close(grad, expected_grad)
        total = sum(factors[name] * sums[name] for name in terms)
        assert abs(total - float(expected)) <= 1e-5 * max(abs(float(expected)), 1.0)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", ["sampled", "hybrid"])
@pytest.mark.parametrize("divergence", [name for name in DIVERGENCES if name not in NEEDS_EXACT_TAIL])
def test_drawn_targets_against_the_twin(kind: str, divergence: str, fused: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    teacher_NV = torch.randn(6, 25, generator=generator)
    uniforms_ND = torch.rand(6, 9, dtype=torch.float64, generator=generator)
    if kind == "sampled":
        top = sampled(teacher_NV, uniforms_ND=uniforms_ND)
    else:
        top = hybrid(teacher_NV, k=4, uniforms_ND=uniforms_ND)
    batch = make_batch(num_gold=0, num_corpus=6, vocabulary=25, top=top)
    options = {"kd": TermOptions(on=("corpus",), divergence=divergence)}
    logits_NV = torch.randn(6, 25, generator=generator)
    value, grad, _ = ours(logits_NV, batch, options, {"kd": 1.0}, fused=fused)
    expected, expected_grad = exact(logits_NV, batch, options, {"kd": 1.0})
    assert close(value, expected)
    assert close(grad, expected_grad)


@pytest.mark.parametrize("kind", ["sampled", "hybrid"])
def test_the_mean_gradient_over_many_draws_is_the_dense_one(kind: str) -> None:
    """Each logit's mean gradient over 20,000 captures within 5 standard errors of q - p."""
    generator = torch.Generator().manual_seed(3)
    teacher_1V, student_1V = (torch.randn(1, 10, generator=generator) * scale for scale in (2.0, 1.0))
    repeats = 20_000
    uniforms_ND = torch.rand(repeats, 6, generator=generator, dtype=torch.float64)
    many_NV = teacher_1V.expand(repeats, -1)
    top = sampled(many_NV, uniforms_ND=uniforms_ND)
    if kind == "hybrid":
        top = hybrid(many_NV, k=2, uniforms_ND=uniforms_ND)
    batch = make_batch(num_gold=0, num_corpus=repeats, vocabulary=10, top=top)
    terms = {"kd": TermOptions(on=("corpus",))}
    _, grad_NV, _ = ours(student_1V.expand(repeats, -1), batch, terms, {"kd": 1.0}, fused=True)
    exact_V = (torch.softmax(student_1V.double(), 1) - torch.softmax(teacher_1V.double(), 1))[0]
    standard_error_V = grad_NV.double().std(dim=0) / repeats**0.5
    assert ((grad_NV.double().mean(dim=0) - exact_V).abs() <= 5 * standard_error_V + 1e-3).all()


# ---------------------------------------------------------------------------------------- known cases


def test_k_equal_to_the_vocabulary_is_dense_kl() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher_NV, student_NV = (torch.randn(7, 50, generator=generator) for _ in range(2))
    top = top_k_and_entropy(teacher_NV, k=50, temperatures=(1.0,))[0]
    value = kd_of_logits(student_NV, top, TermOptions(on=())).item()
    stored_NV = torch.zeros_like(teacher_NV).scatter(1, top.ids_NK, top.relative_logits_NK.float())
    # stored logits are fp16: 2**-11 of the spread
    for dense_NV, tolerance in ((teacher_NV, {"abs": 1e-2}), (stored_NV, {"rel": 1e-5})):
        dense = torch.nn.functional.kl_div(
            student_NV.double().log_softmax(1), dense_NV.double().log_softmax(1), log_target=True, reduction="sum"
        )
        assert value == pytest.approx(dense.item(), **tolerance)


@pytest.mark.parametrize("divergence", [name for name in DIVERGENCES if name not in ("renormalised", "truncated")])
def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient(divergence: str) -> None:
    logits_NV = torch.randn(4, 40, generator=torch.Generator().manual_seed(1))
    logits_NV = (logits_NV - logits_NV.max(1, keepdim=True).values).half().float()
    batch = make_batch(
        num_gold=0, num_corpus=4, vocabulary=40, top=top_k_and_entropy(logits_NV, k=8, temperatures=(1.0,))[0]
    )
    options = {"kd": TermOptions(on=("corpus",), divergence=divergence)}
    value, grad, sums = ours(logits_NV, batch, options, {"kd": 1.0}, fused=True, diagnose=True)
    assert value.abs() < 1e-5
    assert divergence == "total_variation" or grad.abs().max() < 1e-6
    assert sums["agreement"] == 4


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_gradient_equals_the_closed_form(temperature: float) -> None:
    """On K: (q - p)/T; on the tail: q (P - Q)/(1 - Q)/T."""
    batch = make_batch(num_gold=0, num_corpus=5, vocabulary=20, k=6, temperatures=TEMPERATURES)
    assert batch.teacher is not None
    top = batch.teacher
    logits_NV = torch.randn(5, 20)
    options = {"kd": TermOptions(on=("corpus",), temperature=temperature, temperature_squared=False)}
    _, grad, _ = ours(logits_NV, batch, options, {"kd": 1.0}, fused=True)
    q_NV = torch.softmax(logits_NV.double() / temperature, 1)
    relative_NK = top.relative_logits_NK.double() / temperature
    column = top.temperatures.index(temperature)
    z_N = torch.logaddexp(torch.logsumexp(relative_NK, 1), top.log_tail_NC[:, column].double())
    p_NK = (relative_NK - z_N[:, None]).exp()
    P, Q = p_NK.sum(1, keepdim=True), q_NV.gather(1, top.ids_NK).sum(1, keepdim=True)
    expected = (q_NV * (P - Q) / (1 - Q)).scatter(1, top.ids_NK, q_NV.gather(1, top.ids_NK) - p_NK) / temperature
    assert close(grad, expected)


@pytest.mark.parametrize(("squared", "factor"), [(True, 4.0), (False, 1.0)])
def test_temperature_squared_multiplies_the_value_and_its_gradient(squared: bool, factor: float) -> None:
    """Against the twin without the factor: a term that ignored the option would fail one of the two cases."""
    batch, logits_NV = make_batch(num_gold=0, num_corpus=6), torch.randn(6, 30)
    options = TermOptions(on=("corpus",), temperature=2.0, temperature_squared=squared)
    value, grad, _ = ours(logits_NV, batch, {"kd": options}, {"kd": 1.0}, fused=True)
    not_squared = dataclasses.replace(options, temperature_squared=False)
    expected, expected_grad = exact(logits_NV, batch, {"kd": not_squared}, {"kd": 1.0})
    assert close(value, factor * expected)
    assert close(grad, factor * expected_grad)


def test_jsd_tends_to_both_divergences_at_its_ends() -> None:
    generator = torch.Generator().manual_seed(2)
    log_p, log_q = (torch.randn(5, 9, dtype=torch.float64, generator=generator).log_softmax(1) for _ in range(2))
    for small in (1e-4, 1e-6):
        near_forward, near_reverse = jsd(log_p, log_q, beta=small) / small, jsd(log_p, log_q, beta=1 - small) / small
        assert torch.allclose(near_forward, forward_kl(log_p, log_q), rtol=20 * small)
        assert torch.allclose(near_reverse, reverse_kl(log_p, log_q), rtol=20 * small)
    assert torch.equal(jsd(log_p, log_q, beta=0.0), forward_kl(log_p, log_q))
    assert torch.equal(jsd(log_p, log_q, beta=1.0), reverse_kl(log_p, log_q))


def test_truncated_may_be_negative_and_is_not_clamped() -> None:
    top = top_k_and_entropy(torch.tensor([[3.0, 2.0, 2.9, 2.8]]), k=1, temperatures=(1.0,))[0]
    student_NV = torch.tensor([[9.0, 0.0, 0.0, 0.0]])
    assert kd_of_logits(student_NV, top, TermOptions(on=(), divergence="truncated")) < -0.1


EXTREMES = {
    "one-hot teacher": (torch.tensor([[0.0, -1e4, -1e4, -1e4, -1e4]]), torch.randn(1, 5)),
    "ties": (torch.zeros(1, 5), torch.zeros(1, 5)),
    "-inf teacher": (torch.tensor([[1.0, 0.5, -torch.inf, -torch.inf, -torch.inf]]), torch.randn(1, 5)),
    "tiny tail": (torch.tensor([[0.0, -1.0, -28.0, -28.0, -28.0]]), torch.randn(1, 5)),
    "certain student": (torch.randn(1, 5), torch.tensor([[80.0, 0.0, 0.0, 0.0, 0.0]])),
    "student beyond fp32's exp": (torch.randn(1, 5), torch.tensor([[300.0, 0.0, 0.0, -200.0, 0.0]])),
    "student tail of 1e-12": (torch.randn(1, 5), torch.tensor([[0.0, 0.0, -28.0, -28.0, -28.0]])),
    "both certain, of different things": (torch.tensor([[0.0, 90.0, 0, 0, 0]]), torch.tensor([[90.0, 0.0, 0, 0, 0]])),
}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", EXTREMES)
@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_extremes_are_finite_and_never_negative(name: str, k: int, divergence: str, fused: bool) -> None:
    teacher_NV, student_NV = EXTREMES[name]
    top = top_k_and_entropy(teacher_NV, k=k, temperatures=TEMPERATURES)[0]
    batch = make_batch(num_gold=0, num_corpus=1, vocabulary=5, top=top, known=1.0)
    for temperature in TEMPERATURES:
        terms = {"kd": TermOptions(on=("corpus",), temperature=temperature, divergence=divergence)}
        terms["lm"] = terms["confidence"] = TermOptions(on=ALL)
        factors = {"kd": 1.0, "lm": 0.5, "confidence": 0.25}
        value, grad, sums = ours(student_NV, batch, terms, factors, fused=fused, diagnose=True)
        assert torch.isfinite(value)
        assert torch.isfinite(grad).all()
        assert all(torch.isfinite(torch.tensor(list(sums.values()))))
        assert divergence in ("renormalised", "truncated") or sums["kd"] >= -1e-5


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("num_gold", "num_corpus"), [(0, 0), (3, 0), (0, 3)])
def test_a_batch_without_gold_or_without_corpus(num_gold: int, num_corpus: int, fused: bool) -> None:
    batch = make_batch(num_gold=num_gold, num_corpus=num_corpus)
    terms = {"lm": TermOptions(on=("gold",)), "kd": TermOptions(on=("corpus",), temperature=2.0)}
    hidden_NH, model = torch.randn(num_gold + num_corpus, 30, requires_grad=True), IdentityHead(30)
    assert count_positions(batch, terms).tolist() == [num_gold, num_corpus]
    loss, sums = combined_loss(
        model, hidden_NH, batch, terms, StepInputs(coefficients={"lm": 1.0, "kd": 1.0}), vocabulary_size=30, fused=fused
    )
    loss.backward()
    # a rank where a parameter has no gradient would leave its all-reduce out, and the other ranks would wait
    assert model.head.weight.grad is not None
    assert hidden_NH.grad is not None
    assert torch.isfinite(model.head.weight.grad).all()
    assert torch.isfinite(sums).all()


def test_the_gradient_scales_with_a_factor_on_the_loss() -> None:
    batch, model = make_batch(num_gold=2, num_corpus=2), IdentityHead(30)
    hidden_NH = torch.randn(4, 30, requires_grad=True)
    terms, factors = {"lm": TermOptions(on=("gold",))}, {"lm": 1.0}
    grads = []
    for factor in (1.0, 3.0):
        hidden_NH.grad = model.head.weight.grad = None
        loss, _ = combined_loss(model, hidden_NH, batch, terms, StepInputs(coefficients=factors), vocabulary_size=30)
        (factor * loss).backward()
        grads.append((hidden_NH.grad, model.head.weight.grad))
    for grad, grad_of_triple in zip(*grads, strict=True):
        assert grad.abs().max() > 0
        assert torch.allclose(3.0 * grad, grad_of_triple)


# ----------------------------------------------------------------------------------- the choice setting


@pytest.mark.parametrize("fused", [True, False])
def test_thresholds_bring_each_class_to_its_prior(fused: bool) -> None:
    """A student that prefers one class predicts each as often as the teacher does, after a few updates."""
    generator = torch.Generator().manual_seed(0)
    student_NV, teacher_NV = torch.randn(400, 30, generator=generator), torch.randn(400, 30, generator=generator)
    student_NV[:, 4] += 3.0  # prefers class 4
    student_NV[:, 9] += 9.0  # larger still, but not a class
    teacher_NV[:, [2, 4, 7]] += torch.tensor([5.0, 4.0, 4.5])
    top = top_k_and_entropy(teacher_NV, k=8, temperatures=(1.0,))[0]
    batch = make_batch(num_gold=0, num_corpus=400, top=top)
    terms = {"confidence": TermOptions(on=("corpus",), class_ids=(2, 4, 7))}
    thresholds: tuple[float, ...] = (0.0, 0.0, 0.0)
    for step in range(20):
        _, _, sums = ours(student_NV, batch, terms, {"confidence": 1.0}, fused=fused, thresholds=thresholds)
        own = [sums[f"student_class_{token}"] / 400 for token in (2, 4, 7)]
        teacher = [sums[f"teacher_class_{token}"] / 400 for token in (2, 4, 7)]
        assert sum(own) == pytest.approx(1.0)
        assert sum(teacher) == pytest.approx(1.0, abs=1e-4)
        if step == 0:
            assert own[1] > teacher[1] + 0.3
        thresholds = updated_thresholds(thresholds, own=own, teacher=teacher)
    assert own == pytest.approx(teacher, abs=0.02)
    value, grad, _ = ours(student_NV, batch, terms, {"confidence": 1.0}, fused=fused, thresholds=thresholds)
    leaf = student_NV.double().clone().requires_grad_()
    predicted_N = harden(student_NV, (2, 4, 7), thresholds)
    expected = torch.nn.functional.cross_entropy(leaf, predicted_N, reduction="sum")
    expected.backward()
    assert leaf.grad is not None
    assert close(value, expected.detach())
    assert close(grad, leaf.grad)


# ------------------------------------------------------------------------------- weights of positions


@pytest.mark.parametrize("fused", [True, False])
def test_weights_are_those_of_the_terms_that_read_the_teacher(fused: bool) -> None:
    """Value, gradient and count of each term, and what the diagnostics divide by the count of kd."""
    batch = make_batch(num_gold=4, num_corpus=30, known=0.5, seed=2)
    weights_N = torch.rand(34, generator=torch.Generator().manual_seed(1))
    batch = with_fields(batch, weights_N=weights_N)
    logits_NV = torch.randn(34, 30, generator=torch.Generator().manual_seed(3)).double()
    terms = {name: TermOptions(on=ALL) for name in TERMS}
    counts = dict(zip(terms, count_positions(batch, terms).tolist(), strict=True))
    _, _, sums = ours(logits_NV, batch, terms, dict.fromkeys(terms, 1.0), fused=fused, diagnose=True)
    for name, options in terms.items():
        leaf, factors_N = logits_NV.clone().requires_grad_(), torch.ones(34) if name == "lm" else weights_N
        positions = [int(n) for n in term_positions(batch, name, options).nonzero()]
        expected = sum(float(factors_N[n]) * value_at(name, leaf[n], batch, n, options) for n in positions)
        expected.backward()
        value, grad, _ = ours(logits_NV, batch, {name: options}, {name: 1.0}, fused=fused)
        assert close(value, expected.detach()), name
        assert close(grad, leaf.grad), name
        assert sums[name] == pytest.approx(float(expected.detach()), rel=1e-5)
        assert counts[name] == pytest.approx(float(factors_N[positions].double().sum()), rel=1e-12)
    assert sums["kd_at_T1"] == pytest.approx(sums["kd"], rel=1e-6)
    is_same_N = logits_NV.argmax(1)[batch.weak_N] == batch.teacher.ids_NK[:, 0]
    assert sums["agreement"] == pytest.approx(float(weights_N[batch.weak_N][is_same_N].sum()), abs=1e-6)


def test_a_position_inside_a_choice_is_hardened_to_any_token() -> None:
    """Only right after the prompt the first tokens of the choices are the candidates, and their frequency counts."""
    logits_NV = torch.zeros(4, 30)
    logits_NV[:, 9], logits_NV[:, 4] = 3.0, 1.0  # 9 is no class
    for fused in (True, False):
        batch = with_fields(make_batch(num_gold=0, num_corpus=4), depths_N=torch.tensor([0, 1, 2, 0]))
        terms = {"confidence": TermOptions(on=("corpus",), class_ids=(2, 4, 7))}
        value, _, sums = ours(logits_NV, batch, terms, {"confidence": 1.0}, fused=fused, thresholds=(0.0,) * 3)
        log_q_V = torch.log_softmax(logits_NV[0], 0)
        assert close(value, -2 * (log_q_V[4] + log_q_V[9]).double())
        assert [sums[f"student_class_{token}"] for token in (2, 4, 7)] == [0, 2, 0]
        assert sum(sums[f"teacher_class_{token}"] for token in (2, 4, 7)) == pytest.approx(2)


# --------------------------------------------------------------------------------- gates and controls


def test_each_condition_of_a_gate_selects_its_positions() -> None:
    teacher_MV = torch.tensor([[9.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 5.0, 0.0]])
    top = top_k_and_entropy(teacher_MV, k=2, temperatures=(1.0,))[0]
    batch = make_batch(num_gold=0, num_corpus=3, vocabulary=3, top=top)
    entropy_M = torch.special.entr(torch.softmax(teacher_MV, 1)).sum(1)
    batch = with_fields(batch, entropy_M=entropy_M, target_ids_N=torch.tensor([0, -100, 2]))

    def passed(**settings: Any) -> list[bool]:
        return term_positions(batch, "kd", TermOptions(on=("corpus",), gate=Gate(**settings))).tolist()

    assert passed() == [True, True, True]
    assert passed(min_confidence=0.5) == [True, False, True]
    assert passed(max_entropy=0.01) == [True, False, False]
    assert passed(drop_wrong=True) == [True, True, False]
    unknown = with_fields(batch, entropy_M=torch.full((3,), torch.nan))
    with pytest.raises(InputError, match="expected the teacher's entropy at every position"):
        term_positions(unknown, "kd", TermOptions(on=("corpus",), gate=Gate(max_entropy=1.0)))


def with_fields(batch: Batch, **fields: Any) -> Batch:
    return Batch(**{name: getattr(batch, name) for name in batch.__slots__} | fields)


@pytest.mark.parametrize("vocabulary", [5, 49_152])
def test_smoothing_keeps_the_most_likely_token_and_the_entropy(vocabulary: int) -> None:
    teacher_NV = torch.randn(6, vocabulary, generator=torch.Generator().manual_seed(0)) * 3
    entropy_N = torch.special.entr(torch.softmax(teacher_NV.double(), 1)).sum(1)
    top = top_k_and_entropy(teacher_NV, k=4, temperatures=TEMPERATURES)[0]
    smooth = label_smoothed(top, entropy_N.float(), vocabulary_size=vocabulary)
    relative_N = smooth.relative_logits_NK[:, 1].double()
    for c, T in enumerate(TEMPERATURES):
        dense_NV = (relative_N[:, None] / T).expand(-1, vocabulary).clone()
        dense_NV[:, 0] = 0.0
        tail_N = torch.logsumexp(dense_NV[:, 4:], 1)
        assert torch.allclose(smooth.log_tail_NC[:, c].double(), tail_N, atol=1e-5)
        if T == 1.0:
            p_NV = torch.softmax(dense_NV, 1)
            assert torch.allclose(torch.special.entr(p_NV).sum(1), entropy_N, atol=1e-4)
    assert torch.equal(smooth.ids_NK, top.ids_NK)


# --------------------------------------------------------------------------------------- diagnostics


def test_diagnostics_equal_those_of_the_dense_gradients() -> None:
    for temperature in (1.0, 2.0):
        batch = make_batch(num_gold=0, num_corpus=40, known=1.0, scale=3.0, seed=4)
        assert batch.teacher is not None
        logits_NV = torch.randn(40, 30, generator=torch.Generator().manual_seed(9))
        terms = {"lm": TermOptions(on=ALL), "kd": TermOptions(on=ALL, temperature=temperature)}
        dense = {name: exact(logits_NV, batch, {name: terms[name]}, {name: 1.0})[1] for name in terms}
        is_right_N = batch.teacher.ids_NK[:, 0] == batch.target_ids_N
        assert 0 < is_right_N.sum() < 40
        for fused in (True, False):
            _, _, sums = ours(logits_NV, batch, terms, {"lm": 1.0, "kd": 1.0}, fused=fused, diagnose=True)
            for side, mask_N in (("right", is_right_N), ("wrong", ~is_right_N)):
                expected = {
                    "count": mask_N.sum(),
                    "dot": (dense["lm"] * dense["kd"]).sum(1)[mask_N].sum(),
                    "lm_square": dense["lm"].square().sum(1)[mask_N].sum(),
                    "kd_square": dense["kd"].square().sum(1)[mask_N].sum(),
                }
                for name, value in expected.items():
                    assert sums[f"{name}_{side}"] == pytest.approx(float(value), rel=1e-4, abs=1e-5), (name, side)
            assert sums["lm_square"] == pytest.approx(float(dense["lm"].square().sum()), rel=1e-4)
            assert sums["agreement"] == (logits_NV.argmax(1) == batch.teacher.ids_NK[:, 0]).sum()
            at_one = exact(logits_NV, batch, {"kd": TermOptions(on=ALL)}, {"kd": 1.0})[0]
            assert sums["kd_at_T1"] == pytest.approx(float(at_one), rel=1e-4)
