"""Intervals against closed forms: normal, Beta, McNemar, and the crossed analysis of variance."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pipeline.analysis import bootstrap
from pipeline.analysis.bootstrap import Rate, Ratio, difference, interval, interval_of, rates, standard_error, t_975
from pipeline.analysis.values import Interval


def ask(*values_RM: np.ndarray, weight_M: np.ndarray | None = None, is_fraction: bool = True) -> list[Rate]:
    weight_M = np.ones(values_RM[0].shape[1]) if weight_M is None else weight_M
    arm_labels = [f"arm {i}" for i in range(len(values_RM))]
    return rates([Ratio(arm_labels=arm_labels, values_RM=values_RM, weight_M=weight_M, is_fraction=is_fraction)])[0]


def ones(count: int, num_records: int) -> np.ndarray:
    """One run that is right on the first `count` records."""
    return (np.arange(num_records) < count).astype(float)[None]


def bounds(found: Interval) -> tuple[float, float]:
    assert found.low is not None
    assert found.high is not None
    return found.low, found.high


def test_with_one_seed_the_interval_is_the_normal_one() -> None:
    found = interval_of(ask(ones(1245, 1500))[0])
    half = 1.96 * math.sqrt(0.83 * 0.17 / 1500)
    assert found.value == 0.83
    assert bounds(found) == pytest.approx((0.83 - half, 0.83 + half), abs=0.06 * half)


def test_of_few_records_it_is_the_bayesian_one() -> None:
    """Quantiles of Beta(k + 1, n - k + 1), and the estimate itself where all records are alike."""
    assert bounds(interval_of(ask(ones(2, 10))[0])) == pytest.approx((0.0602, 0.5178), abs=0.015)
    assert bounds(interval_of(ask(ones(20, 20))[0])) == pytest.approx((0.025 ** (1 / 21), 1.0), abs=0.015)
    assert bounds(interval_of(ask(ones(0, 20))[0])) == pytest.approx((0.0, 1 - 0.025 ** (1 / 21)), abs=0.015)


def test_a_difference_is_paired() -> None:
    """Variance of McNemar's difference: (won + lost - (won - lost)^2 / M) / M^2, far below that of two samples."""
    won, lost, num_records = 90, 50, 1500
    first, second = ones(1200, num_records), ones(1200, num_records)
    first[0, 1200 : 1200 + won] = 1
    first[0, :lost] = 0
    half = 1.96 * math.sqrt(won + lost - (won - lost) ** 2 / num_records) / num_records
    found = difference(*ask(first, second))
    value = (won - lost) / num_records
    assert found.value == pytest.approx(value)
    assert bounds(found) == pytest.approx((value - half, value + half), abs=0.06 * half)


@pytest.mark.parametrize(("won", "is_significant"), [(0, False), (1, False), (3, False), (8, True)])
def test_few_differing_records_decide_nothing(won: int, is_significant: bool) -> None:
    """An exact sign test of 3 of 3 has p = 0.25, of 8 of 8 p = 0.008."""
    low, high = bounds(difference(*ask(ones(800 + won, 1000), ones(800, 1000))))
    assert low <= won / 1000 <= high
    assert (low > 0) == is_significant


@pytest.mark.parametrize("expected", [0.7, 2.0, 5.0])
def test_equal_arms_that_differ_in_few_records_are_rarely_significant(expected: float) -> None:
    """Won and lost are Poisson with the same mean: the exact chance of an interval without 0 is at most 5 %."""
    chance = [math.exp(-expected) * expected**k / math.factorial(k) for k in range(16)]
    lost_RM = [ones(k, 1000) for k in range(16)]
    won_RM = [ones(700, 1000) - ones(600, 1000) + ones(k, 1000)[:, ::-1] for k in range(16)]
    base_M = ones(700, 1000) - ones(600, 1000)
    rate = ask(*(base_M + lost for lost in lost_RM), *won_RM)
    significant = 0.0
    for lost in range(16):
        for won in range(16):
            low, high = bounds(difference(rate[16 + won], rate[lost]))
            significant += chance[won] * chance[lost] * (low > 0 or high < 0)
    assert significant < 0.05


