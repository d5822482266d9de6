"""All figures of the arms of a study on one held-out text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from pipeline.analysis.bootstrap import interval_of
from pipeline.analysis.calibration import calibration
from pipeline.analysis.gap import compare, performance_gap_recovered
from pipeline.analysis.imitation import imitation
from pipeline.analysis.measured import Measured, Scored, measure
from pipeline.analysis.slices import slices
from pipeline.analysis.values import (
    Arm,
    ArmFigures,
    ArmPredictions,
    Calibration,
    Comparison,
    HeldOut,
    Imitation,
    Interval,
    TextFigures,
)

REFERENCES = ("teacher", "zero_shot", "gold_only", "weak_only")
"""Roles whose main arms all others are compared to."""
PLAIN = "combined"
"""The experiment that others of its role (a gate, a pool) have to beat."""
KD_WEIGHT = "loss.kd.weight"


def text_figures(arms: Sequence[ArmPredictions], held_out: HeldOut, metric: str) -> TextFigures:
    """Scores, differences, PGR, calibration, imitation and slices of all arms on one held-out text.

    `metric`: accuracy, exact_match or -nll. All arms have the same records in the same order. Where the teacher has
    several runs, its score covers all; comparisons, PGR and imitation refer to its first. PGR is left out, without a
    reason, for teacher and ceiling, where it is 0 and 1 by definition; imitation for the teacher. `nll` is known here
    only where it is the metric. Raises ValueError where labels are equal, or numbers of records differ or are 0.
    """
    arm_labels = [arm.arm.label for arm in arms]
    sizes = {arm.credit_RM.shape[1] for arm in arms}
    if len(set(arm_labels)) < len(arm_labels) or len(sizes) != 1 or 0 in sizes:
        raise ValueError(
            f"expected arms of different labels on the same records, found {arm_labels} on {sorted(sizes)}"
        )
    measured = measure(arms, held_out, metric)
    return TextFigures(
        name=held_out.name,
        metric=metric,
        num_records=sizes.pop(),
        is_out_of_domain=held_out.is_out_of_domain,
        arms=tuple(_arm_figures(measured, position) for position in range(len(arms))),
    )


def _arm_figures(measured: Measured, position: int) -> ArmFigures:
    own = measured.arms[position]
    predictions, teacher = own.predictions, measured.main.get("teacher")
    score = interval_of(own.score)
    has_pgr = predictions.arm.role not in ("teacher", "ceiling")
    num_tied_RM = predictions.num_tied_RM
    return ArmFigures(
        arm=predictions.arm,
        score=score,
        nll=-score.value if measured.metric == "-nll" else None,
        num_ties=0.0 if num_tied_RM is None else float((num_tied_RM > 1).sum(axis=1).mean()),
        comparisons=tuple(_comparisons(measured, own)),
        pgr=_pgr(measured, own) if has_pgr else None,
        pgr_refused=measured.no_gap if has_pgr else None,
        calibration=_calibration(measured, predictions),
        teacher_calibration=_teacher_calibration(measured, position),
        imitation=_imitation(measured, position),
        slices=slices(
            measured.parts,
            measured.part_scores[position],
            None if teacher is None else teacher.predictions,
            measured.cells[position],
        ),
    )


# --------------------------------------------------------------------------------------- comparisons


def _comparisons(measured: Measured, own: Scored) -> Iterator[Comparison]:
    """To the main arms of other roles; a combined arm also to `PLAIN`, the next lower KD weight and all controls."""
    arm = own.predictions.arm
    others = [(role, measured.main[role]) for role in REFERENCES if role in measured.main]
    if arm.role == "combined":
        plain = _plain(measured, arm)
        others += [] if plain is None else [(PLAIN, plain)]
        lower = _lower_kd(measured, arm)
        others += [] if lower is None else [("lower kd", lower)]
        others += [(one.predictions.arm.label, one) for one in measured.arms if one.predictions.arm.role == "control"]
    for against, other in others:
        if other.predictions.arm.label != arm.label:
            yield compare(own.predictions, other.predictions, own.score, other.score, against=against)


def _plain(measured: Measured, arm: Arm) -> Scored | None:
    """The arm of the experiment `PLAIN` that another combined experiment is compared with; None where it is not clear.

    Of several the one of the same weights, else the main one.
    """
    if arm.name == PLAIN:
        return None
    plain = [one for one in measured.arms if (one.predictions.arm.role, one.predictions.arm.name) == (PLAIN, PLAIN)]
    same = [one for one in plain if _weights(one.predictions.arm) == _weights(arm)]
    main = [one for one in plain if one.predictions.arm.is_main]
    return next((found[0] for found in (same, main, plain) if len(found) == 1), None)


def _weights(arm: Arm) -> tuple[object, ...]:
    return arm.kd_weight, arm.lm_weight, arm.gold_fraction, arm.num_gold


def _lower_kd(measured: Measured, arm: Arm) -> Scored | None:
    """The combined arm of the next lower KD weight that differs in nothing else."""
    candidates = [one for one in measured.arms if one.predictions.arm.role == "combined"]
    lower = [one for one in candidates if _differs_only_in_kd(one.predictions.arm, arm)]
    lower = [one for one in lower if one.predictions.arm.kd_weight < arm.kd_weight]
    return max(lower, key=lambda one: one.predictions.arm.kd_weight, default=None)


def _differs_only_in_kd(arm: Arm, other: Arm) -> bool:
    def rest(of: Arm) -> dict[str, object]:
        return {name: value for name, value in of.differing.items() if name != KD_WEIGHT}

    return (arm.is_pool, rest(arm), arm.lm_weight, arm.gold_fraction, arm.num_gold) == (
        other.is_pool,
        rest(other),
        other.lm_weight,
        other.gold_fraction,
        other.num_gold,
    )


def _pgr(measured: Measured, own: Scored) -> Interval | None:
    if measured.no_gap is not None:
        return None
    weak, ceiling = (measured.main[role].score for role in ("teacher", "ceiling"))
    return performance_gap_recovered(own.score, weak, ceiling)


# ---------------------------------------------------------------------------------- truth and teacher


def _calibration(measured: Measured, predictions: ArmPredictions) -> Calibration | None:
    """Against the truth."""
    answer_M, probability_RMC = measured.held_out.answer_M, predictions.probability_RMC
    if measured.metric != "accuracy" or answer_M is None or probability_RMC is None:
        return None
    answer_MC = np.eye(probability_RMC.shape[2])[answer_M]
    return calibration(probability_RMC, answer_MC, predictions.credit_RM)


def _teacher_calibration(measured: Measured, position: int) -> Calibration | None:
    """Against the choice of the teacher, as if it were the truth."""
    predictions, cells = measured.arms[position].predictions, measured.cells[position]
    if predictions.arm.role == "teacher" or predictions.probability_RMC is None:
        return None
    if cells is None or measured.teacher_MC is None:
        return None
    teacher_MC = measured.teacher_MC[:, : predictions.probability_RMC.shape[2]]
    return calibration(predictions.probability_RMC, teacher_MC, cells.same_RM)


def _imitation(measured: Measured, position: int) -> Imitation | None:
    arm, teacher = measured.arms[position].predictions.arm, measured.main.get("teacher")
    if teacher is None or arm.role == "teacher" or position not in measured.cell_rates:
        return None
    gold_only = next(
        (rates[0] for at, rates in measured.cell_rates.items() if _is_main_gold_only(measured.arms[at], arm)), None
    )
    return imitation(measured.cell_rates[position], gold_only, teacher.predictions.credit_RM[0])


def _is_main_gold_only(one: Scored, other_than: Arm) -> bool:
    arm = one.predictions.arm
    return arm.role == "gold_only" and arm.is_main and arm.label != other_than.label
