"""How far a student's choices follow the teacher's, against counting by hand."""

from __future__ import annotations

import math

import polars as pl
import pytest

from pipeline.evaluation.predictions import imitation

LIKELY, UNLIKELY = math.log(0.6), math.log(0.2)


def choosing(*best: int) -> list[float]:
    return [LIKELY if choice in best else UNLIKELY for choice in range(3)]


def test_imitation_is_agreement_where_the_teacher_is_wrong() -> None:
    """Six records: the student repeats one of three errors, and shares half of a tie in a fourth."""
    rows = [
        (0, [0], [0]),  # both right
        (0, [0], [1]),  # the teacher's error corrected
        (1, [2], [2]),  # the teacher's error repeated
        (2, [0], [1]),  # both wrong, in different ways
        (1, [0], [0, 2]),  # wrong, and two choices tied: the student has one of them
        (1, [1], [1, 0]),  # one of the tied choices is right: not wrong
        (None, [0], [1]),  # nobody knows
    ]
    table = pl.DataFrame({"answer": [row[0] for row in rows], "choice_log_probs": [choosing(*row[1]) for row in rows]})
    found = imitation(table, [tuple(row[2]) for row in rows])
    assert found["imitation"] == pytest.approx((0 + 1 + 0 + 0.5) / 4)
    assert found["agreement"] == pytest.approx((1 + 0 + 1 + 0 + 0.5 + 0.5 + 0) / 7)


def test_a_figure_that_no_record_has_is_left_out() -> None:
    table = pl.DataFrame({"answer": [0, None], "choice_log_probs": [choosing(0), []]})
    assert imitation(table, [(0,), ()]) == {"agreement": 1.0}
    assert imitation(table.tail(1), [()]) == {}
