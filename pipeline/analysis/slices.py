"""Scores on parts of a held-out text: by class, by length of the prompt, by the teacher's confidence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.analysis.bootstrap import Rate, interval_of
from pipeline.analysis.imitation import Cells
from pipeline.analysis.values import ArmPredictions, HeldOut, Slice

MAX_CLASSES = 30
MIN_RECORDS = 5
"""Smaller and further classes are one part together: an interval for each of hundreds cannot be read."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Part:
    """Some of the records."""

    by: str
    """class, other classes, length, teacher confidence."""
    value: str
    is_in_M: np.ndarray


def parts_of(held_out: HeldOut, teacher: ArmPredictions | None, weight_M: np.ndarray) -> tuple[Part, ...]:
    """All parts that the records are divided into, as far as classes, lengths and probabilities are known.

    Lengths and the teacher's probability of its choice are divided at their quartiles. A part whose records all have
    the weight 0, as records without a known target, has no score and is left out.
    """
    parts: list[Part] = []
    if held_out.class_M is not None:
        parts += _by_class(held_out.class_M)
    if held_out.length_M is not None:
        parts += _by_quartile("length", held_out.length_M.astype(float), "{:.0f}")
    if teacher is not None and teacher.probability_RMC is not None:
        parts += _by_quartile("teacher confidence", teacher.probability_RMC[0].max(axis=1), "{:.2f}")
    return tuple(part for part in parts if weight_M[part.is_in_M].sum() > 0)


def _by_class(class_M: np.ndarray) -> Iterator[Part]:
    """One part for each class of enough records, most frequent first; none where no class has enough."""
    names, counts = np.unique(class_M.astype(str), return_counts=True)
    order = np.argsort(-counts, kind="stable")
    shown = [names[i] for i in order if counts[i] >= MIN_RECORDS][:MAX_CLASSES]
    for name in shown:
        yield Part(by="class", value=str(name), is_in_M=class_M.astype(str) == name)
    if shown and len(shown) < len(names):
        is_other_M = ~np.isin(class_M.astype(str), shown)
        yield Part(by="other classes", value=f"{len(names) - len(shown)} together", is_in_M=is_other_M)


def _by_quartile(by: str, value_M: np.ndarray, form: str) -> Iterator[Part]:
    """Up to four parts; fewer where quartiles are equal. The bounds shown are the extreme values in a part."""
    edges = np.unique(np.quantile(value_M, [0.25, 0.5, 0.75]))
    part_M = np.searchsorted(edges, value_M)
    for part in np.unique(part_M):
        is_in_M = part_M == part
        low, high = (form.format(bound) for bound in (value_M[is_in_M].min(), value_M[is_in_M].max()))
        yield Part(by=by, value=low if low == high else f"{low} to {high}", is_in_M=is_in_M)


def slices(
    parts: Sequence[Part], scores: Sequence[Rate], teacher: ArmPredictions | None, own: Cells | None
) -> tuple[Slice, ...]:
    """The slices of one arm from its scores on the parts; `own`: its cells against the teacher."""
    found = []
    for part, score in zip(parts, scores, strict=True):
        here_M = part.is_in_M
        weak = None if teacher is None else float(teacher.credit_RM[0, here_M].sum() / teacher.weight_M[here_M].sum())
        copied = None
        if own is not None and teacher is not None:
            num_wrong = float((1 - teacher.credit_RM[0, here_M]).sum())
            copied = float(own.copied_RM[:, here_M].sum(axis=1).mean()) / num_wrong if num_wrong > 0 else None
        found.append(
            Slice(
                by=part.by,
                value=part.value,
                num_records=int(here_M.sum()),
                score=interval_of(score),
                teacher_score=weak,
                imitation=copied,
            )
        )
    return tuple(found)
