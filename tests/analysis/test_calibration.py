"""ECE, Brier score and over-confidence against known values."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.analysis.calibration import NUM_BINS, calibration


def two_choices(confidence_RM: np.ndarray) -> np.ndarray:
    return np.stack([confidence_RM, 1 - confidence_RM], axis=2)


def test_known_values_by_hand() -> None:
    """Two predictions of 0.9 and 0.6 for choice 0, the first right: |1 - 0.9| and |0 - 0.6|, one bin each."""
    probability_RMC = np.array([[[0.9, 0.1, 0.0], [0.6, 0.3, 0.1]]])
    answer_MC = np.eye(3)[[0, 1]]
    found = calibration(probability_RMC, answer_MC, np.array([[1.0, 0.0]]))
    assert [(one.confidence, one.accuracy, one.num_records) for one in found.bins] == [(0.6, 0, 1), (0.9, 1, 1)]
    assert found.ece == pytest.approx((0.1 + 0.6) / 2)
    assert found.overconfidence == pytest.approx(0.75 - 0.5)
    assert found.brier == pytest.approx((0.1**2 + 0.1**2 + 0.6**2 + 0.7**2 + 0.1**2) / 2)


def test_bins_have_equal_mass_over_all_runs() -> None:
    rng = np.random.default_rng(1)
    confidence_RM = rng.uniform(0.5, 1, size=(3, 500)) ** 0.2
    found = calibration(two_choices(confidence_RM), np.eye(2)[np.zeros(500, int)], np.ones((3, 500)))
    assert [one.num_records for one in found.bins] == [100] * NUM_BINS
    assert [one.confidence for one in found.bins] == sorted(one.confidence for one in found.bins)
    assert found.ece == pytest.approx(1 - confidence_RM.mean())


def test_a_calibrated_model_and_one_that_believes_too_much() -> None:
    """Right with probability p at confidence p: ECE near 0, Brier = mean 2 p (1 - p); ten points more: ECE 0.1."""
    rng = np.random.default_rng(2)
    confidence_RM = rng.uniform(0.5, 0.9, size=(1, 200_000))
    right_RM = rng.random(confidence_RM.shape) < confidence_RM
    answer_MC = np.eye(2)[np.where(right_RM[0], 0, 1)]
    calibrated = calibration(two_choices(confidence_RM), answer_MC, right_RM.astype(float))
    assert calibrated.ece < 0.005
    assert calibrated.brier == pytest.approx((2 * confidence_RM * (1 - confidence_RM)).mean(), abs=0.005)
    too_sure = calibration(two_choices(confidence_RM + 0.1), answer_MC, right_RM.astype(float))
    assert too_sure.ece == pytest.approx(0.1, abs=0.005)
    assert too_sure.overconfidence == pytest.approx(0.1, abs=0.005)


def test_against_a_teacher_with_a_tie_is_the_mean_over_both_ways_to_break_it() -> None:
    probability_RMC = np.array([[[0.7, 0.2, 0.1]]])
    ways = [calibration(probability_RMC, np.eye(3)[[choice]], np.array([[float(choice == 0)]])) for choice in (0, 1)]
    tied = calibration(probability_RMC, np.array([[0.5, 0.5, 0.0]]), np.array([[0.5]]))
    assert tied.brier == pytest.approx(sum(way.brier for way in ways) / 2)
    assert tied.overconfidence == pytest.approx(sum(way.overconfidence for way in ways) / 2)
