"""The table of arms: every number of every arm, sortable and filterable by page.js, readable without it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from pipeline.analysis.values import ArmFigures, Imitation, Interval, TextFigures
from pipeline.page import numbers
from pipeline.page.html import Html, tag

NAMED_OPTIONS = ("loss.kd.weight", "loss.lm.weight", "gold_fraction")
"""Options with columns of their own, whether they differ within a role or not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """What a cell shows, and the value by which its column is sorted."""

    text: str
    value: float | str
    note: str = ""
    """Smaller, after the text: an interval."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column, left out where all cells are empty; a setting also where all are equal."""

    title: str
    cell: Callable[[ArmFigures], Cell | None]
    is_setting: bool = False
    is_text: bool = False


def arm_table(text: TextFigures) -> Html:
    """All arms, by role, with search and role filter above."""
    order = list(numbers.ROLES)
    arms = sorted(text.arms, key=lambda figures: (order.index(figures.arm.role), not figures.arm.is_main))
    columns = [column for column in _columns(text) if _is_shown([column.cell(figures) for figures in arms], column)]
    head = tag("tr", *(_head(column.title, column.is_text) for column in columns))
    rows = [_row(figures, columns) for figures in arms]
    table = tag("table", tag("thead", head), tag("tbody", *rows), class_="sortable", id="arms")
    scroll = tag("div", table, class_="scroll", tabindex=0, role="region", aria_label="Table of arms")
    note = tag("p", "On paper the first columns alone; all are on the screen and in arms.parquet.", class_="print-note")
    return tag("div", _controls(arms), scroll, note, class_="card table-card")


def _columns(text: TextFigures) -> list[Column]:
    scale = numbers.SCALES[text.metric]
    options = dict.fromkeys(name for figures in text.arms for name in figures.arm.differing)
    return [
        Column(title="Arm", cell=lambda f: Cell(text=f.arm.label, value=f.arm.label), is_text=True),
        Column(title="Role", cell=lambda f: _text_cell(numbers.ROLES[f.arm.role]), is_text=True),
        Column(title=scale.title.split(" of ")[0], cell=lambda f: _interval(f.score, scale)),
        Column(title="KD weight", cell=lambda f: _number(f.arm.kd_weight), is_setting=True),
        *(_option(name) for name in options if name not in NAMED_OPTIONS),
        *(_comparison(role, scale) for role in ("gold_only", "weak_only", "combined", "teacher", "zero_shot")),
        Column(title="PGR", cell=_pgr),
        *(Column(title=title, cell=partial(_imitation, find)) for title, find in RATES.items()),
        Column(title="Perplexity", cell=lambda f: _perplexity(f) if text.metric == "-nll" else None),
        Column(title="Nll", cell=lambda f: None if f.nll is None else _nats(f.nll)),
        Column(title="ECE", cell=lambda f: None if f.calibration is None else _rate(f.calibration.ece)),
        Column(title="Ties", cell=lambda f: _number(f.num_ties) if f.num_ties else None),
        Column(title="LM weight", cell=lambda f: _number(f.arm.lm_weight), is_setting=True),
        Column(title="Gold fraction", cell=lambda f: _number(f.arm.gold_fraction), is_setting=True),
        Column(title="Gold records", cell=lambda f: _number(f.arm.num_gold), is_setting=True),
        Column(
            title="Control", cell=lambda f: None if f.arm.control == "none" else _text_cell(f.arm.control), is_text=True
        ),
        Column(title="Seeds", cell=lambda f: _number(len(f.arm.seeds)), is_setting=True),
    ]


