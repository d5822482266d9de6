"""Measurements that can be compared: several runs of each thing in turn, so that a machine's moods hit all alike."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """What several runs gave."""

    median: float
    min: float
    max: float
    runs: int


Findings = dict[str, Figure | list[dict[str, str | float]]]
"""Stable keys -> a figure, or a list of rows."""


def figure(values: Sequence[float]) -> Figure:
    """Median and range of some values."""
    return Figure(median=statistics.median(values), min=min(values), max=max(values), runs=len(values))


def ratios(ones: Sequence[float], others: Sequence[float]) -> Figure:
    """One over other, pair by pair."""
    return figure([one / other for one, other in zip(ones, others, strict=True)])


def in_turn(things: Mapping[str, Callable[[], float]], *, runs: int, warm_up: bool = True) -> dict[str, list[float]]:
    """What each thing returns, `runs` times, each round in another order; a first round is not counted.

    What a thing leaves behind (pages to be returned, a hot CPU) would otherwise always burden the same one.
    """
    found: dict[str, list[float]] = {name: [] for name in things}
    for turn in range(runs + warm_up):
        for name in random.Random(turn).sample(list(things), len(things)):
            value = things[name]()
            if turn >= warm_up:
                found[name].append(value)
    return found


def seconds(thing: Callable[[], object]) -> float:
    """How long a call takes."""
    started = time.perf_counter()
    thing()
    return time.perf_counter() - started


def table(title: str, rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns under a title; the first row is the head."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([title, *(f"  {line}" for line in lines)])


def shown(value: Figure, form: str = ".3g") -> str:
    """A figure as people read it: the median and, in brackets, the range."""
    return f"{value.median:{form}} ({value.min:{form}} to {value.max:{form}}, {value.runs} runs)"
