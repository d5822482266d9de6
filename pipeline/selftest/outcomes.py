"""What a check finds, and the table of all of them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

Outcome = Enum("Outcome", ["PASS", "FAIL", "SKIPPED"])

NAME_WIDTH, FIGURES_WIDTH = 21, 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The result of one check."""

    outcome: Outcome
    figures: str
    """What was measured, with the limit; of a skipped check the reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A line of the table."""

    check: str
    outcome: Outcome
    figures: str
    seconds: float


def judged(is_right: bool, figures: str) -> Finding:
    """PASS or FAIL, with the figures that decide it."""
    return Finding(outcome=Outcome.PASS if is_right else Outcome.FAIL, figures=figures)


def skipped(reason: str) -> Finding:
    """A check that this machine cannot make."""
    return Finding(outcome=Outcome.SKIPPED, figures=reason)


def line(check: str, outcome: str, figures: str, seconds: str) -> str:
    """A line of the table; long figures move the last column."""
    return f"{check:<{NAME_WIDTH}} | {outcome:<7} | {figures:<{FIGURES_WIDTH}} | {seconds:>7}"


def line_of(row: Row) -> str:
    """A row as its line."""
    return line(row.check, row.outcome.name, row.figures, f"{row.seconds:.1f}")
