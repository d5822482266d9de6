"""Numbers as text, labels that do not overlap, markup, and the drawing of the objective."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.analysis.values import Interval
from pipeline.page import diagram, numbers, score_charts
from pipeline.page.chart_parts import spread
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
    assert numbers.parameters(134_515_008) == "135\u202fM"
    assert numbers.duration(2963.4) == "49\u202fmin 23\u202fs"
    assert numbers.duration(100_000) == "1\u202fd 3\u202fh"
    assert numbers.duration(0.2) == "0\u202fs"


def test_markup_escapes_text_and_quotes() -> None:
    made = tag("td", '<b> & "q"', Html("<i></i>"), None, data_value='"<', class_="x", hidden=True, title=None)
    assert made.text == ('<td data-value="&quot;&lt;" class="x" hidden>&lt;b&gt; &amp; &quot;q&quot;<i></i></td>')


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
