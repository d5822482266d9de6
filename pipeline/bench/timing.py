"""Comparable measurements: the variants take turns, so that machine noise affects every variant equally."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """Median and range of the same measurement in several runs."""

    median: float
    min: float
    max: float
    runs: int


Results = dict[str, Figure | list[dict[str, str | float]]]
"""Key in the JSON file -> a figure, or the rows of a table."""


def summarize(values: Sequence[float]) -> Figure:
    """Median and range of the values."""
    return Figure(median=statistics.median(values), min=min(values), max=max(values), runs=len(values))


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> Figure:
    """Median and range of numerator / denominator, run by run; both lists have one value per run."""
    return summarize([above / below for above, below in zip(numerators, denominators, strict=True)])


def run_in_turns(
    measurements: Mapping[str, Callable[[], float]], *, runs: int, warm_up: bool = True
) -> dict[str, list[float]]:
    """The values that each measurement returns in `runs` rounds; with `warm_up`, one round before them is not counted.

    Each round runs every measurement once, in a random order. In a fixed order the effects of one measurement (freed
    memory, a hot CPU) would always slow down the same next one.
    """
    values: dict[str, list[float]] = {name: [] for name in measurements}
    first_counted = 1 if warm_up else 0
    for turn in range(first_counted + runs):
        for name in random.Random(turn).sample(list(measurements), len(measurements)):
            value = measurements[name]()
            if turn >= first_counted:
                values[name].append(value)
    return values


def seconds(function: Callable[[], object]) -> float:
    """The wall-clock seconds of one call."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def table(title: str, rows: Sequence[Sequence[str]]) -> str:
    """A title and, indented below it, the rows in aligned columns; the first row is the header."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([title, *(f"  {line}" for line in lines)])


def format_figure(figure: Figure, number_format: str = ".3g") -> str:
    """For example "2.5 (2.1 to 3.0, 5 runs)": the median and, in brackets, the range."""
    low, high = f"{figure.min:{number_format}}", f"{figure.max:{number_format}}"
    return f"{figure.median:{number_format}} ({low} to {high}, {figure.runs} runs)"
