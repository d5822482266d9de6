"""How many gold labels the teacher was worth: the gold set with which gold_only reaches the combined score."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.analysis.bootstrap import Rate, Ratio, interval_of, rates, widened_draws
from pipeline.analysis.values import ArmPredictions, Interval, LabelSaving


def label_saving(gold_only: Sequence[ArmPredictions], combined: ArmPredictions, metric: str) -> LabelSaving:
    """Read the size off the curve of gold_only's scores, linear in log size between the sizes that were trained.

    Scores that fall with more labels are levelled first: the nondecreasing curve with the least squared distance
    (isotonic regression). The interval is that of the sizes which the curves through resampled scores give; the draws
    of each score are widened for its seeds. A bound is None where it lies outside of the sizes: no extrapolation.
    Raises ValueError for an arm without a number of gold records, or for two of the same size.
    """
    arms = sorted(gold_only, key=lambda arm: arm.arm.num_gold or 0)
    sizes = tuple(sorted({arm.arm.num_gold for arm in arms if arm.arm.num_gold is not None}))
    if len(sizes) < len(arms) or combined.arm.num_gold is None:
        given = [arm.arm.num_gold for arm in (*arms, combined)]
        raise ValueError(f"label saving: expected gold sets of different known sizes, and of combined, found {given}")
    found = _scores([*arms, combined], metric)
    curve_DN = isotonic(np.stack([np.r_[rate.value, widened_draws(rate)] for rate in found[:-1]], axis=1))
    target_D = np.r_[found[-1].value, widened_draws(found[-1])]
    log_size_D = _crossing(curve_DN, target_D, np.log(sizes))
    return LabelSaving(
        sizes=sizes,
        scores=tuple(interval_of(rate) for rate in found[:-1]),
        num_gold=combined.arm.num_gold,
        equivalent=_sizes(log_size_D),
        note=_note(log_size_D, sizes),
    )


def _scores(arms: Sequence[ArmPredictions], metric: str) -> list[Rate]:
    ratio = Ratio(
        arm_labels=[arm.arm.label for arm in arms],
        values_RM=[arm.credit_RM for arm in arms],
        weight_M=arms[0].weight_M,
        is_fraction=metric != "-nll",
    )
    return rates([ratio])[0]


def isotonic(score_DN: np.ndarray) -> np.ndarray:
    """The nondecreasing row with the least squared distance to each row.

    By its min-max formula, max over a <= i of min over b >= i of the mean of entries a to b (Barlow et al. 1972,
    Statistical Inference under Order Restrictions, section 1.4).
    """
    num_points = score_DN.shape[1]
    sum_DN = np.concatenate([np.zeros((len(score_DN), 1)), np.cumsum(score_DN, axis=1, dtype=np.float64)], axis=1)
    level_DN = np.full(score_DN.shape, -np.inf)
    for first in range(num_points):
        mean_DN = (sum_DN[:, first + 1 :] - sum_DN[:, first : first + 1]) / np.arange(1, num_points - first + 1)
        lowest_DN = np.minimum.accumulate(mean_DN[:, ::-1], axis=1)[:, ::-1]
        level_DN[:, first:] = np.maximum(level_DN[:, first:], lowest_DN)
    return level_DN


def _crossing(curve_DN: np.ndarray, target_D: np.ndarray, log_size_N: np.ndarray) -> np.ndarray:
    """Smallest log size at which the curve reaches the target; -inf below the first size, inf beyond the last."""
    crossing_D = np.full(len(target_D), np.inf)
    for point in range(len(log_size_N) - 1, 0, -1):
        low_D, high_D = curve_DN[:, point - 1], curve_DN[:, point]
        is_here_D = (target_D > low_D) & (target_D <= high_D)
        share_D = (target_D - low_D) / np.where(high_D > low_D, high_D - low_D, 1.0)
        here_D = log_size_N[point - 1] + share_D * (log_size_N[point] - log_size_N[point - 1])
        crossing_D = np.where(is_here_D, here_D, crossing_D)
    return np.where(target_D < curve_DN[:, 0], -np.inf, np.where(target_D == curve_DN[:, 0], log_size_N[0], crossing_D))


def _sizes(log_size_D: np.ndarray) -> Interval | None:
    """The first entry is the estimate, the others are draws."""
    if not np.isfinite(log_size_D[0]):
        return None
    low, high = np.quantile(log_size_D[1:], [0.025, 0.975], method="closest_observation")
    value = float(np.exp(log_size_D[0]))
    return Interval(
        value=value,
        low=min(value, float(np.exp(low))) if np.isfinite(low) else None,
        high=max(value, float(np.exp(high))) if np.isfinite(high) else None,
    )


def _note(log_size_D: np.ndarray, sizes: tuple[int, ...]) -> str:
    """What of the answer lies outside of the sizes that were trained."""
    if log_size_D[0] == np.inf:
        return f"gold_only stays below combined up to its largest gold set, {sizes[-1]} records"
    if log_size_D[0] == -np.inf:
        return f"gold_only is above combined with its smallest gold set already, {sizes[0]} records"
    below, above = (float(np.mean(log_size_D[1:] == bound)) for bound in (-np.inf, np.inf))
    notes = [f"between the sizes {', '.join(map(str, sizes))}: linear in log size"]
    if below > 0.025:
        notes.append(f"no lower bound: it may lie below {sizes[0]}")
    if above > 0.025:
        notes.append(f"no upper bound: it may lie above {sizes[-1]}")
    return "; ".join(notes)
