"""Does the student copy its teacher's errors: cells of teacher right or wrong x student right or wrong.

A model picks at random among its best choices where several are tied, independently of the other model, so each cell
holds expected numbers of records. With t = P(teacher right), s = P(student right) of a record, 0 or 1 without ties:

    correction = sum_M (1 - t) s / sum_M (1 - t)     damage = sum_M t (1 - s) / sum_M t
    imitation  = sum_M P(student = teacher, both wrong) / sum_M (1 - t)

    score - weak = (1 - weak) correction - weak damage      exactly, with weak the teacher's score
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.analysis.bootstrap import Rate, Ratio, difference, interval_of
from pipeline.analysis.values import ArmPredictions, Imitation


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Cells:
    """One arm against the teacher."""

    same_RM: np.ndarray
    """P(student = teacher)."""
    copied_RM: np.ndarray
    """P(student = teacher, teacher wrong)."""
    corrected_RM: np.ndarray
    """P(student right, teacher wrong)."""
    damaged_RM: np.ndarray
    """P(student wrong, teacher right)."""


def choice_shares(arm: ArmPredictions, num_choices: int) -> np.ndarray:
    """RMC: 1 / m for each of the m best choices of a record, else 0. Without probabilities: 1 for the predicted one."""
    assert arm.predicted_RM is not None
    share_RMC = np.zeros((*arm.predicted_RM.shape, num_choices), dtype=np.float32)
    np.put_along_axis(share_RMC, arm.predicted_RM[..., None], 1.0, axis=2)
    if arm.num_tied_RM is None or arm.probability_RMC is None or not (arm.num_tied_RM > 1).any():
        return share_RMC
    is_tied_RM = arm.num_tied_RM > 1
    tied_TC = arm.probability_RMC[is_tied_RM]
    is_best_TC = tied_TC == tied_TC.max(axis=1, keepdims=True)
    share_RMC[is_tied_RM, : tied_TC.shape[1]] = is_best_TC / is_best_TC.sum(axis=1, keepdims=True)
    return share_RMC


def cells(arm: ArmPredictions, teacher_MC: np.ndarray, teacher_M: np.ndarray) -> Cells:
    """The cells of all runs of an arm against one run of the teacher: its choice shares and its credits."""
    same_RM = np.einsum("rmc,mc->rm", choice_shares(arm, teacher_MC.shape[1]), teacher_MC).astype(np.float64)
    return Cells(
        same_RM=same_RM,
        copied_RM=np.maximum(same_RM - arm.credit_RM * teacher_M, 0.0),
        corrected_RM=arm.credit_RM * (1 - teacher_M),
        damaged_RM=(1 - arm.credit_RM) * teacher_M,
    )


def ratios(arm_labels: Sequence[str], found: Sequence[Cells], teacher_M: np.ndarray) -> tuple[Ratio, ...]:
    """Imitation, correction, damage and agreement of all arms, as `imitation` takes their rates.

    Needs a teacher that is right on some records and wrong on others.
    """
    everywhere_M, wrong_M = np.ones_like(teacher_M), 1 - teacher_M
    return (
        Ratio(arm_labels=arm_labels, values_RM=[cell.copied_RM for cell in found], weight_M=wrong_M),
        Ratio(arm_labels=arm_labels, values_RM=[cell.corrected_RM for cell in found], weight_M=wrong_M),
        Ratio(arm_labels=arm_labels, values_RM=[cell.damaged_RM for cell in found], weight_M=teacher_M),
        Ratio(arm_labels=arm_labels, values_RM=[cell.same_RM for cell in found], weight_M=everywhere_M),
    )


def imitation(found: Sequence[Rate], gold_only: Rate | None, teacher_M: np.ndarray) -> Imitation:
    """The rates of one arm; `gold_only`: imitation of gold_only, None for that arm itself and where there is none."""
    copied, corrected, damaged, same = found
    num_right = round(float(teacher_M.sum()))
    return Imitation(
        num_teacher_wrong=len(teacher_M) - num_right,
        num_teacher_right=num_right,
        imitation=interval_of(copied),
        correction=interval_of(corrected),
        damage=interval_of(damaged),
        excess=None if gold_only is None else difference(copied, gold_only),
        agreement=interval_of(same),
    )
