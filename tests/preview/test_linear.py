"""Linear students against a slow twin: their optimum, their reduction, and what cross-fitting leaves out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.preview.linear import Lesson, choose_l2, cross_fitted, fit, fit_reduction


def positions(count: int, *, features: int = 6, outcomes: int = 4, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Features of very different sizes, soft targets, and weights of which some are 0."""
    generator = torch.Generator().manual_seed(seed)
    sizes_F = torch.logspace(1, -1, features, dtype=torch.float64)
    features_NF = torch.randn(count, features, generator=generator, dtype=torch.float64) * sizes_F
    targets_NC = torch.randn(count, outcomes, generator=generator, dtype=torch.float64).mul(2).softmax(dim=1)
    weights_N = torch.rand(count, generator=generator, dtype=torch.float64)
    weights_N[::5] = 0
    return features_NF, targets_NC, weights_N


def loss_of(features_NF: Tensor, targets_NC: Tensor, weights_N: Tensor, weight_FC: Tensor, bias_C: Tensor, l2: float):
    total = l2 / 2 * (weight_FC**2).sum()
    for x_F, p_C, weight in zip(features_NF, targets_NC, weights_N, strict=True):  # one position after the other
        total = total - weight * (p_C * torch.log_softmax(x_F @ weight_FC + bias_C, dim=0)).sum()
    return total


@pytest.mark.parametrize("l2", [1.0, 0.01])
def test_a_student_is_the_optimum_that_a_slow_twin_finds(l2: float) -> None:
    """Gradient descent by autograd on the function as it is written, for long; and the gradient is 0 (KKT)."""
    data = positions(30)
    found = fit(*data, l2=l2)
    weight_FC = found.weight_FC.clone().requires_grad_(True)
    bias_C = found.bias_C.clone().requires_grad_(True)
    loss_of(*data, weight_FC, bias_C, l2).backward()
    assert max(float(value.grad.abs().max()) for value in (weight_FC, bias_C)) < 1e-5
    assert found.gradient < 1e-5

    twin = [torch.zeros(6, 4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)]
    for value in twin:
        value.requires_grad_(True)
    optimizer = torch.optim.Adam(twin, lr=0.1)
    for step in range(1500):
        optimizer.param_groups[0]["lr"] = 0.1 * 0.995**step
        optimizer.zero_grad()
        weight_FC, bias_C = twin
        log_q_NC = torch.log_softmax(data[0] @ weight_FC + bias_C, dim=1)
        (l2 / 2 * weight_FC.square().sum() - (data[2] * (data[1] * log_q_NC).sum(dim=1)).sum()).backward()
        optimizer.step()
    with torch.no_grad():
        torch.testing.assert_close(
            found.log_probs(data[0]), torch.log_softmax(data[0] @ twin[0] + twin[1], 1), atol=2e-3, rtol=0
        )
        assert loss_of(*data, found.weight_FC, found.bias_C, l2) <= loss_of(*data, *twin, l2) + 1e-9


def test_it_does_not_depend_on_where_it_starts() -> None:
    features_NF, targets_NC, weights_N = positions(40)
    start = fit(features_NF, targets_NC.flip(1), weights_N, l2=0.1)
    cold, warm = (fit(features_NF, targets_NC, weights_N, l2=0.1, start=one) for one in (None, start))
    torch.testing.assert_close(warm.log_probs(features_NF), cold.log_probs(features_NF), atol=1e-5, rtol=0)


def test_a_position_without_weight_teaches_nothing() -> None:
    features_NF, targets_NC, weights_N = positions(40)
    changed_NC = torch.where(weights_N[:, None] == 0, targets_NC.flip(1), targets_NC)
    assert not torch.equal(changed_NC, targets_NC)
    torch.testing.assert_close(
        fit(features_NF, changed_NC, weights_N, l2=0.1).weight_FC,
        fit(features_NF, targets_NC, weights_N, l2=0.1).weight_FC,
    )


