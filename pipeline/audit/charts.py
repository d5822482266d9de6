"""The summary of a cache as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import altair as alt

from pipeline.core.chart_style import CONFIG, LIGHT, histogram
from pipeline.core.progress import readable

WIDTH, HEIGHT = 380, 190  # of one panel, pixels


def draw_summary(figures: dict[str, Any], *, name: str, out: Path) -> list[Path]:
    """Write summary.png and summary.svg: retained mass, the same at a smaller k, entropy, bytes by column."""
    mass, entropy = figures["retained_mass"], figures["entropy"]
    panels = [
        _histogram(
            mass["histogram"],
            high=1.0,
            color=LIGHT["blue"],
            title="Retained mass (probability of all kept entries)",
            subtitle=f"mean {mass['mean']:.1%}; the rest is the tail",
            axis=alt.Axis(format=".0%", tickCount=5, grid=False),
        ),
        _mass_at_k(figures),
        _histogram(
            entropy["histogram"],
            high=entropy["most"],
            color=LIGHT["teal"],
            title="Entropy of the teacher",
            subtitle=f"mean {entropy['mean']:.2f} nats; at most {entropy['most']:.2f} (uniform)",
            axis=alt.Axis(tickCount=6, grid=False),
        ),
        _bytes_by_column(figures),
    ]
    subtitle = (
        f"{figures['num_sequences']:,} sequences, {figures['num_targets']:,} targets, {readable(figures['bytes'])}"
    )
    chart = alt.vconcat(
        alt.hconcat(*panels[:2], spacing=48),
        alt.hconcat(*panels[2:], spacing=48),
        spacing=40,
        title=alt.TitleParams(name, subtitle=subtitle, fontSize=18, subtitleFontSize=13, offset=22),
        padding=24,
        background="white",
    )
    chart = chart.properties(config=CONFIG)
    files = [out / "summary.png", out / "summary.svg"]
    chart.save(files[0], scale_factor=2)
    chart.save(files[1])
    return files


def _percent(fraction: float) -> str:
    return "<1%" if 0 < fraction < 0.005 else f"{fraction:.0%}"


def _panel(chart: Any, title: str, subtitle: str) -> Any:
    return chart.properties(width=WIDTH, height=HEIGHT, title=alt.TitleParams(title, subtitle=subtitle, offset=12))


def _histogram(counts: list[int], *, high: float, color: str, title: str, subtitle: str, axis: alt.Axis) -> Any:
    chart = histogram(counts, high=high, color=color, axis=axis)
    return _panel(chart, title, f"{subtitle}. Fraction of the targets")


def _mass_at_k(figures: dict[str, Any]) -> Any:
    rows = [{"k": int(k), "mass": mass} for k, mass in figures["retained_mass"]["mean_at_k"].items()]
    base = alt.Chart(alt.Data(values=rows)).encode(
        x=alt.X(
            "k:Q",
            title=None,
            scale=alt.Scale(type="log", base=2, nice=False, padding=18),
            axis=alt.Axis(values=[row["k"] for row in rows], grid=False, format="d"),
        ),
        # room above 100 %, so that its label does not push the panel down
        y=alt.Y("mass:Q", title=None, scale=alt.Scale(domain=[0, 1.1]), axis=alt.Axis(format="~%", tickCount=5)),
    )
    value_texts = base.mark_text(dy=-12, color=LIGHT["text"], fontSize=11).encode(text=alt.Text("mass:Q", format=".0%"))
    chart = (
        base.mark_line(color=LIGHT["amber"], strokeWidth=2.5)
        + base.mark_circle(color=LIGHT["amber"], size=50, opacity=1)
        + value_texts
    )
    return _panel(chart, "Retained mass at a smaller k", "Mean probability of the first k entries")


def _bytes_by_column(figures: dict[str, Any]) -> Any:
    total = max(figures["bytes"], 1)
    rows = [
        {"column": name, "bytes": size, "label": f"{readable(size)}  ({_percent(size / total)})"}
        for name, size in figures["column_bytes"].items()
    ]
    base = alt.Chart(alt.Data(values=rows)).encode(
        y=alt.Y("column:N", title=None, sort=None, axis=alt.Axis(labelColor=LIGHT["text"], labelLimit=140)),
        x=alt.X("bytes:Q", title=None, axis=None, scale=alt.Scale(domain=[0, 1.35 * max(r["bytes"] for r in rows)])),
    )
    value_texts = base.mark_text(align="left", dx=6, color=LIGHT["muted"], fontSize=11).encode(text="label:N")
    chart = base.mark_bar(color=LIGHT["blue"], height={"band": 0.72}) + value_texts
    return _panel(chart, "Bytes by column", f"{figures['bytes_a_target']:,.0f} bytes per target, compressed")
