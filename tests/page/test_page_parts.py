"""Numbers as text, labels that do not overlap, markup, and the drawing of the objective."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.analysis.values import ArmFigures, Comparison, Interval, StudyFigures
from pipeline.page import diagram, more_sections, numbers, score_charts, sections
from pipeline.page.chart_parts import data, spread, to_svg
from pipeline.page.html import Html, tag
from support import sample_figures


@given(
    positions=st.lists(st.floats(-100, 100), max_size=9),
    gap=st.floats(0.1, 30),
)
def test_labels_move_as_little_as_they_can(positions: list[float], gap: float) -> None:
    """Least squares with neighbours `gap` apart is isotonic regression of p_i - i gap, here by its max-min formula."""
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    shifted = [positions[i] - place * gap for place, i in enumerate(order)]
    moved = spread(positions, gap)
    for place, i in enumerate(order):
        best = max(min(sum(shifted[a:b]) / (b - a) for b in range(place + 1, len(order) + 1)) for a in range(place + 1))
        assert moved[i] == pytest.approx(best + place * gap, abs=1e-6)


def test_numbers_as_text() -> None:
    assert numbers.score(0.8714) == "87.1\u202f%"
    assert numbers.score(-3.0519, numbers.SCALES["-nll"]) == "\u22123.052\u202fnats"
    assert numbers.difference(0.009) == "+0.9 points"
    assert numbers.difference(-0.009) == "\u22120.9 points"
    assert numbers.difference(-0.0004) == "0.0 points"
    assert numbers.bounds(Interval(value=0.5, low=0.48, high=0.5249)) == "[48.0, 52.5]"
    assert numbers.bounds(Interval(value=0.5)) == ""
    assert numbers.bounds(Interval(value=0.5, low=0.48)) == "[48.0, ?]"
    assert numbers.bounds(Interval(value=0.5, high=0.52)) == "[?, 52.0]"
    assert numbers.parameters(134_515_008) == "135\u202fM"
    assert numbers.duration(2963.4) == "49\u202fmin 23\u202fs"
    assert numbers.duration(100_000) == "1\u202fd 3\u202fh"
    assert numbers.duration(0.2) == "0\u202fs"


def test_markup_escapes_text_and_quotes() -> None:
    made = tag("td", '<b> & "q"', Html("<i></i>"), None, data_value='"<', class_="x", hidden=True, title=None)
    assert made.text == ('<td data-value="&quot;&lt;" class="x" hidden>&lt;b&gt; &amp; &quot;q&quot;<i></i></td>')


CONTROLS, MISSING = "\x00\x1b\x0b\uffff\ud800\ufffe", "\ufffd" * 6


def test_what_xml_does_not_allow_is_replaced_in_drawings() -> None:
    """In a chart's rows, where it would end the process, and in the diagram; what XML allows stays."""
    chart = data([{"x": 1, "label": f"a{CONTROLS}b\U0001f600"}])
    assert json.loads(chart.data.values) == [{"x": 1, "label": f"a{MISSING}b\U0001f600"}]
    root = ElementTree.fromstring(to_svg(chart.mark_text().encode(x="x:Q", text="label:N"), name="one"))
    assert any("a\ufffd\ufffd" in text for text in root.itertext())
    study = sample_figures.full_study()
    hostile = replace(study, name=CONTROLS, counts=study.counts | {"teacher": f"weak{CONTROLS}"})
    for svg in (diagram.wide(hostile), diagram.tall(hostile)):
        assert "weak\ufffd" in "".join(ElementTree.fromstring(svg).itertext())


def combined_of(study: StudyFigures) -> ArmFigures:
    return next(figures for figures in study.main.arms if figures.arm.role == "combined" and figures.arm.is_main)


