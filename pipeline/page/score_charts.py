"""Charts of scores: against the KD weight, paired differences, and against the number of gold records."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import altair as alt

from pipeline.analysis.values import ArmFigures, Comparison, Interval, LabelSaving, TextFigures
from pipeline.core.chart_style import LIGHT
from pipeline.page import numbers
from pipeline.page.chart_parts import COLORS, LABEL_SIZE, Drawing, Plot, Row, data, domain, labels_at_end, to_svg
from pipeline.page.html import for_xml

LINES = {"ceiling": "ceiling", "teacher": "teacher", "gold_only": "gold only", "zero_shot": "zero-shot"}
"""Roles that are drawn as horizontal lines, since they have no KD weight: ceiling, weak score, floor, untrained."""
POINTS = ("combined", "weak_only", "control")
MAX_VALUE_LABELS, MAX_SERIES, MIN_TICK_PIXELS, NAME_LIMIT = 8, 4, 30, 110
SIGNED = "datum.value === 0 ? '0' : format(datum.value, '+~f')"
"""Of a tick, for Vega: every number but 0 with its sign."""
WIDE = 400
"""Pixels from which a chart has room for intervals as text."""
FAR = 2.5
"""A difference so many times the second largest is drawn as an arrow at the edge."""
NEAR = 0.25
"""How far outside of the other scores a line may be to be drawn, as a fraction of their range."""
WEIGHT = "loss.kd.weight"


def against_kd_weight(text: TextFigures) -> Drawing | None:
    """Score of every arm with a teacher, by KD weight, with its interval; None if there is no such arm."""
    arms = [figures for figures in text.arms if figures.arm.role in POINTS]
    if not arms:
        return None
    weights = sorted({figures.arm.kd_weight for figures in arms})
    shown = " and ".join(f"{numbers.plain(weight)}" for weight in weights[:1]) if len(weights) == 1 else ""
    caption = (
        f"One KD weight was tried, {shown}."
        if shown
        else "Each point is the mean over its seeds; the line joins settings that differ in the KD weight alone."
    )
    return Drawing(
        name="score-against-kd-weight",
        title="Score against the KD weight",
        caption=f"{caption} Bars are 95{numbers.NO_BREAK}% intervals. Dashed lines: arms without a KD weight.",
        wide=to_svg(_weight_chart(text, arms, Plot(width=800, height=300)), name="kd-wide"),
        narrow=to_svg(_weight_chart(text, arms, Plot(width=190, height=280)), name="kd-narrow"),
    )


def _weight_chart(text: TextFigures, arms: Sequence[ArmFigures], plot: Plot) -> Any:
    scale = numbers.SCALES[text.metric]
    lines = [figures for figures in text.arms if figures.arm.role in LINES and figures.arm.is_main]
    rows = [_point(figures, scale) for figures in arms]
    x_scale, x_domain = _weight_scale([figures.arm.kd_weight for figures in arms])
    near = [end for figures in (*arms, *lines) if figures.arm.role != "zero_shot" for end in _ends(figures.score)]
    y_domain = domain(near)
    ticks = _ticks(sorted({figures.arm.kd_weight for figures in arms}), x_domain, plot.width)
    x = alt.X("x:Q", title="KD weight", scale=x_scale, axis=alt.Axis(values=ticks, grid=False, format="~g"))
    y = alt.Y(
        "y:Q",
        title=None,
        scale=alt.Scale(domain=y_domain, nice=False, zero=False),
        axis=alt.Axis(format=scale.axis_format, tickCount=6),
    )
    rules = [_line(figures, scale, y_domain) for figures in lines]
    layers = [_layer(rows, role, x, y) for role in reversed(POINTS) if any(row["role"] == role for row in rows)]
    if rules:
        inside = [rule for rule in rules if not rule["is_outside"]]
        base = data(inside).mark_rule(strokeDash=[5, 4], strokeWidth=1.4, aria=False)
        layers.insert(0, base.encode(y=y, color=alt.Color("color:N", scale=None)))
        layers.append(labels_at_end(rules, x=x_domain[1], scale=y_domain, height=plot.height))
    return alt.layer(*layers, width=plot.width, height=plot.height)


def _line(figures: ArmFigures, scale: numbers.Scale, y_domain: list[float]) -> Row:
    """A horizontal line; one that would flatten the others, far from them, is a label with an arrow instead."""
    role, value = figures.arm.role, figures.score.value
    low, high = y_domain
    is_outside = value < low - NEAR * (high - low) or value > high + NEAR * (high - low)
    if not is_outside:
        y_domain[:] = min(low, value), max(high, value)
    arrow = "" if not is_outside else " ↓" if value < low else " ↑"
    return {
        "y": min(max(value, y_domain[0]), y_domain[1]),
        "label": f"{LINES[role]} {numbers.score(value, scale)}{arrow}",
        "color": COLORS[role],
        "is_outside": is_outside,
    }


def _point(figures: ArmFigures, scale: numbers.Scale) -> Row:
    arm, score = figures.arm, figures.score
    low, high = _ends(score)
    series = {name: str(value) for name, value in arm.differing.items() if name != WEIGHT}
    return {
        "x": arm.kd_weight,
        "y": score.value,
        "low": low,
        "high": high,
        "role": arm.role,
        "series": "; ".join(f"{name} {value}" for name, value in sorted(series.items())),
        "value": numbers.decimal(score.value * scale.factor, scale.digits),
        "is_main": arm.is_main,
        "label": arm.label,
        "text": f"{arm.label}: {numbers.score(score.value, scale)} {numbers.bounds(score, scale)}".strip(),
    }


def _ends(interval: Interval) -> tuple[float, float]:
    """Its bounds, or twice its value where none were computed."""
    low, high = interval.low, interval.high
    return (interval.value if low is None else low, interval.value if high is None else high)


def _layer(all_rows: Sequence[Row], role: str, x: alt.X, y: alt.Y) -> Any:
    """Points of a role; a fixed shift keeps weak_only and controls beside combined at the same weight."""
    rows = [row for row in all_rows if row["role"] == role]
    few, color = len(rows) <= MAX_VALUE_LABELS, COLORS[role]
    shift = {"combined": 0, "weak_only": 12, "control": -12}[role]
    base = data(rows).encode(x=x, y=y, description="text:N")
    opacity = 1.0 if few else 0.55
    bars = base.mark_rule(color=color, strokeWidth=2 if few else 1, opacity=opacity, xOffset=shift, aria=False)
    layers = [bars.encode(y=alt.Y("low:Q", title=None), y2="high:Q")]
    if role == "combined" and len({row["series"] for row in rows}) <= MAX_SERIES:
        layers.append(base.mark_line(color=color, strokeWidth=2, aria=False).encode(detail="series:N"))
    points = base.mark_point(color=color, size=64 if few else 26, opacity=opacity, xOffset=shift, filled=True)
    if role != "combined":
        points = base.mark_point(color=color, size=52, strokeWidth=2, fill=LIGHT["surface"], opacity=1, xOffset=shift)
    layers.append(points)
    if role == "combined" and few:
        values = base.mark_text(color=color, fontSize=LABEL_SIZE, dy=-9, aria=False)
        layers.append(values.encode(y=alt.Y("high:Q", title=None), text="value:N"))
    elif few:
        side = "right" if shift < 0 else "left"
        names = base.mark_text(color=color, fontSize=LABEL_SIZE, limit=NAME_LIMIT, align=side, aria=False)
        names.mark.xOffset, names.mark.dx, names.mark.dy = shift, 0.7 * shift, max(shift, 0)
        layers.append(names.encode(text="label:N"))
    if role == "combined" and not few:
        main = base.mark_point(color=LIGHT["text"], size=110, strokeWidth=2, filled=False, opacity=1)
        layers.append(main.transform_filter("datum.is_main"))
    return alt.layer(*layers)


def _weight_scale(weights: Sequence[float]) -> tuple[alt.Scale, list[float]]:
    """A logarithmic scale that has a place for 0 (symlog), its constant the least weight above 0."""
    positive = [weight for weight in weights if weight > 0] or [1.0]
    low, high = min(weights), max(weights)
    ends = [low / 1.6 if low > 0 else -0.25 * min(positive), high * 1.6 if high > 0 else 1.0]
    return alt.Scale(type="symlog", constant=min(positive), domain=ends, nice=False, zero=False), ends


def _ticks(weights: Sequence[float], ends: Sequence[float], width: int) -> list[float]:
    """The weights, without those whose labels would overlap with the one before."""
    constant = min((weight for weight in weights if weight > 0), default=1.0)

    def place(value: float) -> float:
        return math.copysign(math.log1p(abs(value) / constant), value)

    span, kept = place(ends[1]) - place(ends[0]), list[float]()
    for weight in weights:
        if not kept or (place(weight) - place(kept[-1])) / span * width >= MIN_TICK_PIXELS:
            kept.append(weight)
    return [float(f"{weight:.3g}") for weight in kept]


def differences(figures: ArmFigures, metric: str) -> Drawing | None:
    """Paired differences of an arm to others, with their intervals; None if none were computed."""
    if not figures.comparisons:
        return None
    name = numbers.ROLES[figures.arm.role]
    return Drawing(
        name="differences",
        title="What the teacher and the gold set added",
        caption=f"Score of {name} minus that of another arm on the same records. An interval that leaves out 0 is a "
        "difference that further seeds and records would hardly turn round.",
        wide=to_svg(_difference_chart(figures, metric, Plot(width=590, height=0)), name="differences-wide"),
        narrow=to_svg(_difference_chart(figures, metric, Plot(width=128, height=0)), name="differences-narrow"),
    )


def _difference_chart(figures: ArmFigures, metric: str, plot: Plot) -> Any:
    scale = numbers.SCALES[metric]
    rows = [_difference_row(comparison, scale) for comparison in figures.comparisons]
    limits = _limits([(row["low"], row["high"]) for row in rows])
    for row in rows:
        row["is_outside"] = not limits[0] <= row["value"] <= limits[1]
        row["edge"], row["at_end"] = limits[1] if row["value"] > 0 else limits[0], limits[1]
        row["shape"] = "triangle-right" if row["value"] > 0 else "triangle-left"
        row["low"], row["high"] = (min(max(row[end], limits[0]), limits[1]) for end in ("low", "high"))
        row["shown"] = row["value_text"] if plot.width < WIDE else f"{row['value_text']}  {row['bounds']}"
    unit = "nats" if metric == "-nll" else "points"
    axis = alt.Axis(tickCount=6 if plot.width >= WIDE else 3, labelExpr=SIGNED, title=unit)
    names = alt.Axis(labelColor=LIGHT["text"], labelLimit=150, labelFontSize=12)
    y = alt.Y("label:N", title=None, sort=[row["label"] for row in rows], axis=names)
    x = alt.X("value:Q", scale=alt.Scale(domain=limits, nice=False), axis=axis)
    inside, outside = (data([row for row in rows if row["is_outside"] == which]) for which in (False, True))
    color = COLORS[figures.arm.role]
    bars = inside.mark_rule(strokeWidth=2.5, color=color, aria=False).encode(x="low:Q", x2="high:Q", y=y)
    points = inside.mark_point(filled=True, size=70, color=color, opacity=1).encode(x=x, y=y, description="text:N")
    far = outside.mark_point(filled=True, size=70, color=color, opacity=1)
    zero = data([{"zero": 0}]).mark_rule(color=LIGHT["muted"], strokeWidth=1.2, aria=False).encode(x="zero:Q")
    values = data(rows).mark_text(align="left", dx=14, fontSize=12, aria=False)
    values = values.encode(x="at_end:Q", y=y, text="shown:N", color=alt.Color("color:N", scale=None))
    layers = [zero, bars, points, values]
    if any(row["is_outside"] for row in rows):
        layers.append(far.encode(x="edge:Q", y=y, shape=alt.Shape("shape:N", scale=None), description="text:N"))
    return alt.layer(*layers, width=plot.width, height=alt.Step(30))


def _difference_row(comparison: Comparison, scale: numbers.Scale) -> dict[str, Any]:
    low, high = _ends(comparison.difference)
    name = numbers.ROLES.get(comparison.against, comparison.against)  # a control has its label
    label = f"{numbers.MINUS} {for_xml(name).removeprefix('the next ')}"
    value, shown = comparison.difference.value, numbers.bounds(comparison.difference, scale, signed=True)
    value_text = numbers.difference(value, scale)
    return {
        "label": label,
        "value": value * scale.factor,
        "low": low * scale.factor,
        "high": high * scale.factor,
        "value_text": value_text,
        "bounds": shown,
        "color": LIGHT["text" if low > 0 or high < 0 else "muted"],
        "text": f"{label}: {value_text} {shown}; won {comparison.won:,.0f}, lost {comparison.lost:,.0f}",
    }


def _limits(intervals: Sequence[tuple[float, float]]) -> list[float]:
    """Of the axis: 0 and all intervals, but one far beyond the others, which would flatten them, is left out."""
    reach = sorted(max(abs(low), abs(high)) for low, high in intervals)
    far = FAR * reach[-2] if len(reach) > 2 else math.inf
    near = [end for low, high in intervals if max(abs(low), abs(high)) <= far for end in (low, high)]
    return domain([0.0, *near])


def label_saving(saving: LabelSaving, combined: ArmFigures | None, metric: str) -> Drawing:
    """Gold-only score against the number of gold records, and where it reaches the combined score."""
    return Drawing(
        name="label-saving",
        title="Gold only, by the number of gold records",
        caption=saving.note,
        wide=to_svg(_saving_chart(saving, combined, metric, Plot(width=560, height=240)), name="saving-wide"),
        narrow=to_svg(_saving_chart(saving, combined, metric, Plot(width=200, height=220)), name="saving-narrow"),
    )


def _saving_chart(saving: LabelSaving, combined: ArmFigures | None, metric: str, plot: Plot) -> Any:
    scale = numbers.SCALES[metric]
    rows = [
        {"x": size, "y": score.value, "low": _ends(score)[0], "high": _ends(score)[1]}
        | {"text": f"{numbers.count(size)} gold records: {numbers.score(score.value, scale)}"}
        for size, score in zip(saving.sizes, saving.scores, strict=True)
    ]
    goal = [] if combined is None else [{"x": saving.num_gold, "y": combined.score.value}]
    y_domain = domain([*(end for score in saving.scores for end in _ends(score)), *(row["y"] for row in goal)])
    ends = [min(saving.sizes) / 1.2, max(saving.sizes) * 1.2]
    ticks = alt.Axis(values=list(saving.sizes), grid=False, format=",d", labelOverlap="greedy")
    x = alt.X("x:Q", title="gold records", scale=alt.Scale(type="log", domain=ends, nice=False), axis=ticks)
    y = alt.Y(
        "y:Q",
        title=None,
        scale=alt.Scale(domain=y_domain, nice=False, zero=False),
        axis=alt.Axis(format=scale.axis_format, tickCount=5),
    )
    base = data(rows).encode(x=x, y=y, description="text:N")
    amber = COLORS["gold_only"]
    layers = [
        base.mark_rule(color=amber, strokeWidth=2, aria=False).encode(y=alt.Y("low:Q", title=None), y2="high:Q"),
        base.mark_line(color=amber, strokeWidth=2, aria=False),
        base.mark_point(color=amber, filled=True, size=56, opacity=1),
    ]
    names = [{"y": rows[-1]["y"], "label": "gold only", "color": amber}]
    for row in goal:
        rule = data(goal).mark_rule(color=COLORS["combined"], strokeDash=[5, 4], strokeWidth=1.4, aria=False)
        layers += [
            rule.encode(y=y),
            data(goal).mark_point(color=COLORS["combined"], filled=True, size=70).encode(x=x, y=y),
        ]
        names.append({"y": row["y"], "label": "combined", "color": COLORS["combined"]})
    if goal and saving.equivalent is not None:
        reached = [{"x": min(max(saving.equivalent.value, ends[0]), ends[1])}]
        mark = data(reached).mark_rule(color=LIGHT["muted"], strokeDash=[2, 3], aria=False)
        layers.append(mark.encode(x=x))
    layers.append(labels_at_end(names, x=ends[1], scale=y_domain, height=plot.height))
    return alt.layer(*layers, width=plot.width, height=plot.height)
