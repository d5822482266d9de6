"""Trust in the teacher: its measures against dense sums, thresholds by class, and position weights in S and N alike."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.config.schema import GateBy, WeightBy
from pipeline.core.topk import top_k_and_entropy
from pipeline.core.types import Batch, InputError, TopK
from pipeline.objective.fused_head import combined_loss, sum_names
from pipeline.objective.gates import Gate, Thresholds, class_thresholds, reaches
from pipeline.objective.terms import StepInputs, TermOptions, count_positions, term_positions
from pipeline.objective.trust import (
    FEATURES,
    LARGEST_FEATURE,
    PositionWeight,
    TrustScore,
    features,
    measure,
    trust,
    weighted,
)
from support.twin import IdentityHead, make_batch, teacher_at, value_at

MEASURES = ("confidence", "entropy", "margin", "learnt")
SCORE = TrustScore(
    features=FEATURES,
    means=(0.3, 1.0, -1.0, 2.0),
    scales=(1.0, 2.0, 0.5, 1.5),
    weights=(0.7, -0.2, 0.1, -0.9),
    bias=0.4,
)
NO_CLASSES = {"classes_L": torch.zeros(0, dtype=torch.int64), "least_L": torch.zeros(0, dtype=torch.float64)}


def test_options_name_exactly_the_measures_that_exist() -> None:
    assert tuple(choice.name for choice in GateBy) == MEASURES
    assert tuple(choice.name for choice in WeightBy) == ("none", *MEASURES)


def trust_at(by: str, top: TopK, entropy_N: Tensor, n: int) -> float:
    """Trust at one position by the textbook formulas, from the probabilities of the kept tokens and the tail."""
    kept, tail = teacher_at(top, n, 1.0)
    first, *others = sorted(kept.values(), reverse=True)
    second, entropy = (others[0] if others else min(first, tail)), float(entropy_N[n])
    if by == "confidence":
        return first
    if by == "entropy":
        return math.exp(-entropy)
    if by == "margin":
        return 1 - second / first
    rest = sum(others) + tail
    infinite = math.inf
    x = (
        math.log(first / rest) if rest else infinite,
        math.log(first / second) if second else infinite,
        math.log(first),
        entropy,
    )
    terms = zip(x, SCORE.means, SCORE.scales, SCORE.weights, strict=True)
    z = SCORE.bias + sum(w * (min(value, LARGEST_FEATURE) - mean) / scale for value, mean, scale, w in terms)
    return 1 / (1 + math.exp(-z))


@pytest.mark.parametrize("by", MEASURES)
@settings(deadline=None, max_examples=25)
@given(
    num=st.integers(1, 6),
    vocabulary=st.integers(2, 20),
    k=st.integers(1, 20),
    scale=st.sampled_from([0.1, 2.0, 12.0]),
    seed=st.integers(0, 10_000),
)
def test_trust_against_dense_probabilities(by: str, num: int, vocabulary: int, k: int, scale: float, seed: int) -> None:
    batch = make_batch(num_gold=0, num_corpus=num, vocabulary=vocabulary, k=k, scale=scale, seed=seed)
    assert batch.teacher is not None
    assert batch.entropy_M is not None
    found_N = trust(by, batch.teacher, batch.entropy_M, SCORE)
    expected = [trust_at(by, batch.teacher, batch.entropy_M, n) for n in range(num)]
    assert found_N.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert found_N.min() >= 0
    assert found_N.max() <= 1


def test_padding_is_no_second_token_and_a_single_token_has_finite_features() -> None:
    """A pool may keep one token at a position: the tail bounds the second; a sampled position may have no tail."""
    top = TopK(
        ids_NK=torch.tensor([[3, 3], [3, 3]]),
        relative_logits_NK=torch.tensor([[0.0, -math.inf], [0.0, -math.inf]]).half(),
        log_tail_NC=torch.tensor([[-1.0], [-math.inf]]),
        temperatures=(1.0,),
    )
    unknown_N = torch.full((2,), torch.nan)
    assert trust("margin", top, unknown_N).tolist() == pytest.approx([1 - math.exp(-1.0), 1.0])
    assert features(top, unknown_N)[:, :3].isfinite().all()
    for by in ("entropy", "learnt"):
        with pytest.raises(InputError, match="expected the teacher's entropy at every position"):
            trust(by, top, unknown_N, SCORE)
    without = dataclasses.replace(
        SCORE, **{name: getattr(SCORE, name)[:3] for name in ("features", "means", "scales", "weights")}
    )
    assert trust("learnt", top, unknown_N, without).isfinite().all()


# --------------------------------------------------------------------------------------- thresholds


@settings(deadline=None, max_examples=60)
@given(
    pairs=st.lists(st.tuples(st.integers(0, 6), st.sampled_from([0, 3, 7, 49_000])), min_size=1, max_size=40),
    keep_fraction=st.sampled_from([0.01, 0.3, 0.5, 0.8, 0.99]),
)
def test_class_thresholds_keep_the_surest_of_each_class(pairs: list[tuple[int, int]], keep_fraction: float) -> None:
    """Against sorted lists; values with ties. What is equal to the last one kept is kept with it."""
    values_N = torch.tensor([float(value) for value, _ in pairs], dtype=torch.float64)
    classes_N = torch.tensor([one for _, one in pairs], dtype=torch.int32)
    classes_L, least_L = class_thresholds(values_N, classes_N, keep_fraction)
    assert classes_L.tolist() == sorted({one for _, one in pairs})
    for one, least in zip(classes_L.tolist(), least_L.tolist(), strict=True):
        ordered = sorted((value for value, of in pairs if of == one), reverse=True)
        last = ordered[max(round(keep_fraction * len(ordered)), 1) - 1]
        assert [value for value in ordered if value >= least] == [value for value in ordered if value >= last]
        # a device may round otherwise: no value lies near the threshold
        assert all(abs(value - least) >= 0.5 for value in ordered)


def test_neighbours_and_infinite_values_have_thresholds_too() -> None:
    lower = torch.tensor(0.3, dtype=torch.float64)
    values_N = torch.stack([lower, torch.nextafter(lower, torch.tensor(1.0, dtype=torch.float64))])
    _, least_L = class_thresholds(values_N, torch.zeros(2).int(), 0.5)
    assert (values_N >= least_L).tolist() == [False, True]
    infinite_N = torch.tensor([math.inf, 2.0, math.inf, 1.0], dtype=torch.float64)
    for keep_fraction, kept in ((0.5, [True, False, True, False]), (0.75, [True, True, True, False])):
        _, least_L = class_thresholds(infinite_N, torch.zeros(4).int(), keep_fraction)
        assert (infinite_N >= least_L).tolist() == kept


def test_a_gate_by_class_keeps_a_class_that_a_plain_gate_drops() -> None:
    """Class 0 is sure everywhere, class 1 nowhere, class 2 was not in the cache: it has the threshold of all."""
    logits_NV = torch.zeros(7, 3)
    logits_NV[[0, 1, 2, 3], 0] = torch.tensor([9.0, 8.0, 7.0, 6.0])
    logits_NV[[4, 5], 1] = torch.tensor([2.0, 1.0])
    logits_NV[6, 2] = 7.5
    batch = make_batch(
        num_gold=0, num_corpus=7, vocabulary=3, top=top_k_and_entropy(logits_NV, k=2, temperatures=(1.0,))[0]
    )
    assert batch.teacher is not None
    assert batch.entropy_M is not None
    entropy_M = torch.special.entr(torch.softmax(logits_NV, 1)).sum(1)
    batch = dataclasses.replace(batch, entropy_M=entropy_M)
    from_cache = batch.teacher.select(slice(0, 6))
    for by in ("confidence", "entropy", "margin"):
        values_N = torch.log(
            torch.tensor([trust_at(by, from_cache, entropy_M, n) for n in range(6)]).clamp(max=0.9999999)
        )
        order_N = logits_NV[:6].amax(dim=1).double()  # every measure orders as the logits do
        assert values_N.argsort().tolist() == order_N.argsort().tolist()
        plain = passed(batch, Gate(thresholds=thresholds_of(by, batch, by_class=False)))
        by_class = passed(batch, Gate(thresholds=thresholds_of(by, batch, by_class=True)))
        assert plain == [True, True, True, False, False, False, True]
        assert by_class == [True, True, False, False, True, False, True]
        both = passed(batch, Gate(min_confidence=0.9, thresholds=thresholds_of(by, batch, by_class=True)))
        assert both == [True, True, False, False, False, False, True]


def thresholds_of(by: str, batch: Batch, *, by_class: bool) -> Thresholds:
    """Half of the first six positions, the cache of the test above."""
    assert batch.teacher is not None
    assert batch.entropy_M is not None
    values_N = measure(by, batch.teacher, batch.entropy_M)[:6]
    least = float(class_thresholds(values_N, torch.zeros(6).int(), 0.5)[1])
    if not by_class:
        return Thresholds(by=by, least=least, **NO_CLASSES)
    classes_L, least_L = class_thresholds(values_N, batch.teacher.ids_NK[:6, 0], 0.5)
    return Thresholds(by=by, least=least, classes_L=classes_L, least_L=least_L)


def passed(batch: Batch, gate: Gate) -> list[bool]:
    return term_positions(batch, "kd", TermOptions(on=("corpus",), gate=gate)).tolist()


def test_gold_positions_of_other_widths_reach_what_they_reached_in_the_cache() -> None:
    """In a batch a position may be padded to more entries: its measure then differs in the last bits."""
    batch = make_batch(num_gold=0, num_corpus=200, vocabulary=40, k=7, scale=3.0)
    assert batch.teacher is not None
    assert batch.entropy_M is not None
    for by in MEASURES:
        values_N = measure(by, batch.teacher, batch.entropy_M, SCORE)
        classes_L, least_L = class_thresholds(values_N, batch.teacher.ids_NK[:, 0], 0.3)
        chosen = Thresholds(by=by, least=0.0, classes_L=classes_L, least_L=least_L, score=SCORE)
        kept_N = reaches(chosen, batch.teacher, batch.entropy_M)
        assert torch.equal(kept_N, reaches(chosen, batch.teacher.pad_to_width(33), batch.entropy_M))
        for one in classes_L.tolist():
            of_class_N = batch.teacher.ids_NK[:, 0] == one
            num = int(of_class_N.sum())
            assert int(kept_N[of_class_N].sum()) == max(round(0.3 * num), 1)


# --------------------------------------------------------------------------------- position weights


def loss_of(
    logits_NV: Tensor, batch: Batch, terms: dict[str, TermOptions], counts: dict[str, float], *, fused: bool
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """S / N of each term, added up, its gradient on the logits, and the sums."""
    leaf = logits_NV.float().clone().requires_grad_()
    inputs = StepInputs(coefficients={name: 1.0 / (counts[name] or 1.0) for name in terms}, diagnose=True)
    vocabulary = logits_NV.shape[1]
    loss, sums = combined_loss(
        IdentityHead(vocabulary), leaf, batch, terms, inputs, vocabulary_size=vocabulary, fused=fused
    )
    loss.backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad, dict(zip(sum_names(terms), sums.tolist(), strict=True))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("by", MEASURES)
@settings(deadline=None, max_examples=4)
@given(
    power=st.sampled_from([0.5, 1.0, 3.0]),
    temperature=st.sampled_from([1.0, 2.0]),
    gate=st.sampled_from([Gate(), Gate(min_confidence=0.2)]),
    seed=st.integers(0, 10_000),
)
def test_weighted_terms_against_the_twin_however_the_batch_is_split(
    by: str, fused: bool, power: float, temperature: float, gate: Gate, seed: int
) -> None:
    """sum w_n v_n / sum w_n in fp64, for the terms that read the teacher; lm keeps its plain mean."""
    batch = make_batch(num_gold=3, num_corpus=6, vocabulary=20, known=0.5, gold_is_captured=seed % 2 == 0, seed=seed)
    batch = dataclasses.replace(batch, weights_N=torch.linspace(0.2, 1.0, 9))  # those of a tree of choices stay
    logits_NV = torch.randn(9, 20, generator=torch.Generator().manual_seed(seed + 1)) * 2
    both = ("gold", "corpus")
    terms = {
        "lm": TermOptions(on=both),
        "kd": TermOptions(on=both, temperature=temperature, gate=gate),
        "hard": TermOptions(on=both, take="likeliest"),
        "confidence": TermOptions(on=both, gate=gate),
    }
    weight = PositionWeight(by=by, power=power, score=SCORE)

    exact_leaf = logits_NV.double().requires_grad_()
    expected, counts = torch.zeros((), dtype=torch.float64), {}
    for name, options in terms.items():
        positions = term_positions(batch, name, options).nonzero().flatten().tolist()
        w = {n: 1.0 if name == "lm" else float(batch.weights_N[n]) * trust_of(batch, n, by) ** power for n in positions}
        counts[name] = sum(w.values())
        total = sum((w[n] * value_at(name, exact_leaf[n], batch, n, options) for n in positions), start=expected * 0)
        expected = expected + total / (counts[name] or 1.0)
    expected.backward()
    assert exact_leaf.grad is not None

    whole = weighted(batch, weight)
    found = dict(zip(terms, count_positions(whole, terms).tolist(), strict=True))
    assert found == pytest.approx(counts, rel=1e-6)
    value, gradient, _ = loss_of(logits_NV, whole, terms, found, fused=fused)
    assert float(value) == pytest.approx(float(expected.detach()), rel=1e-5, abs=1e-6)
    assert torch.allclose(gradient.double(), exact_leaf.grad, rtol=1e-4, atol=1e-6)

    parts = [rows_of(batch, slice(0, 4)), rows_of(batch, slice(4, 5)), rows_of(batch, slice(5, 9))]
    split_counts = sum(count_positions(weighted(part, weight), terms) for part in parts)
    assert isinstance(split_counts, Tensor)
    assert split_counts.tolist() == pytest.approx(list(found.values()), rel=1e-12)
    by_part = [
        loss_of(logits_NV[rows], weighted(part, weight), terms, found, fused=fused)[1]
        for part, rows in zip(parts, (slice(0, 4), slice(4, 5), slice(5, 9)), strict=True)
    ]
    assert torch.allclose(torch.cat(by_part), gradient, rtol=1e-5, atol=1e-8)


def trust_of(batch: Batch, n: int, by: str) -> float:
    """Trust at the n-th supervised position of a batch."""
    assert batch.teacher is not None
    assert batch.entropy_M is not None
    return trust_at(by, batch.teacher, batch.entropy_M, int(batch.weak_N[:n].sum()))


def rows_of(batch: Batch, rows: slice) -> Batch:
    """The micro-batch of some positions."""
    assert batch.teacher is not None
    assert batch.entropy_M is not None
    num_before, num_until = int(batch.weak_N[: rows.start].sum()), int(batch.weak_N[: rows.stop].sum())
    of_teacher = slice(num_before, num_until)
    names = ("flat_positions_N", "target_ids_N", "gold_N", "weak_N", "weak_ids_N", "weights_N", "depths_N")
    return dataclasses.replace(
        batch,
        **{name: getattr(batch, name)[rows] for name in names},
        teacher=batch.teacher.select(of_teacher) if num_until > num_before else None,
        entropy_M=batch.entropy_M[of_teacher] if num_until > num_before else None,
    )


def test_without_weights_or_a_teacher_a_batch_is_itself() -> None:
    batch = make_batch(num_gold=2, num_corpus=3)
    assert weighted(batch, None) is batch
    gold = make_batch(num_gold=2, num_corpus=0)
    assert weighted(gold, PositionWeight(by="confidence", power=1.0)) is gold
    captured = weighted(batch, PositionWeight(by="confidence", power=1.0))
    assert (captured.weights_N[~batch.weak_N] == 1).all()
    assert (captured.weights_N[batch.weak_N] < 1).all()
    assert (batch.weights_N == 1).all()  # it is not changed in place
