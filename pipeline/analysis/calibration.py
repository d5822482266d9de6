"""Whether the probabilities of choices can be believed."""

from __future__ import annotations

import numpy as np

from pipeline.analysis.values import Bin, Calibration

NUM_BINS = 15
"""As in Guo et al. 2017 (arXiv 1706.04599), but of equal mass."""


def calibration(probability_RMC: np.ndarray, target_RMC: np.ndarray, right_RM: np.ndarray) -> Calibration:
    """Calibration of all predictions of all runs against the truth, or against the teacher's choice.

    `target_RMC`: probability of each choice to be the true one, 1 for the answer, 1 / m for each of the teacher's m
    tied choices; `right_RM`: that of the predicted choice to be the true one. Confidence is the largest probability.

        ECE   = sum over bins of share * |mean right - mean confidence|   (bins of equal mass: Nguyen & O'Connor 2015,
                arXiv 1508.05154, section 3.1; of few records it is above 0 even for a calibrated model)
        Brier = mean of sum_C (p_C - 1[C is the true one])^2 = mean of sum_C p_C^2 - 2 p_C target_C, plus 1
    """
    confidence_P = probability_RMC.max(axis=2).ravel()
    right_P = np.broadcast_to(right_RM, probability_RMC.shape[:2]).ravel()
    order_P = np.argsort(confidence_P, kind="stable")
    parts = [part for part in np.array_split(order_P, NUM_BINS) if len(part)]
    bins = tuple(
        Bin(confidence=float(confidence_P[part].mean()), accuracy=float(right_P[part].mean()), num_records=len(part))
        for part in parts
    )
    squares = (probability_RMC**2 - 2 * probability_RMC * target_RMC).sum(axis=2) + 1
    return Calibration(
        ece=sum(part.num_records * abs(part.accuracy - part.confidence) for part in bins) / len(order_P),
        brier=float(squares.mean()),
        overconfidence=float(confidence_P.mean() - right_P.mean()),
        bins=bins,
    )
