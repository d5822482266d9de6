"""Records won and lost, and the performance gap recovered, by hand and by simulation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pipeline.analysis.bootstrap import Rate
from pipeline.analysis.figures import text_figures
from pipeline.analysis.gap import why_no_gap
from pipeline.analysis.values import Arm, ArmFigures, ArmPredictions, HeldOut
from support.simulated_study import STUDENTS, simulate, study_of


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
    rate = Rate(
        value=0.5, draws_D=np.full(4000, 0.5), num_runs=1, of_runs=0.0, of_noise=0.0, is_fraction=True
    )  # fmt: skip
    assert "no teacher" in str(why_no_gap(None, rate))
    assert "no ceiling" in str(why_no_gap(rate, None))
    found = figures_of([arm_of("teacher", [1, 0]), arm_of("combined", [1, 1])])["combined"]
    assert found.pgr is None
    assert "no ceiling" in str(found.pgr_refused)


def test_seed_noise_of_the_ceiling_widens_the_interval_of_pgr() -> None:
    """Its gradient by the ceiling is -PGR / gap: the interval is wider where only the ceiling is noisy."""
    noisy = [replace(arm, seed_noise=0.03) if arm.role == "ceiling" else arm for arm in STUDENTS]
    widths = []
    for students in (STUDENTS, noisy):
        found = [figures_of(simulate(study_of(students), seed)[0])["combined"].pgr for seed in range(3)]
        widths.append(np.mean([one.high - one.low for one in found if one and one.low and one.high]))
    assert widths[1] > 1.3 * widths[0]


def test_gap_recovered_by_many_records_is_the_true_one() -> None:
    study = study_of(num_records=20_000, seeds=1)
    found = figures_of(simulate(study, 1)[0])
    assert found["combined"].pgr is not None
    assert found["combined"].pgr.value == pytest.approx(study.true_pgr("combined"), abs=0.04)
