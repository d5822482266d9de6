"""What the charts of the report share: drawings, colours of roles, labels that do not overlap, SVG and PNG."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt
import vl_convert

from pipeline.core.chart_style import CONFIG, LIGHT
from pipeline.page.html import for_xml

Row = Mapping[str, Any]

COLORS = {
    "teacher": LIGHT["purple"],
    "zero_shot": LIGHT["grey"],
    "gold_only": LIGHT["amber"],
    "weak_only": LIGHT["teal"],
    "combined": LIGHT["blue"],
    "control": LIGHT["red"],
    "ceiling": LIGHT["slate"],
}
"""By role; a label has the colour of what it names."""

LABEL_SIZE, LABEL_GAP, LABEL_LIMIT = 11, 14, 150
"""Height of a label, distance from one to the next, and its greatest width, pixels."""
PADDING = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """A figure of the page, which is also a file."""

    name: str
    """Of its file, without ending."""
    title: str
    caption: str
    wide: str
    """SVG."""
    narrow: str | None = None
    """The same for the width of a phone; None where `wide` fits it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """Size of the area inside the axes, pixels."""

    width: int
    height: int


def spread(positions: Sequence[float], gap: float) -> list[float]:
    """The positions moved as little as needed, so that neighbours are at least `gap` apart; their order stays.

    Positions that would overlap become a group, evenly spaced about the mean of its members; groups that touch merge.
    """
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    groups: list[list[int]] = []

    def start(group: list[int]) -> float:
        return sum(positions[i] for i in group) / len(group) - gap * (len(group) - 1) / 2

    for i in order:
        groups.append([i])
        while len(groups) > 1 and start(groups[-2]) + gap * len(groups[-2]) > start(groups[-1]):
            last = groups.pop()
            groups[-1] += last
    moved = [0.0] * len(positions)
    for group in groups:
        for place, i in enumerate(group):
            moved[i] = start(group) + gap * place
    return moved


def domain(values: Sequence[float], *, margin: float = 0.06) -> list[float]:
    """From the least to the greatest value with a margin on both sides; never empty."""
    low, high = min(values), max(values)
    space = margin * (high - low) or 0.05 * abs(high) or 1.0
    return [low - space, high + space]


def labels_at_end(rows: Sequence[Row], *, x: float, scale: Sequence[float], height: int) -> Any:
    """A label to the right of the plot for each row (y, label, color), moved apart where two would overlap."""
    unit = (scale[1] - scale[0]) / height
    moved = spread([row["y"] for row in rows], LABEL_GAP * unit)
    placed = [{**row, "x": x, "y": y} for row, y in zip(rows, moved, strict=True)]
    base = data(placed).mark_text(align="left", dx=8, fontSize=LABEL_SIZE, limit=LABEL_LIMIT, aria=False)
    return base.encode(x="x:Q", y="y:Q", text="label:N", color=alt.Color("color:N", scale=None))


def data(rows: Sequence[Row]) -> Any:
    """A chart over rows, without marks yet; they are one string, which altair need not copy with each layer.

    Text of the rows is made fit for XML here, because the renderer ends the process where it is not.
    """
    fit = [{key: for_xml(value) if isinstance(value, str) else value for key, value in row.items()} for row in rows]
    return alt.Chart(alt.Data(values=json.dumps(fit), format=alt.DataFormat(type="json")))


def to_svg(chart: Any, *, name: str) -> str:
    """The chart as SVG whose ids begin with `name`, so that several can stand in one page."""
    # what altair checks while it builds is enough: checking the whole once more takes longer than drawing it
    spec = chart.to_dict(validate=False)
    svg = vl_convert.vegalite_to_svg(spec | {"config": CONFIG, "background": LIGHT["surface"], "padding": PADDING})
    svg = re.sub(r'(id="|url\(#)(?=clip|gradient)', rf"\g<1>{name}-", svg)
    return re.sub(r' (?:d|transform|x|y|x1|x2|y1|y2|width|height)="[^"]*"', _rounded, svg)


def _rounded(attribute: re.Match[str]) -> str:
    """Coordinates to a hundredth of a pixel: half the size."""
    return re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}".rstrip("0").rstrip("."), attribute[0])


def to_png(svg: str) -> bytes:
    """The picture at twice its size."""
    return bytes(vl_convert.svg_to_png(svg, scale=2))
