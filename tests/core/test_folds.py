"""Folds by key: the law, and how an option names one."""

from __future__ import annotations

import pytest

from pipeline.core.folds import Fold, fold_of, parse_fold
from pipeline.core.types import InputError


def test_the_law() -> None:
    """The first 8 of 16 bytes, big endian, modulo k; whatever follows them."""
    key = bytes([0, 0, 0, 0, 0, 0, 1, 3]) + bytes(8)
    assert [fold_of(key, k) for k in (2, 3, 5, 259, 260)] == [259 % k for k in (2, 3, 5, 259, 260)]
    assert fold_of(key[:8] + b"\xff" * 8, 5) == fold_of(key, 5)
    assert fold_of(bytes([1]) + bytes(15), 1000) == 2**56 % 1000


@pytest.mark.parametrize("num_folds", [2, 3, 7])
def test_each_key_is_in_one_fold(num_folds: int) -> None:
    for number in range(200):
        key = (number * 2**56 + number).to_bytes(8, "big") + bytes(8)
        assert sum(Fold(number=j, of=num_folds).holds(key) for j in range(num_folds)) == 1


def test_how_a_fold_is_written() -> None:
    assert parse_fold("4/5", "leave_out") == Fold(number=4, of=5)
    assert str(Fold(number=4, of=5)) == "4/5"


@pytest.mark.parametrize("wrong", ["5/5", "0/1", "1", "-1/5", "1/5/7", "01/5", "1/05", " 1/5", "a/b", "", "0/0", "٠/5"])
def test_anything_else_is_refused(wrong: str) -> None:
    with pytest.raises(InputError, match="leave_out: expected j/k, fold j"):
        parse_fold(wrong, "leave_out")
