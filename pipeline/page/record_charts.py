"""Charts of held-out records: calibration, parts of the records; and the retained mass of the cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt

from pipeline.analysis.values import ArmFigures, Calibration, Slice, TextFigures
from pipeline.core.chart_style import LIGHT, histogram
from pipeline.page import numbers
from pipeline.page.chart_parts import COLORS, Drawing, Plot, data, domain, to_svg
from pipeline.page.main_arms import main_arms

CALIBRATED = ("teacher", "gold_only", "weak_only", "combined", "ceiling")
MAX_SLICES = 30
WIDEST, LABEL_LIMIT, WIDE = 440, 180, 200
"""Pixels: labels and plot together; labels; the plot from which on there is room for long labels."""


def calibration(text: TextFigures) -> list[Drawing]:
    """A reliability diagram for each main arm, and combined's against the teacher's choice."""
    drawings = []
    for role, figures in main_arms(text).items():
        if role in CALIBRATED and figures.calibration is not None:
            title = numbers.ROLES[role].capitalize()
            drawings.append(_reliability(f"calibration-{role}", title, figures.calibration, COLORS[role]))
        if role == "combined" and figures.teacher_calibration is not None:
            title = "Combined, against the teacher's choice"
            drawings.append(
                _reliability(f"calibration-{role}-teacher", title, figures.teacher_calibration, LIGHT["blue"])
            )
    return drawings


def _reliability(name: str, title: str, found: Calibration, color: str) -> Drawing:
    rows = [
        {
            "x": bin_.confidence,
            "y": bin_.accuracy,
            "text": f"{bin_.num_records:,} records: confidence {numbers.score(bin_.confidence)}, "
            f"accuracy {numbers.score(bin_.accuracy)}",
        }
        for bin_ in found.bins
    ]
    word = "Over" if found.overconfidence >= 0 else "Under"
    caption = (
        f"ECE {numbers.score(found.ece)}. {word}confident by "
        f"{numbers.difference(abs(found.overconfidence)).lstrip('+')}. Brier {numbers.decimal(found.brier, 3)}."
    )
    ticks = [0, 0.25, 0.5, 0.75, 1]
    scale = alt.Scale(domain=[0, 1], nice=False)
    x = alt.X("x:Q", title="confidence", scale=scale, axis=alt.Axis(format=".0%", values=ticks, grid=False))
    y = alt.Y("y:Q", title="accuracy", scale=scale, axis=alt.Axis(format=".0%", values=ticks))
    diagonal = data([{"x": 0, "y": 0}, {"x": 1, "y": 1}]).mark_line(
        color=LIGHT["muted"], strokeDash=[4, 4], strokeWidth=1.2, aria=False
    )
    base = data(rows).encode(x=x, y=y, description="text:N")
    chart = alt.layer(
        diagonal.encode(x=x, y=y),
        base.mark_line(color=color, strokeWidth=1.6, aria=False),
        base.mark_point(color=color, filled=True, size=44, opacity=1),
        width=200,
        height=200,
    )
    svg = to_svg(chart, name=name)
    return Drawing(name=name.replace("_", "-"), title=title, caption=caption, wide=svg)


def retained_mass(counts: Sequence[int], mean: float | None, k: int | None) -> Drawing:
    """How much of the teacher's probability the kept entries hold, over the targets of the cache."""
    kept = "the kept entries" if k is None else f"the {k} kept entries"
    share = "" if mean is None else f" Mean {numbers.score(mean, numbers.PERCENT)};"
    axis = alt.Axis(format=".0%", tickCount=5, grid=False, title=f"probability of {kept}")
    caption = f"Fraction of the targets, by the probability that {kept} hold.{share} the rest is the tail."
    chart = histogram(counts, high=1.0, color=LIGHT["blue"], axis=axis)
    chart = chart.properties(width=250, height=160)
    return Drawing(
        name="retained-mass",
        title="Retained mass of the cache",
        caption=caption if share else caption.replace(". the rest", "; the rest"),
        wide=to_svg(chart, name="mass"),
    )


