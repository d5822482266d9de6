"""Rates of runs on the same records, with intervals that cover new records and new seeds.

A rate of an arm is the mean over its R runs of sum_M value_RM / sum_M weight_M. Runs and records are crossed: all runs
of all arms answer the same records. So a run's value of a record is modelled as

    value_RM = mean + seed_R + record_M + noise_RM

and the variance of an arm's rate has three parts, var(seed) / R + var(record) / M + var(noise) / (R M). Seeds are too
few to be resampled: with R = 3 a resampled variance is a third too small. Records are resampled, seeds are counted:

- **Records**: Bayesian bootstrap (Rubin 1981, Annals of Statistics 9): each draw weighs every record by an exponential
  random number, the same for all arms, so that differences are paired. It never leaves a part of the records empty.
  Its variance over draws estimates var(record) / M + var(noise) / (R M).
- **Seeds**: analysis of variance of the crossed layout (Searle, Casella, McCulloch 1992, Variance Components, chapter
  4). The variance of run means, s^2 / R, estimates var(seed) / R + var(noise) / (R M), so

      variance = (variance over draws - var(noise) / (R M)) + s^2 / R

  Nothing is cut off at 0 but the bracket. With var(seed) cut off at 0 instead, intervals of studies without seed noise
  were too wide in simulations (97 % coverage for 95 % with R = 3); Student-t draws for each arm still more so (98 %).
- **Few seeds**: Student's t with the degrees of freedom of Satterthwaite (1946, Biometrics Bulletin 2):
  variance^2 / sum over arms of (s^2 / R)^2 / (R - 1).
- The interval is the percentile interval over records, widened on both sides by

      t_975(degrees of freedom) / 1.96 * sqrt(variance / variance over draws)

  so it keeps the skewness of a ratio. In a function of several arms' rates, s^2 / R counts by its squared gradient.

With one run var(seed) is unknown: the interval covers new records only. With two runs that lie far apart for their
records' noise, coverage falls to 90 %: one degree of freedom is too few for Satterthwaite's formula.

Fractions near 0 or 1, and arms that differ in few records: each arm has one right and one wrong record of its own
beside the real ones. With one run the interval of a fraction is then the Bayesian one with a uniform prior, Beta(k + 1,
n - k + 1), and two arms that are equal in truth differ significantly in at most 5 % of all studies, however few records
they differ in; without these records, or with half of them (Jeffreys' prior), it is up to 10 %.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.analysis.values import Interval

NUM_DRAWS = 4000
BOUNDS = [NUM_DRAWS // 40 - 1, NUM_DRAWS - NUM_DRAWS // 40]
"""Places of the 2.5 % and 97.5 % quantiles in sorted draws: 2.5 % lie at or beyond each."""
SEED = 20_231_214
"""Of the draws: the same study always has the same intervals."""
CHUNK = 1 << 23
"""Random weights in memory at a time."""
T_975 = {
    1.0: 12.7062, 1.1: 10.2768, 1.25: 8.028, 1.5: 6.0167, 1.75: 4.9488, 2.0: 4.3027, 2.5: 3.5747, 3.0: 3.1824,
    4.0: 2.7764, 5.0: 2.5706, 6.0: 2.4469, 8.0: 2.306, 10.0: 2.2281, 15.0: 2.1314, 20.0: 2.086, 30.0: 2.0423,
    60.0: 2.0003, float("inf"): 1.96,
}  # fmt: skip
"""97.5 % quantile of Student's t by degrees of freedom."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ratio:
    """One kind of rate of several arms: sum_M value_RM / sum_M weight_M, over the records with a weight above 0."""

    arm_labels: Sequence[str]
    """Of the arms: what their own random numbers follow from."""
    values_RM: Sequence[np.ndarray]
    """Of each arm, at most the weight where it is a fraction."""
    weight_M: np.ndarray
    is_fraction: bool = True
    """Between 0 and 1."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rate:
    """One rate of one arm."""

    value: float
    draws_D: np.ndarray
    """Over resampled records."""
    num_runs: int
    of_runs: float
    """s^2 / R: the variance of the mean of R runs, by how far they lie apart; 0 with one run."""
    of_noise: float
    """var(noise) / (R M): the part of it that new records would change, too."""
    is_fraction: bool


Parts = Sequence[tuple[float, Rate]]
"""The gradient of a function by each rate that it is made of."""


def rates(ratios: Sequence[Ratio]) -> list[list[Rate]]:
    """The rates of all arms for each ratio, with draws over the same resampled records; all weights have M entries.

    Raises ValueError where a ratio has no record.
    """
    kept = [np.flatnonzero(ratio.weight_M > 0) for ratio in ratios]
    if not all(len(index_M) for index_M in kept):
        raise ValueError("a rate needs at least one record with a weight above 0")
    columns = [_columns(ratio, index_M) for ratio, index_M in zip(ratios, kept, strict=True)]
    sums = [np.empty((NUM_DRAWS, column_MA.shape[1]), dtype=np.float32) for column_MA in columns]
    num_records = len(ratios[0].weight_M) if ratios else 1
    size = max(1, CHUNK // num_records)
    for start in range(0, NUM_DRAWS, size):
        rng = np.random.default_rng([SEED, start])
        drawn_DM = rng.standard_exponential((min(size, NUM_DRAWS - start), num_records), dtype=np.float32)
        for sum_DA, column_MA, index_M in zip(sums, columns, kept, strict=True):
            own_DM = drawn_DM if len(index_M) == num_records else drawn_DM[:, index_M]
            sum_DA[start : start + size] = own_DM @ column_MA
    own_records = {label: _own_records(label) for label in {name for ratio in ratios for name in ratio.arm_labels}}
    return [
        [
            _rate(values_RM[:, index_M], ratio, sum_DA[:, [arm, -1]], own_records[ratio.arm_labels[arm]])
            for arm, values_RM in enumerate(ratio.values_RM)
        ]
        for ratio, index_M, sum_DA in zip(ratios, kept, sums, strict=True)
    ]


def _columns(ratio: Ratio, index_M: np.ndarray) -> np.ndarray:
    """What is summed over records: the mean over runs of each arm, and last the weights."""
    means = [values_RM[:, index_M].mean(axis=0) for values_RM in ratio.values_RM]
    return np.stack([*means, ratio.weight_M[index_M]], axis=1).astype(np.float32)


def _rate(value_RM: np.ndarray, ratio: Ratio, sum_D2: np.ndarray, own_2D: np.ndarray) -> Rate:
    """Value, draws and the variance between runs of one arm; the noise is what is left of the crossed layout."""
    weight_M = ratio.weight_M[ratio.weight_M > 0]
    num_runs, num_records = value_RM.shape
    total = float(weight_M.sum())
    run_R = value_RM.sum(axis=1) / total
    of_runs = of_noise = 0.0
    if num_runs > 1:
        rest_RM = value_RM - value_RM.mean(axis=0) - (run_R - run_R.mean())[:, None] * weight_M
        bessel = num_records / max(num_records - 1, 1)
        of_noise = float((rest_RM**2).sum()) * bessel / ((num_runs - 1) * total**2) / num_runs
        of_runs = float(run_R.var(ddof=1)) / num_runs
    numerator_D, denominator_D = sum_D2.T
    if ratio.is_fraction:
        numerator_D, denominator_D = numerator_D + own_2D[0], denominator_D + own_2D.sum(axis=0)
    return Rate(
        value=float(run_R.mean()),
        draws_D=numerator_D / denominator_D,
        num_runs=num_runs,
        of_runs=of_runs,
        of_noise=of_noise,
        is_fraction=ratio.is_fraction,
    )


def _own_records(label: str) -> np.ndarray:
    """Weights of an arm's own right and wrong record, random as those of all records."""
    rng = np.random.default_rng([SEED, zlib.crc32(label.encode())])
    return rng.standard_exponential((2, NUM_DRAWS), dtype=np.float32)


