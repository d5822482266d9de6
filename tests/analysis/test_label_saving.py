"""The size of the gold set with which gold_only reaches combined: closed forms, bounds, and simulation."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from pipeline.analysis.label_saving import isotonic, label_saving
from pipeline.analysis.values import Arm, ArmPredictions
from support.simulated_study import TrueArm, simulate, study_of


def arm_of(score: float, num_gold: int | None, *, role: str = "gold_only", num_records: int = 1000) -> ArmPredictions:
    arm = Arm(
        role=role,
        label=f"{role} {num_gold}",
        name=role,
        seeds=(1,),
        lm_weight=1.0,
        kd_weight=1.0,
        gold_fraction=0.1,
        num_gold=num_gold,
    )
    credit_RM = (np.arange(num_records) < round(score * num_records)).astype(float)[None]
    return ArmPredictions(arm=arm, credit_RM=credit_RM, weight_M=np.ones(num_records))


def curve(*points: tuple[int, float]) -> list[ArmPredictions]:
    return [arm_of(score, size) for size, score in points]


def test_linear_in_log_size() -> None:
    """Between 100 (0.6) and 400 (0.7), 0.65 lies at their geometric mean, 200."""
    found = label_saving(curve((400, 0.7), (100, 0.6), (1600, 0.9)), arm_of(0.65, 100, role="combined"), "accuracy")
    assert found.equivalent is not None
    assert found.equivalent.value == pytest.approx(200)
    assert found.sizes == (100, 400, 1600)
    assert [score.value for score in found.scores] == pytest.approx([0.6, 0.7, 0.9])
    assert found.num_gold == 100
    low, high = found.equivalent.low, found.equivalent.high
    assert low is not None
    assert high is not None
    assert 100 < low < 200 < high < 400


def test_outside_of_the_curve_nothing_is_extrapolated() -> None:
    points = curve((100, 0.6), (400, 0.7))
    above = label_saving(points, arm_of(0.75, 100, role="combined"), "accuracy")
    assert above.equivalent is None
    assert "stays below combined up to its largest gold set, 400" in above.note
    below = label_saving(points, arm_of(0.55, 100, role="combined"), "accuracy")
    assert below.equivalent is None
    assert "above combined with its smallest gold set already, 100" in below.note
    near = label_saving(points, arm_of(0.699, 100, role="combined"), "accuracy")
    assert near.equivalent is not None
    assert near.equivalent.high is None
    assert "may lie above 400" in near.note
    single = label_saving(points[:1], arm_of(0.6, 100, role="combined"), "accuracy")
    assert single.equivalent is not None
    assert (single.equivalent.value, single.equivalent.low, single.equivalent.high) == (pytest.approx(100), None, None)


def test_scores_that_fall_are_levelled() -> None:
    """0.70, 0.66 become 0.68, 0.68: combined at 0.68 is reached at 400, by the line that ends there."""
    points = curve((100, 0.6), (400, 0.7), (800, 0.66), (1600, 0.8))
    found = label_saving(points, arm_of(0.68, 100, role="combined"), "accuracy")
    assert found.equivalent is not None
    assert found.equivalent.value == pytest.approx(400)


def test_isotonic_is_the_nearest_nondecreasing_curve() -> None:
    """A twin: of all ways to cut the sizes into blocks of equal level, the nondecreasing one of least squares."""
    for score_N in np.random.default_rng(1).normal(size=(40, 5)):
        best, best_error = score_N, np.inf
        for num_cuts in range(5):
            for cuts in combinations(range(1, 5), num_cuts):
                level_N = np.concatenate([np.full(len(b), b.mean()) for b in np.split(score_N, cuts)])
                error = ((level_N - score_N) ** 2).sum()
                if (np.diff(level_N) >= 0).all() and error < best_error:
                    best, best_error = level_N, error
        assert isotonic(score_N[None])[0] == pytest.approx(best)


def test_equal_or_unknown_sizes_are_refused() -> None:
    combined = arm_of(0.65, 100, role="combined")
    for points in (curve((100, 0.6), (100, 0.7)), [arm_of(0.6, None)]):
        with pytest.raises(ValueError, match="different known sizes"):
            label_saving(points, combined, "accuracy")
    with pytest.raises(ValueError, match="of combined"):
        label_saving(curve((100, 0.6)), arm_of(0.65, None, role="combined"), "accuracy")


@pytest.mark.slow(minutes=1)
def test_the_interval_covers_the_true_size() -> None:
    """300 studies of three seeds with a seed noise of half a point: at least 92 % (binomial error 2.5 points)."""
    sizes, accuracies = (100, 400, 1600, 6400), (0.7, 0.76, 0.82, 0.88)
    gold = [
        TrueArm(role="gold_only", label=f"gold {n}", accuracy=a, seed_noise=0.005, num_gold=n, is_main=n == 100)
        for n, a in zip(sizes, accuracies, strict=True)
    ]
    combined = TrueArm(role="combined", accuracy=0.79, seed_noise=0.005, num_gold=100)
    study = study_of([*gold, combined], num_records=1000)
    hits = 0
    for seed in range(300):
        _, *points, last = simulate(study, seed)[0]
        found = label_saving(points, last, "accuracy").equivalent
        assert found is not None
        hits += (found.low or 0) <= 800 <= (found.high or np.inf)
    assert hits / 300 >= 0.92
