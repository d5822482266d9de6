"""The rules of a choice's score, ties and credit, by hand."""

from __future__ import annotations

import pytest

from pipeline.evaluation.choice_rules import best_choices, credit, per_byte, per_token, shared_fraction, total


def test_rules_by_hand() -> None:
    """Three tokens for a text of three characters and four bytes."""
    log_probs, text = (-1.0, -2.0, -3.0), " né"
    assert (total(log_probs, text), per_byte(log_probs, text), per_token(log_probs, text)) == (-6.0, -1.5, -2.0)


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ([-2.0, -1.0, -3.0], (1,)),
        ([-1.0, -2.0, -1.0], (0, 2)),
        ([float("-inf")] * 2, (0, 1)),
        ([], ()),
        ([float("nan"), -1.0], ()),
        ([-1.0, -1.0 - 2**-52], (0,)),  # close is not equal
    ],
)
def test_best_choices(scores: list[float], best: tuple[int, ...]) -> None:
    assert best_choices(scores) == best


def test_a_tie_gives_its_credit_in_equal_parts() -> None:
    assert [credit((1,), answer) for answer in range(3)] == [0.0, 1.0, 0.0]
    assert [credit((0, 2, 3), answer) for answer in range(4)] == [1 / 3, 0.0, 1 / 3, 1 / 3]


@pytest.mark.parametrize(
    ("best", "other", "expected"),
    [((1,), (1,), 1.0), ((1,), (0,), 0.0), ((0, 2), (2, 0), 1.0), ((0, 2), (2,), 1 / 2), ((0, 1), (1, 2), 1 / 3)],
)
def test_shared_fraction(best: tuple[int, ...], other: tuple[int, ...], expected: float) -> None:
    assert shared_fraction(best, other) == shared_fraction(other, best) == expected
