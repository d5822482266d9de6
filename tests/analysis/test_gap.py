"""Records won and lost, and the performance gap recovered, by hand and by simulation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pipeline.analysis.bootstrap import NUM_DRAWS, Rate, t_975
from pipeline.analysis.figures import text_figures
from pipeline.analysis.gap import performance_gap_recovered, why_no_gap
from pipeline.analysis.values import Arm, ArmFigures, ArmPredictions, HeldOut


def arm_of(role: str, credit_RM: object, **given: object) -> ArmPredictions:
    credits = np.atleast_2d(np.asarray(credit_RM, dtype=float))
    arm = Arm(
        role=role,
        label=role,
        name=role,
        seeds=tuple(range(len(credits))),
        lm_weight=1.0,
        kd_weight=1.0,
        gold_fraction=0.1,
    )
    return ArmPredictions(arm=arm, credit_RM=credits, weight_M=np.ones(credits.shape[1]), **given)  # type: ignore[arg-type]


def figures_of(arms: list[ArmPredictions], metric: str = "accuracy") -> dict[str, ArmFigures]:
    found = text_figures(arms, HeldOut(name="test"), metric)
    return {one.arm.label: one for one in found.arms}


def test_won_and_lost_are_means_over_pairs_of_runs() -> None:
    """combined right on {0, 1, 2}, {0, 1}; gold_only on {2, 3}: won 2 and 2, lost 1 and 2. A tie of two counts half."""
    arms = [arm_of("gold_only", [0, 0, 1, 1, 0]), arm_of("combined", [[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])]
    (found,) = figures_of(arms)["combined"].comparisons
    assert (found.won, found.lost) == (2.0, 1.5)
    assert found.difference.value == pytest.approx((found.won - found.lost) / 5)
    arms[1] = arm_of("combined", [1, 0.5, 0.5, 0, 0])
    (found,) = figures_of(arms)["combined"].comparisons
    assert (found.won, found.lost) == (1.5, 1.5)


def test_with_nll_the_higher_one_wins_a_record() -> None:
    arms = [arm_of("gold_only", [-3.0, -2.0, -4.0, -1.0]), arm_of("combined", [[-1.0, -2.0, -5.0, -0.5], [-9.0] * 4])]
    weights = np.array([2.0, 1.0, 1.0, 4.0])
    found = figures_of([replace(arm, weight_M=weights) for arm in arms], "-nll")["combined"]
    assert (found.comparisons[0].won, found.comparisons[0].lost) == (1.0, 2.5)
    assert found.score.value == pytest.approx(-(8.5 + 36) / 2 / 8)
    assert found.nll == pytest.approx((8.5 + 36) / 2 / 8)
    assert found.imitation is None
    assert found.calibration is None


def test_pgr_is_not_clamped() -> None:
    num_records = 1000
    right = {"teacher": 600, "ceiling": 800, "combined": 850, "gold_only": 500, "weak_only": 700}
    arms = [arm_of(role, np.arange(num_records) < count) for role, count in right.items()]
    found = figures_of(arms)
    pgr = {role: one.pgr.value for role, one in found.items() if one.pgr is not None}
    assert pgr == pytest.approx({"combined": 1.25, "gold_only": -0.5, "weak_only": 0.5})
    assert all(one.pgr_refused is None for one in found.values())


def test_pgr_is_refused_below_two_standard_errors_of_the_gap() -> None:
    """A gap of 21 records of 1,000, 81 differing: its standard error is about 9 records; of 15 of 75 it is 8.6."""
    teacher = np.arange(1000) < 600
    near, far = teacher.copy(), teacher.copy()
    near[:30], near[600:645] = False, True
    far[:30], far[600:651] = False, True
    for credit, is_refused in ((near, True), (far, False)):
        found = figures_of([arm_of("teacher", teacher), arm_of("ceiling", credit), arm_of("combined", teacher)])
        assert (found["combined"].pgr is None) == is_refused
        assert (found["combined"].pgr_refused is not None) == is_refused
    below = figures_of([arm_of("teacher", teacher), arm_of("ceiling", ~teacher), arm_of("combined", teacher)])
    assert "below two standard errors" in str(below["combined"].pgr_refused)


def test_pgr_needs_teacher_and_ceiling() -> None:
    rate = Rate(value=0.5, draws_D=np.full(4000, 0.5), num_runs=1, of_runs=0.0, of_noise=0.0, is_fraction=True)
    assert "no teacher" in str(why_no_gap(None, rate))
    assert "no ceiling" in str(why_no_gap(rate, None))
    found = figures_of([arm_of("teacher", [1, 0]), arm_of("combined", [1, 1])])["combined"]
    assert found.pgr is None
    assert "no ceiling" in str(found.pgr_refused)


def test_seed_noise_counts_in_pgr_by_its_gradient() -> None:
    """PGR = (0.7 - 0.6) / (0.8 - 0.6): gradient 5 by the score, -2.5 by the weak score and the ceiling.

    Records: variance 4e-6 of each score. Runs: 1.6e-5 of the ceiling's mean over three runs, two degrees of freedom.
    """
    rng = np.random.default_rng(1)

    def rate(value: float, of_runs: float = 0.0) -> Rate:
        draws_D = value + 0.002 * rng.standard_normal(NUM_DRAWS)
        return Rate(value=value, draws_D=draws_D, num_runs=3, of_runs=of_runs, of_noise=0.0, is_fraction=True)

    score, weak, calm, noisy = rate(0.7), rate(0.6), rate(0.8), rate(0.8, of_runs=1.6e-5)
    of_records, of_runs = 4e-6 * (5**2 + 2 * 2.5**2), 1.6e-5 * 2.5**2
    freedom = (of_records + of_runs) ** 2 / (of_runs**2 / 2)
    expected = {id(calm): 1.96 * of_records**0.5, id(noisy): t_975(freedom) * (of_records + of_runs) ** 0.5}
    for ceiling in (calm, noisy):
        found = performance_gap_recovered(score, weak, ceiling)
        assert found.value == pytest.approx(0.5)
        assert found.low is not None
        assert found.high is not None
        assert (found.high - found.low) / 2 == pytest.approx(expected[id(ceiling)], rel=0.04)
    assert expected[id(noisy)] > 1.3 * expected[id(calm)]