def _option(name: str) -> Column:
    def cell(figures: ArmFigures) -> Cell | None:
        value = figures.arm.differing.get(name)
        if value is None:
            return None
        return _number(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else _text_cell(value)

    return Column(title=name, cell=cell)


def _comparison(role: str, scale: numbers.Scale) -> Column:
    def cell(figures: ArmFigures) -> Cell | None:
        found = (comparison for comparison in figures.comparisons if comparison.against == role)
        comparison = next(found, None)
        return None if comparison is None else _difference(comparison.difference, scale)

    return Column(title=f"{numbers.MINUS} {numbers.ROLES[role]}", cell=cell)


def _interval(interval: Interval, scale: numbers.Scale = numbers.PERCENT) -> Cell:
    return Cell(text=numbers.score(interval.value, scale), value=interval.value, note=numbers.bounds(interval, scale))


def _difference(interval: Interval | None, scale: numbers.Scale) -> Cell | None:
    if interval is None:
        return None
    shown = numbers.decimal(interval.value * scale.factor, scale.digits, signed=True)
    return Cell(text=shown, value=interval.value, note=numbers.bounds(interval, scale, signed=True))


def _pgr(figures: ArmFigures) -> Cell | None:
    if figures.pgr is None:
        return None if figures.pgr_refused is None else Cell(text="none", value="", note=figures.pgr_refused)
    note = numbers.bounds(figures.pgr, numbers.RATIO)
    return Cell(text=numbers.score(figures.pgr.value, numbers.RATIO), value=figures.pgr.value, note=note)


def _imitation(find: Callable[[Imitation], Interval | None], figures: ArmFigures) -> Cell | None:
    """One of its rates; excess imitation is a difference of two."""
    interval = None if figures.imitation is None else find(figures.imitation)
    if interval is None:
        return None
    return _difference(interval, numbers.PERCENT) if find is RATES["Excess imitation"] else _interval(interval)


RATES: dict[str, Callable[[Imitation], Interval | None]] = {
    "Imitation": lambda found: found.imitation,
    "Excess imitation": lambda found: found.excess,
    "Correction": lambda found: found.correction,
    "Damage": lambda found: found.damage,
    "Agreement": lambda found: found.agreement,
}


def _nats(value: float) -> Cell:
    return Cell(text=numbers.decimal(value, 3), value=value)


def _perplexity(figures: ArmFigures) -> Cell | None:
    """exp of the nll."""
    if figures.nll is None or figures.nll > 700:
        return None
    return Cell(text=numbers.plain(math.exp(figures.nll)), value=math.exp(figures.nll))


def _rate(value: float) -> Cell:
    return Cell(text=numbers.score(value), value=value)


def _number(value: float | None) -> Cell | None:
    return None if value is None else Cell(text=numbers.plain(value), value=value)


def _text_cell(value: Any) -> Cell:
    return Cell(text=str(value), value=str(value))


def _is_shown(cells: Sequence[Cell | None], column: Column) -> bool:
    return any(cells) and not (column.is_setting and len({cell and cell.value for cell in cells}) == 1)


def _head(title: str, is_text: bool) -> Html:
    arrow = tag("span", class_="arrow", aria_hidden="true")
    button = tag(
        "button", tag("span", title[:1].upper() + title[1:] if title in LOWERED else title), arrow, type="button"
    )
    return tag("th", button, scope="col", aria_sort="none", class_="text" if is_text else None)


LOWERED = tuple(scale.title.split(" of ")[0] for scale in numbers.SCALES.values())


def _row(figures: ArmFigures, columns: Sequence[Column]) -> Html:
    cells = []
    for column in columns:
        cell, class_ = column.cell(figures), "text" if column.is_text else None
        if column.title == "Arm":
            cells.append(tag("th", figures.arm.label, scope="row", class_="text", data_value=figures.arm.label))
        elif cell is None:
            cells.append(tag("td", class_=class_))
        else:
            note = tag("small", cell.note) if cell.note else None
            cells.append(tag("td", cell.text, note and " ", note, data_value=cell.value, class_=class_))
    arm = figures.arm
    words = [
        arm.label,
        numbers.ROLES[arm.role],
        arm.control,
        *(f"{name} {value}" for name, value in arm.differing.items()),
    ]
    searched = "; ".join(words).lower()
    return tag("tr", *cells, data_role=arm.role, data_search=searched, class_="main" if arm.is_main else None)


def _controls(arms: Sequence[ArmFigures]) -> Html:
    roles = dict.fromkeys(figures.arm.role for figures in arms)
    options = [tag("option", "all roles", value="")]
    options += [tag("option", numbers.ROLES[role], value=role) for role in roles]
    return tag(
        "div",
        tag(
            "label", tag("span", "Search"), tag("input", type="search", id="arm-search", placeholder="label or option")
        ),
        tag("label", tag("span", "Role"), tag("select", *options, id="arm-role")),
        tag("output", f"{len(arms)} of {len(arms)} arms", id="arm-count", aria_live="polite"),
        class_="controls",
        data_needs_script=True,
    )