# ----------------------------------------------------------------------------------------- intervals


def interval(value: float, draws_D: np.ndarray, parts: Parts) -> Interval:
    """95 % interval of a function of rates, from its draws over records and its gradient by each rate."""
    low, high = (float(bound) for bound in np.partition(draws_D, BOUNDS)[BOUNDS])
    variance, of_records, freedom = _variance(parts)
    half = t_975(freedom) * variance**0.5
    if of_records == 0:  # all records are alike: only runs differ
        return Interval(value=value, low=value - half, high=value + half)
    factor = half / (1.96 * of_records**0.5)
    return Interval(
        value=value, low=min(value, value + factor * (low - value)), high=max(value, value + factor * (high - value))
    )


def interval_of(rate: Rate) -> Interval:
    """95 % interval of one rate; a fraction's stays between 0 and 1."""
    found = interval(rate.value, rate.draws_D, [(1.0, rate)])
    if not rate.is_fraction or found.low is None or found.high is None:
        return found
    return Interval(value=found.value, low=max(found.low, 0.0), high=min(found.high, 1.0))


def difference(rate: Rate, other: Rate) -> Interval:
    """95 % interval of rate - other, paired on the records."""
    return interval(rate.value - other.value, rate.draws_D - other.draws_D, [(1.0, rate), (-1.0, other)])


def standard_error(parts: Parts) -> float:
    """Of a function of rates, by its gradient: records and seeds."""
    return _variance(parts)[0] ** 0.5


def _variance(parts: Parts) -> tuple[float, float, float]:
    """Variance, its part over draws of records, and degrees of freedom; formulas: head of this file."""
    linear_D = sum(gradient * (rate.draws_D - rate.value) for gradient, rate in parts)
    of_records = float(np.var(linear_D, dtype=np.float64))
    of_noise = sum(gradient**2 * rate.of_noise for gradient, rate in parts)
    of_runs = [(gradient**2 * rate.of_runs, rate.num_runs - 1) for gradient, rate in parts if rate.of_runs > 0]
    variance = max(of_records - of_noise, 0.0) + sum(part for part, _ in of_runs)
    uncertain = sum(part**2 / freedom for part, freedom in of_runs)
    return variance, of_records, variance**2 / uncertain if uncertain > 0 else float("inf")


def t_975(freedom: float) -> float:
    """97.5 % quantile of Student's t: `T_975`, linear in 1 / degrees of freedom between its entries (within 1 %)."""
    inverse = [1 / key for key in T_975]
    return float(np.interp(1 / freedom, inverse[::-1], list(T_975.values())[::-1]))


def widened_draws(rate: Rate) -> np.ndarray:
    """Draws over records, moved away from the value by the factor of `interval` where it is above 1.

    For functions of several rates without a gradient; noise of records that two arms share is widened in both.
    """
    variance, of_records, freedom = _variance([(1.0, rate)])
    factor = t_975(freedom) / 1.96 * (variance / of_records) ** 0.5 if of_records > 0 else 1.0
    return rate.value + max(factor, 1.0) * (rate.draws_D - rate.value)
