"""What the figures of a text are made of: the rates of all arms, over the same resampled records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pipeline.analysis import imitation, slices
from pipeline.analysis.bootstrap import Rate, Ratio, rates
from pipeline.analysis.gap import why_no_gap
from pipeline.analysis.values import ArmPredictions, HeldOut


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scored:
    """Predictions with the rate that is their score."""

    predictions: ArmPredictions
    score: Rate


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Measured:
    """Lists follow the arms."""

    held_out: HeldOut
    metric: str
    arms: Sequence[Scored]
    main: Mapping[str, Scored]
    """By role. The teacher with its first run alone: the one whose outputs are in the cache."""
    no_gap: str | None
    """Why there is no PGR."""
    teacher_MC: np.ndarray | None
    """Probability that the teacher takes a choice, ties broken at random; None without a teacher or without choices."""
    cells: Sequence[imitation.Cells | None]
    """None without choices."""
    cell_rates: Mapping[int, Sequence[Rate]]
    """Imitation, correction, damage and agreement, by position of the arm; empty where the teacher is always right or
    always wrong: there are no two cells then."""
    parts: Sequence[slices.Part]
    part_scores: Sequence[Sequence[Rate]]


def measure(arms: Sequence[ArmPredictions], held_out: HeldOut, metric: str) -> Measured:
    """The rates of all arms at once."""
    is_fraction = metric != "-nll"
    teacher = next((_first_run(arm) for arm in arms if arm.arm.role == "teacher" and arm.arm.is_main), None)
    teacher_MC = _teacher_choices(arms, teacher) if metric == "accuracy" else None
    cells = [_cells(arm, teacher, teacher_MC) for arm in arms]
    cell_ratios = _cell_ratios(arms, cells, teacher)
    parts = slices.parts_of(held_out, teacher, arms[0].weight_M)
    scored = [*arms, *([] if teacher is None else [teacher])]
    ratios = [_scores(scored, scored[0].weight_M, is_fraction=is_fraction)]
    ratios += [_scores(arms, arms[0].weight_M * part.is_in_M, is_fraction=is_fraction) for part in parts]
    found = rates([*ratios, *cell_ratios])
    with_scores = [Scored(predictions=one, score=score) for one, score in zip(scored, found[0], strict=True)]
    main = {one.predictions.arm.role: one for one in with_scores if one.predictions.arm.is_main}
    weak, ceiling = (main[role].score if role in main else None for role in ("teacher", "ceiling"))
    with_cells = [position for position, own in enumerate(cells) if own is not None] if cell_ratios else []
    return Measured(
        held_out=held_out,
        metric=metric,
        arms=with_scores[: len(arms)],
        main=main,
        no_gap=why_no_gap(weak, ceiling),
        teacher_MC=teacher_MC,
        cells=cells,
        cell_rates=dict(zip(with_cells, zip(*found[len(ratios) :], strict=True), strict=True)),
        parts=parts,
        part_scores=[[of_part[position] for of_part in found[1 : len(ratios)]] for position in range(len(arms))],
    )


def _first_run(arm: ArmPredictions) -> ArmPredictions:
    """The same arm with its first run alone."""
    return replace(
        arm,
        credit_RM=arm.credit_RM[:1],
        predicted_RM=None if arm.predicted_RM is None else arm.predicted_RM[:1],
        probability_RMC=None if arm.probability_RMC is None else arm.probability_RMC[:1],
        num_tied_RM=None if arm.num_tied_RM is None else arm.num_tied_RM[:1],
    )


def _scores(arms: Sequence[ArmPredictions], weight_M: np.ndarray, *, is_fraction: bool) -> Ratio:
    return Ratio(
        arm_labels=[arm.arm.label for arm in arms],
        values_RM=[arm.credit_RM for arm in arms],
        weight_M=weight_M,
        is_fraction=is_fraction,
    )


def _teacher_choices(arms: Sequence[ArmPredictions], teacher: ArmPredictions | None) -> np.ndarray | None:
    """MC: the teacher's choice shares, with room for the choices of all arms."""
    if teacher is None or teacher.predicted_RM is None:
        return None
    num_choices = max(int(arm.predicted_RM.max()) + 1 for arm in arms if arm.predicted_RM is not None)
    widths = [arm.probability_RMC.shape[2] for arm in arms if arm.probability_RMC is not None]
    return imitation.choice_shares(teacher, max([num_choices, *widths]))[0]


def _cells(
    arm: ArmPredictions, teacher: ArmPredictions | None, teacher_MC: np.ndarray | None
) -> imitation.Cells | None:
    if teacher is None or teacher_MC is None or arm.predicted_RM is None:
        return None
    return imitation.cells(arm, teacher_MC, teacher.credit_RM[0])


def _cell_ratios(
    arms: Sequence[ArmPredictions], cells: Sequence[imitation.Cells | None], teacher: ArmPredictions | None
) -> tuple[Ratio, ...]:
    """None where a cell of the teacher has no record."""
    found = [(arm.arm.label, own) for arm, own in zip(arms, cells, strict=True) if own is not None]
    if teacher is None or not found or not 0 < teacher.credit_RM[0].sum() < teacher.credit_RM.shape[1]:
        return ()
    return imitation.ratios([label for label, _ in found], [own for _, own in found], teacher.credit_RM[0])
