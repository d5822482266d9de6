"""Folds: the sequences of any text in k parts by their keys, the same in every process, order and file.

Equal sequences have equal keys, so a sequence that a text repeats never stands in two folds. A record can: where it
is packed beside others, or stands in gold with its answer and in the corpus without, its sequences have other keys.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from pipeline.core.types import InputError


def fold_of(key: bytes, num_folds: int) -> int:
    """The fold of a sequence, 0 to k - 1: the first 8 bytes of its key as a big-endian number, modulo k."""
    return int.from_bytes(key[:8], "big") % num_folds


@dataclass(frozen=True, slots=True, kw_only=True)
class Fold:
    """One of the `of` folds of a text."""

    number: int
    """From 0."""
    of: int
    """k, 2 or more."""

    def holds(self, key: bytes) -> bool:
        """Whether the sequence with this key is one of the fold."""
        return fold_of(key, self.of) == self.number

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


def parse_fold(text: str, what: str) -> Fold:
    """The fold of an option, which is written j/k; InputError, which names the option, for anything else."""
    found = index_and_count(text)
    if found is None or found[1] < 2 or text != str(fold := Fold(number=found[0], of=found[1])):
        raise InputError(
            f"{what}: expected j/k, fold j (from 0 to k - 1) of k (2 or more), found {text!r}; as in {what}=0/5"
        )
    return fold


def index_and_count(text: str) -> tuple[int, int] | None:
    """The numbers of INDEX/COUNT with INDEX below COUNT; None for any other text."""
    match = re.fullmatch(r"(\d+)/(\d+)", text, re.ASCII)
    return (int(match[1]), int(match[2])) if match and int(match[1]) < int(match[2]) else None
