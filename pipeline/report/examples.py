"""Held-out records as text: where the student copied an error of the teacher, corrected one, or made one of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from pipeline.analysis.values import ArmPredictions, Example
from pipeline.core.types import Record
from pipeline.report.arms import ArmRuns
from pipeline.report.predictions import TextPredictions

EXAMPLES_PER_KIND = 5
MAX_CHARACTERS = 1500
"""Of a prompt: a longer one loses its middle."""
SHOWN_ROLES = ("teacher", "zero_shot", "gold_only", "weak_only", "combined")


def find_examples(arms: list[ArmRuns], text: TextPredictions, records: Mapping[bytes, Record]) -> tuple[Example, ...]:
    """Records of each kind; none without a teacher, a combined arm and the records' text, or on text without answers.

    The answers are those of the first seed. Records on which more seeds of combined agree come first, then those on
    which gold_only does otherwise (its own labels do not explain the answer), then those of which combined is surest.
    """
    main = {found.arm.role: found for found in text.arms if found.arm.is_main}
    if not records or not {"teacher", "combined"} <= main.keys() or text.metric == "-nll":
        return ()
    answers = {role: _answers(main[role], arms, text, records) for role in SHOWN_ROLES if role in main}
    examples: list[Example] = []
    for kind, rows in _ranked(main, _same_answer(main, arms, text)).items():
        for m in rows:
            record = records[text.keys[m]]
            if len([e for e in examples if e.kind == kind]) < EXAMPLES_PER_KIND:
                examples.append(
                    Example(
                        kind=kind,
                        prompt=shortened(record.prompt or ""),
                        truth=_truth(record),
                        answers={role: answer(m) for role, answer in answers.items()},
                    )
                )
    return tuple(examples)


def _generated(label: str, arms: list[ArmRuns], text: TextPredictions) -> np.ndarray:
    """The generated answers of all runs of an arm, [R, M]."""
    runs = next(of_arm.runs for of_arm in arms if of_arm.arm.label == label)
    return np.stack([text.tables[run.folder]["generated"].to_numpy() for run in runs])


def _same_answer(main: Mapping[str, ArmPredictions], arms: list[ArmRuns], text: TextPredictions) -> np.ndarray:
    """Where runs of combined answer as the teacher's first run does, [R, M]."""
    teacher, combined = main["teacher"], main["combined"]
    if combined.predicted_RM is None or teacher.predicted_RM is None:
        teacher_RM = _generated(teacher.arm.label, arms, text)
        return np.asarray(_generated(combined.arm.label, arms, text) == teacher_RM[0])
    return np.asarray(combined.predicted_RM == teacher.predicted_RM[0])


def _ranked(main: Mapping[str, ArmPredictions], same_RM: np.ndarray) -> dict[str, list[int]]:
    """Record indices of each kind, the most telling first; records with tied choices are not shown."""
    teacher, combined = main["teacher"], main["combined"]
    teacher_right_M, right_RM = teacher.credit_RM[0] == 1, combined.credit_RM == 1
    shown_M = np.ones(len(teacher_right_M), dtype=bool)
    surest_M = np.zeros(len(teacher_right_M))
    if combined.num_tied_RM is not None and teacher.num_tied_RM is not None:
        assert combined.probability_RMC is not None
        surest_M = combined.probability_RMC[0].max(axis=1)
        shown_M = (combined.num_tied_RM[0] == 1) & (teacher.num_tied_RM[0] == 1)
    kinds = {
        "copied": ~teacher_right_M & ~right_RM & same_RM,
        "corrected": ~teacher_right_M & right_RM,
        "damaged": teacher_right_M & ~right_RM,
    }
    gold = main["gold_only"].credit_RM[0] == 1 if "gold_only" in main else None
    ranked = {}
    for kind, is_kind_RM in kinds.items():
        otherwise_M = np.zeros_like(shown_M) if gold is None else gold == (kind != "corrected")
        order = np.lexsort((-surest_M, ~otherwise_M, -is_kind_RM.mean(axis=0)))
        ranked[kind] = [int(m) for m in order if is_kind_RM[0, m] and shown_M[m]]
    return ranked


def _answers(
    predictions: ArmPredictions, arms: list[ArmRuns], text: TextPredictions, records: Mapping[bytes, Record]
) -> Callable[[int], str]:
    """A function from the index of a record to the answer of an arm's first seed, as text."""
    if predictions.predicted_RM is not None:
        predicted_M = predictions.predicted_RM[0]
        return lambda m: records[text.keys[m]].choices[predicted_M[m]].strip()
    generated_M = _generated(predictions.arm.label, arms, text)[0]
    return lambda m: str(generated_M[m])


def _truth(record: Record) -> str:
    if record.choices and record.answer is not None:
        return record.choices[record.answer].strip()
    return (record.completion or "").strip()


def shortened(text: str) -> str:
    """A text of at most MAX_CHARACTERS, without its middle where it is longer, which is marked."""
    if len(text) <= MAX_CHARACTERS:
        return text
    half = MAX_CHARACTERS // 2
    return f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"
