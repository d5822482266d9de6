"""Charts of training: terms, gradient cosine and looks at dev, one small panel for each key of metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

from pipeline.analysis.values import TextFigures, Training
from pipeline.core.chart_style import LIGHT
from pipeline.page import numbers
from pipeline.page.chart_parts import COLORS, Drawing, Plot, data, domain, labels_at_end, to_svg
from pipeline.page.main_arms import main_arms

SIZE = Plot(width=206, height=140)
STUDENTS = ("gold_only", "weak_only", "combined", "control", "ceiling")
"""The teacher is left out: its steps are not those of a student."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """A panel."""

    title: str
    caption: str
    format: str = "~g"
    has_zero_line: bool = False


CURVES = {
    "lm": Curve(title="LM term", caption="Loss on gold, nats"),
    "kd": Curve(title="KD term", caption="Divergence from the teacher, nats"),
    "hard": Curve(title="Hard-label term", caption="Loss on the teacher's labels, nats"),
    "confidence": Curve(title="Confidence term", caption="Loss on the student's own predictions, nats"),
    "grad_cosine": Curve(
        title="Gradient cosine", caption="Below 0 the two terms pull apart", format="~f", has_zero_line=True
    ),
    "grad_cosine_teacher_wrong": Curve(
        title="Gradient cosine, teacher wrong",
        caption="On gold that the teacher has wrong",
        format="~f",
        has_zero_line=True,
    ),
    "agreement": Curve(title="Agreement in training", caption="Student's top token is the teacher's", format=".0%"),
    "dev_accuracy": Curve(title="Accuracy on dev", caption="Over the steps", format=".0%"),
    "dev_exact_match": Curve(title="Exact match on dev", caption="Over the steps", format=".0%"),
    "dev_nll": Curve(title="Nll on dev", caption="Nats a target"),
    "dev_imitation": Curve(title="Imitation on dev", caption="Of the teacher's errors, those repeated", format=".0%"),
    "dev_agreement": Curve(title="Agreement on dev", caption="Student's choice is the teacher's", format=".0%"),
}
"""By key, in the order of the page; other keys are in curves.parquet alone."""


def curves(training: Sequence[Training], text: TextFigures) -> list[Drawing]:
    """A panel for each key that a main arm of a student has; other arms are in curves.parquet alone."""
    of_label = {run.label: run for run in training}
    arms = {role: figures.arm.label for role, figures in main_arms(text).items() if role in STUDENTS}
    runs = {role: of_label[label] for role, label in arms.items() if label in of_label}
    drawings = []
    for key, curve in CURVES.items():
        shown = {role: run for role, run in runs.items() if any(v is not None for v in run.curves.get(key, ()))}
        if shown:
            svg = to_svg(_panel(key, curve, shown), name=f"curve-{key}")
            name = f"curve-{key.replace('_', '-')}"
            drawings.append(Drawing(name=name, title=curve.title, caption=curve.caption, wide=svg))
    return drawings


def _panel(key: str, curve: Curve, runs: Mapping[str, Training]) -> Any:
    rows: list[dict[str, Any]] = [
        {"x": step, "y": value, "role": role}
        for role, run in runs.items()
        for step, value in zip(run.steps, run.curves[key], strict=True)
        if value is not None
    ]
    y_domain = domain([row["y"] for row in rows] + ([0.0] if curve.has_zero_line else []))
    last = max(row["x"] for row in rows)
    x = alt.X(
        "x:Q",
        title="step",
        scale=alt.Scale(domain=[0, last], nice=False),
        axis=alt.Axis(tickCount=4, grid=False, format="~s", titleAnchor="end"),
    )
    y = alt.Y(
        "y:Q",
        title=None,
        scale=alt.Scale(domain=y_domain, nice=False, zero=False),
        axis=alt.Axis(tickCount=4, format=curve.format),
    )
    layers = []
    if curve.has_zero_line:
        zero = data([{"zero": 0}]).mark_rule(color=LIGHT["muted"], strokeWidth=1.2, aria=False)
        layers.append(zero.encode(y="zero:Q"))
    for role in runs:
        line = data([row for row in rows if row["role"] == role]).mark_line(
            color=COLORS[role], strokeWidth=2.2 if role == "combined" else 1.6, aria=False, strokeJoin="round"
        )
        layers.append(line.encode(x=x, y=y))
    ends = [
        {
            "y": [row["y"] for row in rows if row["role"] == role][-1],
            "label": numbers.ROLES[role],
            "color": COLORS[role],
        }
        for role in runs
    ]
    layers.append(labels_at_end(ends, x=last, scale=y_domain, height=SIZE.height))
    return alt.layer(*layers, width=SIZE.width, height=SIZE.height)