def test_bars_of_differences_end_at_the_axis_and_far_ones_point_outward() -> None:
    ends = {"gold_only": (0.01, -0.02, 0.03), "weak_only": (0.0, -0.02, 0.02), "zero_shot": (-0.4, -0.5, -0.3)}
    compared = tuple(
        Comparison(against=role, difference=Interval(value=value, low=low, high=high), won=1, lost=1)
        for role, (value, low, high) in ends.items()
    )
    figures = replace(combined_of(sample_figures.full_study()), comparisons=compared)
    chart = score_charts._difference_chart(figures, "accuracy", score_charts.Plot(width=590, height=0))
    ElementTree.fromstring(to_svg(chart, name="differences"))
    rows = {row["label"]: row for layer in chart.layer for row in json.loads(layer.data.values) if "label" in row}
    far = rows["\u2212 zero-shot"]
    assert (far["is_outside"], far["shape"]) == (True, "triangle-left")
    least, most = far["edge"], far["at_end"]
    assert least < -2 < 3 < most
    assert least > -10
    assert all(least <= row["low"] <= row["high"] <= most for row in rows.values())


def test_label_saving_that_is_not_known_gives_its_reason() -> None:
    """Combined below the smallest gold set is not "no run reaches it"."""
    study = sample_figures.full_study()
    assert study.label_saving is not None
    saving = replace(study.label_saving, equivalent=None, note="gold_only is above combined already")
    drawing = score_charts.label_saving(saving, None, "accuracy")
    assert more_sections.label_saving(replace(study, label_saving=saving), drawing).lead == (
        "Gold_only is above combined already."
    )


def test_the_legend_of_parts_names_what_is_drawn() -> None:
    study = sample_figures.full_study()
    arm = combined_of(study)
    for removed, expected in ((None, {"combined", "teacher", "gold_only"}), ("gold_only", {"combined", "teacher"})):
        text = replace(study.main, arms=tuple(f for f in study.main.arms if f.arm.role != removed))
        lead = sections.slices(text, arm, []).lead
        assert set(re.findall(r"key-(\w+)", getattr(lead, "text", ""))) == expected


def test_a_far_zero_shot_score_does_not_flatten_the_others() -> None:
    """It is named with an arrow; the axis spans the scores that are compared."""
    study = sample_figures.full_study()
    drawing = score_charts.against_kd_weight(study.main)
    assert drawing is not None
    assert "zero-shot 41.2\u202f% ↓" in drawing.wide
    ticks = [int(tick) for tick in re.findall(r">(\d+)%<", drawing.wide)]
    assert min(ticks) > 70
    near = [f if f.arm.role != "zero_shot" else replace(f, score=Interval(value=0.76)) for f in study.main.arms]
    drawing = score_charts.against_kd_weight(replace(study.main, arms=tuple(near)))
    assert drawing is not None
    assert "zero-shot 76.0\u202f%<" in drawing.wide


def test_the_formula_has_the_weights_of_all_terms() -> None:
    study = sample_figures.full_study()
    assert diagram.formula(study) == "loss = 1 · LM + 1 · KD"
    more = replace(study, counts=study.counts | {"more_weights": {"hard": 0.5, "confidence": 0.0}})
    assert diagram.formula(more) == "loss = 1 · LM + 1 · KD + 0.5 · hard"


def test_boxes_of_the_diagram_do_not_overlap_and_hold_their_text() -> None:
    """Of both layouts: no two boxes meet, and lines begin and end inside their box by the width that text has."""
    study = sample_figures.full_study()
    for svg in (diagram.wide(study), diagram.tall(study)):
        width, height = map(int, re.search(r'width="(\d+)" height="(\d+)"', svg).groups())  # type: ignore[union-attr]
        pattern = r'<rect x="(\d+)" y="(\d+)" width="(\d+)" height="(\d+)" rx'
        boxes = [tuple(map(int, found)) for found in re.findall(pattern, svg)]
        assert len(boxes) == 8
        for i, (x, y, w, h) in enumerate(boxes):
            assert 0 <= x < x + w <= width
            assert 0 <= y < y + h <= height
            assert all(x + w <= X or x >= X + W or y + h <= Y or y >= Y + H for X, Y, W, H in boxes[:i])
        for part in svg.split("<rect x=")[1:]:
            x, y, w, h = map(int, re.findall(r'"(\d+)"', part)[:4])
            for text_x, text_y, size, text in re.findall(
                r'<text x="([\d.]+)" y="([\d.]+)"[^>]*font-size="(\d+)"[^>]*>([^<]*)<', part
            ):
                half = len(text) * int(size) * 0.54 / 2
                assert x <= float(text_x) - half
                assert float(text_x) + half <= x + w
                assert y < float(text_y) - int(size) * 0.7
                assert float(text_y) < y + h