def slices(text: TextFigures, figures: ArmFigures) -> list[Drawing]:
    """One chart for each way to part the records: the arm, its teacher and gold only."""
    gold = main_arms(text).get("gold_only")
    gold_scores = {(part.by, part.value): part.score.value for part in gold.slices} if gold is not None else {}
    drawings = []
    for by in dict.fromkeys(part.by for part in figures.slices):
        parts = [part for part in figures.slices if part.by == by]
        shown = parts if len(parts) <= MAX_SLICES else sorted(parts, key=_gap, reverse=True)[:MAX_SLICES]
        caption = f"The {MAX_SLICES} of {len(parts)} in which the arm and its teacher differ most."
        rows = [_slice_row(part, gold_scores.get((by, part.value)), text.metric) for part in shown]
        role, slug = figures.arm.role, by.replace(" ", "-")
        wide, narrow = (
            to_svg(_slice_chart(rows, role, text.metric, plot), name=f"slice-{slug}-{plot.width}")
            for plot in (Plot(width=WIDEST - _label_width(rows), height=0), Plot(width=160, height=0))
        )
        drawings.append(
            Drawing(
                name=f"slices-{slug}",
                title=f"By {by}",
                caption=caption if len(shown) < len(parts) else "",
                wide=wide,
                narrow=narrow,
            )
        )
    return drawings


def _label_width(rows: Sequence[dict[str, Any]]) -> int:
    """About how wide the row labels are, pixels."""
    return min(LABEL_LIMIT, max(6 * len(row["label"]) for row in rows))


def _gap(part: Slice) -> float:
    return 0.0 if part.teacher_score is None else abs(part.score.value - part.teacher_score)


def _slice_row(part: Slice, gold: float | None, metric: str) -> dict[str, Any]:
    scale, score = numbers.SCALES[metric], part.score
    details = [f"{part.value}, {part.num_records:,} records: {numbers.score(score.value, scale)}"]
    if part.teacher_score is not None:
        details.append(f"teacher {numbers.score(part.teacher_score, scale)}")
    if part.imitation is not None:
        details.append(f"repeats {numbers.decimal(100 * part.imitation, 0)} % of its errors")
    return {
        "label": f"{part.value}  ({part.num_records:,})",
        "score": score.value,
        "low": score.value if score.low is None else score.low,
        "high": score.value if score.high is None else score.high,
        "teacher": part.teacher_score,
        "gold": gold,
        "text": "; ".join(details),
    }


def _slice_chart(rows: Sequence[dict[str, Any]], role: str, metric: str, plot: Plot) -> Any:
    scale = numbers.SCALES[metric]
    ends = [row[key] for row in rows for key in ("low", "high", "teacher", "gold") if row[key] is not None]
    limits = domain(ends, margin=0.03)
    if metric != "-nll":
        limits = [max(limits[0], 0.0), min(limits[1], 1.0)]
    y = alt.Y(
        "label:N",
        title=None,
        sort=None,
        axis=alt.Axis(labelColor=LIGHT["text"], labelLimit=LABEL_LIMIT if plot.width > WIDE else 128),
    )
    x = alt.X(
        "score:Q",
        title=scale.title,
        scale=alt.Scale(domain=limits, nice=False, zero=False),
        axis=alt.Axis(format=scale.axis_format, tickCount=5 if plot.width > WIDE else 3),
    )
    base = data(rows).encode(y=y)
    color = COLORS[role]
    layers = [base.mark_rule(color=color, strokeWidth=2.2, opacity=0.45, aria=False).encode(x="low:Q", x2="high:Q")]
    for key, role_of in (("gold", "gold_only"), ("teacher", "teacher")):
        known = data([row for row in rows if row[key] is not None])
        shape = "diamond" if key == "gold" else "circle"
        ring = known.mark_point(
            shape=shape, size=46, strokeWidth=1.8, color=COLORS[role_of], fill=LIGHT["surface"], opacity=1, aria=False
        )
        if any(row[key] is not None for row in rows) and role_of != role:
            layers.append(ring.encode(x=alt.X(f"{key}:Q"), y=y))
    layers.append(base.mark_point(filled=True, size=62, color=color, opacity=1).encode(x=x, description="text:N"))
    return alt.layer(*layers, width=plot.width, height=alt.Step(24))