def test_variance_is_that_of_the_crossed_layout() -> None:
    """A twin by loops, from mean squares: variance of the mean = (MS run + MS record - MS rest) / (R M)."""
    rng = np.random.default_rng(1)
    num_runs, num_records = 4, 300
    value_RM = (
        rng.normal(size=(num_runs, 1)) + 2 * rng.normal(size=num_records) + rng.normal(size=(num_runs, num_records))
    )
    mean, run, record = value_RM.mean(), value_RM.mean(axis=1), value_RM.mean(axis=0)
    ms_run = num_records * sum((run[r] - mean) ** 2 for r in range(num_runs)) / (num_runs - 1)
    ms_record = num_runs * sum((record[m] - mean) ** 2 for m in range(num_records)) / (num_records - 1)
    cells = [(r, m) for r in range(num_runs) for m in range(num_records)]
    ms_rest = sum((value_RM[r, m] - run[r] - record[m] + mean) ** 2 for r, m in cells)
    ms_rest /= (num_runs - 1) * (num_records - 1)
    (rate,) = ask(value_RM, is_fraction=False)
    assert rate.of_runs == pytest.approx(ms_run / (num_runs * num_records))
    assert rate.of_noise == pytest.approx(ms_rest / (num_runs * num_records))
    variance = (ms_run + ms_record - ms_rest) / (num_runs * num_records)
    assert standard_error([(1.0, rate)]) ** 2 == pytest.approx(variance, rel=0.02)


def test_weights_make_a_ratio_of_sums() -> None:
    """Linearised: variance = sum of (value - ratio * weight)^2 / (sum of weights)^2."""
    rng = np.random.default_rng(2)
    weight_M = rng.integers(1, 30, size=800).astype(float)
    value_RM = -(2.5 * weight_M + rng.normal(size=800) * weight_M)[None]
    (rate,) = ask(value_RM, weight_M=weight_M, is_fraction=False)
    assert rate.value == pytest.approx(value_RM.sum() / weight_M.sum())
    expected = ((value_RM - rate.value * weight_M) ** 2).sum() / weight_M.sum() ** 2
    assert standard_error([(1.0, rate)]) ** 2 == pytest.approx(expected, rel=0.06)


def test_runs_that_lie_far_apart_widen_the_interval_by_student_t() -> None:
    """Records all alike within a run: only the three runs count, with two degrees of freedom."""
    value_RM = np.repeat([[-1.0], [-2.0], [-3.0]], 50, axis=1)
    low, high = bounds(interval_of(ask(value_RM, is_fraction=False)[0]))
    half = 4.3027 * 1.0 / math.sqrt(3)
    assert (low, high) == pytest.approx((-2 - half, -2 + half), rel=1e-4)


@pytest.mark.parametrize("freedom", [1.0, 1.05, 1.37, 2.2, 3.0, 3.7, 7.0, 12.5, 45.0, 1e9])
def test_quantiles_of_student_t(freedom: float) -> None:
    """The density integrated from 0 to the quantile is 0.475; between the entries of the table nearly so."""
    x = np.linspace(0, t_975(freedom), 200_001)
    scale = (
        math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) if freedom < 1e6 else math.sqrt(freedom / 2)
    )
    density = scale / math.sqrt(freedom * math.pi) * (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
    assert ((density[1:] + density[:-1]) / 2 * np.diff(x)).sum() == pytest.approx(0.475, abs=5e-4)


def test_a_ratio_keeps_its_skewness() -> None:
    """1 / x of a score near 0.1: the interval is that of the score, turned around, and not symmetric."""
    (rate,) = ask(ones(20, 200))
    low, high = bounds(interval_of(rate))
    found = interval(1 / rate.value, 1 / rate.draws_D, [(-1 / rate.value**2, rate)])
    assert bounds(found) == pytest.approx((1 / high, 1 / low), rel=0.02)


def test_intervals_do_not_depend_on_other_arms_or_calls() -> None:
    first, second = ones(700, 1000), ones(650, 1000)
    alone, together = ask(first)[0], ask(first, second)[0]
    assert interval_of(ask(first)[0]) == interval_of(alone)
    assert bounds(interval_of(together)) == pytest.approx(bounds(interval_of(alone)), abs=1e-6)


def test_many_records_are_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = bounds(interval_of(ask(ones(700, 1000))[0]))
    monkeypatch.setattr(bootstrap, "CHUNK", 333_000)
    in_parts = bounds(interval_of(ask(ones(700, 1000))[0]))
    assert in_parts != whole
    assert in_parts == pytest.approx(whole, abs=0.003)


def test_a_rate_of_no_record_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one record"):
        ask(ones(3, 5), weight_M=np.zeros(5))
    assert rates([]) == []