def test_with_all_components_the_reduction_changes_no_student() -> None:
    """A rotation leaves |W| as it is, and with fewer components the widest directions stay."""
    features_NF, targets_NC, weights_N = positions(40)
    features_NF = torch.cat([features_NF, torch.full((40, 1), 3.0)], dim=1)  # a constant feature has no scale
    standard_NF = (features_NF[:, :6] - features_NF[:, :6].mean(0)) / features_NF[:, :6].std(0, unbiased=False)
    whole = fit_reduction(features_NF, components=7)(features_NF)
    expected = fit(standard_NF, targets_NC, weights_N, l2=0.1).log_probs(standard_NF)
    torch.testing.assert_close(fit(whole, targets_NC, weights_N, l2=0.1).log_probs(whole), expected, atol=1e-5, rtol=0)
    variance = fit_reduction(features_NF, components=3)(features_NF).var(dim=0)
    torch.testing.assert_close(variance, torch.linalg.svdvals(standard_NF)[:3] ** 2 / 39)


# --------------------------------------------------------------------------------- crossed over folds


def lessons_of(corpus_NC: Tensor, gold_GC: Tensor, gold_folds: Tensor) -> list[Lesson]:
    features_NF, *_ = positions(40)
    features_GF, *_ = positions(10, seed=1)
    folds_N = torch.arange(40) % 4
    return [
        Lesson(features_NP=features_NF, targets_NC=corpus_NC, folds_N=folds_N),
        Lesson(features_NP=features_GF, targets_NC=gold_GC, folds_N=gold_folds, weight=0.3),
    ]


def test_a_cross_fitted_student_never_labels_what_it_has_learnt() -> None:
    """Other targets in a fold change no bit of the predictions in that fold, but those in the others."""
    corpus_NC, gold_GC, gold_folds = positions(40)[1], positions(10, seed=1)[1], torch.arange(10) % 4
    before = cross_fitted(lessons_of(corpus_NC, gold_GC, gold_folds), folds=4, l2=0.1)
    is_changed_N = torch.arange(40) % 4 == 2
    changed_NC = torch.where(is_changed_N[:, None], corpus_NC.flip(1), corpus_NC)
    changed_GC = torch.where((gold_folds == 2)[:, None], gold_GC.flip(1), gold_GC)
    after = cross_fitted(lessons_of(changed_NC, changed_GC, gold_folds), folds=4, l2=0.1)
    for old_NC, new_NC, is_left in zip(before, after, (is_changed_N, gold_folds == 2), strict=True):
        assert torch.equal(new_NC[is_left], old_NC[is_left])
        assert ((new_NC - old_NC).abs().amax(dim=1) > 1e-3)[~is_left].all()


def test_each_fold_is_labelled_by_the_student_of_all_others() -> None:
    corpus_NC, gold_GC, gold_folds = positions(40)[1], positions(10, seed=1)[1], torch.zeros(10, dtype=torch.int64)
    corpus, gold = lessons_of(corpus_NC, gold_GC, gold_folds)
    found_NC, found_GC = cross_fitted([corpus, gold], folds=4, l2=0.1)
    is_learnt_N = corpus.folds_N != 0
    alone = fit(corpus.features_NP[is_learnt_N], corpus_NC[is_learnt_N], torch.full((30,), 1 / 30).double(), l2=0.1)
    torch.testing.assert_close(found_GC, alone.log_probs(gold.features_NP), atol=1e-6, rtol=0)  # all gold is in fold 0
    torch.testing.assert_close(
        found_NC[~is_learnt_N], alone.log_probs(corpus.features_NP[~is_learnt_N]), atol=1e-6, rtol=0
    )
    with pytest.raises(ValueError, match="one fold has all positions"):
        cross_fitted([gold], folds=4, l2=0.1)


def test_l2_is_the_one_of_the_least_cross_entropy_with_the_teacher() -> None:
    features_NF, targets_NC, _ = positions(60)
    lesson = Lesson(features_NP=features_NF, targets_NC=targets_NC, folds_N=torch.arange(60) % 3)
    best, tried = choose_l2(lesson, folds=3, grid=(10.0, 1.0, 0.1, 1e-3))
    for l2, found in tried.items():
        expected = 0.0
        for fold in range(3):
            is_left_N = lesson.folds_N == fold
            student = fit(features_NF[~is_left_N], targets_NC[~is_left_N], torch.full((40,), 1 / 40).double(), l2=l2)
            expected -= float((targets_NC * student.log_probs(features_NF)).sum(dim=1)[is_left_N].sum()) / 60
        assert found == pytest.approx(expected, abs=1e-6)
    assert tried[best] == min(tried.values())
