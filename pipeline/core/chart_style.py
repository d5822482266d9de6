"""How charts look: one palette for light and dark, one style, and the histogram that two packages draw.

The colours differ for all common kinds of colour blindness, and as text each has a contrast of at least 4.5:1 on its
background: a label has the colour of its line.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt

LIGHT = {
    "text": "#1c2430",
    "muted": "#5a6473",
    "grid": "#e4e7eb",
    "surface": "#ffffff",
    "panel": "#f4f6f8",
    "blue": "#1d5fae",
    "amber": "#935d00",
    "teal": "#0b7268",
    "purple": "#7b3f9e",
    "red": "#b23a2a",
    "grey": "#6b7280",
    "slate": "#445061",
}
DARK = {
    "text": "#e7eaef",
    "muted": "#a4aebb",
    "grid": "#2e3744",
    "surface": "#171d26",
    "panel": "#1f2732",
    "blue": "#82b4f6",
    "amber": "#e3ad45",
    "teal": "#4fc4b4",
    "purple": "#cb9fe8",
    "red": "#f2897a",
    "grey": "#98a3b1",
    "slate": "#bcc6d4",
}
"""The same names as in LIGHT: a chart is drawn in light colours, and a page in the dark replaces each by its twin."""

FONT = "Inter, system-ui, sans-serif"


CONFIG: dict[str, Any] = {
    "font": FONT,
    "view": {"stroke": None},
    "title": {
        "anchor": "start",
        "color": LIGHT["text"],
        "subtitleColor": LIGHT["muted"],
        "fontSize": 14,
        "subtitleFontSize": 12,
    },
    "axis": {
        "gridColor": LIGHT["grid"],
        "domain": False,
        "ticks": False,
        "labelColor": LIGHT["muted"],
        "labelPadding": 6,
        "labelFontSize": 11,
        "titleColor": LIGHT["muted"],
        "titleFontWeight": "normal",
        "titleFontSize": 11,
    },
}
"""Of a chart, in the words of Vega-Lite: the common font, axes without lines or ticks."""


def histogram(counts: Sequence[float], *, high: float, color: str, axis: alt.Axis) -> Any:
    """Counts in equal bins from 0 to `high`, drawn as fractions of their sum."""
    total, step = max(sum(counts), 1), high / len(counts)
    rows = [{"from": i * step, "to": (i + 1) * step, "fraction": count / total} for i, count in enumerate(counts)]
    base = alt.Chart(alt.Data(values=rows)).mark_bar(color=color, binSpacing=1)
    return base.encode(
        x=alt.X("from:Q", bin="binned", title=None, axis=axis, scale=alt.Scale(domain=[0, high], nice=False)),
        x2="to:Q",
        y=alt.Y("fraction:Q", title=None, axis=alt.Axis(format="~%", tickCount=4)),
    )
