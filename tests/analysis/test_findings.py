"""What the rules read: intervals widened for one seed, differences without pairs, classes, ends of curves."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pipeline.analysis import curve_ends
from pipeline.analysis.findings import findings
from pipeline.analysis.values import Interval
from support.study_values import arm, curves, imitation, interval, study


def test_one_seed_adds_the_assumed_noise_of_each_trained_arm() -> None:
    """Half width^2 grows by (1.96 points)^2 for each arm with one seed; teacher and zero-shot have no seed."""
    against = {"gold_only": interval(0.05, 0.03), "teacher": interval(0.05, 0.03)}
    for seeds, trained in (((1,), 2), ((1, 2), 0)):
        teacher, gold = arm("teacher", 0.8, seeds=(1,)), arm("gold_only", 0.8, seeds=seeds)
        found = findings(study(teacher, gold, arm("combined", 0.85, seeds=seeds, against=against)))
        for value, number in ((found.over_gold, trained), (found.over_teacher, trained / 2)):
            assert value is not None
            half = math.sqrt(0.03**2 + number * 0.0196**2)
            assert (value.low, value.high) == pytest.approx((0.05 - half, 0.05 + half))


def test_arms_that_were_not_compared_differ_as_if_independent() -> None:
    """Half widths add as roots of sums of squares; without an interval there is none."""
    control = arm("control", 0.7, label="shuffled", control="shuffled", is_main=False)
    smoothed = arm("control", 0.9, label="smoothed", control="smoothed")
    student = arm("combined", 0.85, against={"control": interval(-0.05)})
    found = findings(study(student, smoothed, control))
    assert found.over_shuffled is not None
    assert found.over_shuffled.value == pytest.approx(0.15)  # not the difference to the other control
    assert found.over_shuffled.low == pytest.approx(0.15 - 0.01 * math.sqrt(2))


@pytest.mark.parametrize("other", [{"kd_weight": 0.3}, {"lm_weight": 0.5}, {"gold_fraction": 0.2}])
def test_a_control_of_other_weights_is_none(other: dict[str, float]) -> None:
    student = arm("combined", 0.85)
    same = arm("control", 0.7, label="same", control="shuffled", is_main=False)
    different = arm("control", 0.85, label="shuffled", control="shuffled", **other)
    assert findings(study(student, different)).over_shuffled is None
    found = findings(study(student, different, same))
    assert found.over_shuffled is not None
    assert found.over_shuffled.value == pytest.approx(0.15)


def test_the_noise_of_the_lower_weight_is_its_own() -> None:
    """One seed at weight 1 and three at its neighbours, so that each difference has the assumed noise once."""
    differences = {"lower kd": interval(0.05, 0.03)}
    seeds = {0.3: (1, 2, 3), 1.0: (1,), 3.0: (1, 2, 3)}
    arms = [
        arm("combined", 0.8, label=f"{kd}", kd_weight=kd, seeds=seeds[kd], is_main=kd == 1.0, against=differences)
        for kd in seeds
    ]
    found = findings(study(*arms))
    half = math.sqrt(0.03**2 + 0.0196**2)
    for value in (found.over_lower, found.higher_over):
        assert value is not None
        assert (value.low, value.high) == pytest.approx((0.05 - half, 0.05 + half))


def test_the_teachers_share_of_the_errors() -> None:
    """1,000 records: the teacher misses 200, of which the student repeats 100; the student misses 250 in all."""
    found = findings(study(arm("combined", 0.75, imitation=imitation(0.5, teacher=0.8))))
    assert found.teacher_share_of_errors == pytest.approx(100 / 250)


def test_a_difference_without_an_interval_stays_without() -> None:
    found = findings(
        study(arm("gold_only", 0.8), arm("combined", 0.8, seeds=(1,), against={"gold_only": Interval(value=0.1)}))
    )
    assert found.over_gold == Interval(value=0.1)


def test_the_end_of_a_curve_is_its_last_fifth() -> None:
    points = [(step, float(step)) for step in range(1, 101)]
    assert curve_ends.last_part(points) == points[80:]
    assert curve_ends.end(points) == pytest.approx(90.5)
    assert curve_ends.fraction_left(points) == pytest.approx(90.5)


def test_a_curve_with_gaps_and_without_values() -> None:
    figures = study(arm("combined", 0.8), training=(curves("combined", lm=[None, 2.0, None, 1.0]),))
    student = figures.main.arms[0]
    assert curve_ends.curve(figures, "lm", student) == [(2, 2.0), (4, 1.0)]
    assert curve_ends.curve(figures, "kd", student) == []
    assert curve_ends.num_steps(figures, student) == 4
    assert curve_ends.end([]) is None
    assert curve_ends.falls([]) is None


@pytest.mark.parametrize("noise", [0.05, 0.3])
def test_noise_alone_rarely_falls_and_a_trend_is_found(noise: float) -> None:
    """1,000 level curves: at 3 standard errors under 1 % (t with 38 degrees of freedom: 0.24 %).

    A fall of 4 sd over the last 40 points has 4 / sqrt(12 / 40) = 7.3 standard errors: nearly always found.
    """
    rng = np.random.default_rng(1)
    values_RS = 1 + noise * rng.standard_normal((1000, 200))
    level = [curve_ends.falls(list(enumerate(map(float, row), 1))) for row in values_RS]
    assert np.mean([bool(value) for value in level]) < 0.01
    trend = values_RS[:200] + 20 * noise * np.linspace(1, 0, 200)
    assert np.mean([bool(curve_ends.falls(list(enumerate(map(float, row), 1)))) for row in trend]) > 0.99


def test_what_is_almost_nothing_does_not_fall() -> None:
    """A straight line from 0.05 to 0: 100 % of itself over the end, but less than 0.01 nats until it is steeper."""
    for height, falls in ((0.04, False), (0.2, True)):
        points = [(step, height * (1 - step / 101)) for step in range(1, 101)]
        assert curve_ends.falls(points) is falls


def test_the_rise_is_over_the_minimum() -> None:
    assert curve_ends.rise([(1, 0.6), (2, 0.5), (3, 0.55)]) == pytest.approx(0.1)
    assert curve_ends.rise([(1, 0.6), (2, 0.5)]) is None


def test_the_next_higher_weight_differs_in_nothing_else() -> None:
    """The judged arm has weight 1; weight 2 has another temperature, weight 3 is its neighbour."""
    arms = [
        arm("combined", 0.8, label="1"),
        arm("combined", 0.8, label="2", kd_weight=2.0, is_main=False, differing={"loss.kd.temperature": 2.0}),
        arm("combined", 0.8, label="3", kd_weight=3.0, is_main=False, differing={"loss.kd.weight": 3.0}),
        arm("combined", 0.8, label="9", kd_weight=9.0, is_main=False),
    ]
    found = findings(study(*arms))
    assert found.higher is arms[2]
