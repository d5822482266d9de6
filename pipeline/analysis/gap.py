"""Differences of scores, records won and lost, and the performance gap recovered."""

from __future__ import annotations

import numpy as np

from pipeline.analysis.bootstrap import Rate, difference, interval, standard_error
from pipeline.analysis.values import ArmPredictions, Comparison, Interval


def compare(arm: ArmPredictions, other: ArmPredictions, rate: Rate, other_rate: Rate, *, against: str) -> Comparison:
    """The paired difference of the scores of two arms, with the records won and lost.

    won = sum over records of the mean over all pairs of runs of P(arm right, other wrong); a tie of m choices is right
    with probability 1 / m. Where scores are no fractions, a record is won by the higher one.
    """
    lost = _won(other, arm, is_fraction=rate.is_fraction)
    return Comparison(
        against=against,
        difference=difference(rate, other_rate),
        won=_won(arm, other, is_fraction=rate.is_fraction),
        lost=lost,
    )


def _won(arm: ArmPredictions, other: ArmPredictions, *, is_fraction: bool) -> float:
    if is_fraction:  # the mean over pairs of runs of a product is the product of the means
        return float((arm.credit_RM.mean(axis=0) * (1 - other.credit_RM.mean(axis=0))).sum())
    won = [(run_M > other.credit_RM).sum(axis=1).mean() for run_M in arm.credit_RM]
    return float(np.mean(won))


def performance_gap_recovered(score: Rate, weak: Rate, ceiling: Rate) -> Interval:
    """PGR = (score - weak) / (ceiling - weak), never clamped (Burns et al. 2023, arXiv 2312.09390, section 3).

    Its gradient: 1 / gap by the score, -(1 - PGR) / gap by the weak score, -PGR / gap by the ceiling.
    """
    gap = ceiling.value - weak.value
    pgr = (score.value - weak.value) / gap
    draws_D = (score.draws_D - weak.draws_D) / (ceiling.draws_D - weak.draws_D)
    return interval(pgr, draws_D, [(1 / gap, score), (-(1 - pgr) / gap, weak), (-pgr / gap, ceiling)])


def why_no_gap(weak: Rate | None, ceiling: Rate | None) -> str | None:
    """Why there is no PGR: no teacher, no ceiling, or a gap below two standard errors; None where there is one."""
    if weak is None:
        return "no teacher to measure the gap from"
    if ceiling is None:
        return "no ceiling to measure the gap to"
    gap, error = ceiling.value - weak.value, standard_error([(1.0, ceiling), (-1.0, weak)])
    if gap < 2 * error or gap <= 0:
        return f"the gap from teacher to ceiling, {gap:.4f}, is below two standard errors of it, {2 * error:.4f}"
    return None
