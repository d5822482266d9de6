"""Every record is in one slice of each kind, and a slice's figures are those of its records."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from pipeline.analysis.figures import text_figures
from pipeline.analysis.slices import MAX_CLASSES, parts_of
from pipeline.analysis.values import HeldOut
from support.simulated_study import simulate, study_of


def test_figures_of_a_slice_are_those_of_its_records() -> None:
    arms, held_out = simulate(study_of(num_records=400, rotated_class=2, weak=0.7), 1)
    found = {one.arm.role: one for one in text_figures(arms, held_out, "accuracy").arms}["combined"]
    combined = next(arm for arm in arms if arm.arm.role == "combined")
    assert held_out.class_M is not None
    assert combined.predicted_RM is not None
    assert arms[0].predicted_RM is not None
    (rotated,) = [one for one in found.slices if one.value == "class 2"]
    is_in_M = held_out.class_M == "class 2"
    assert rotated.num_records == is_in_M.sum()
    assert rotated.teacher_score == 0.0
    assert rotated.score.value == pytest.approx(combined.credit_RM[:, is_in_M].mean())
    is_copied_RM = combined.predicted_RM[:, is_in_M] == arms[0].predicted_RM[0, is_in_M]
    assert rotated.imitation == pytest.approx(is_copied_RM.mean(), abs=1e-6)
    sizes = Counter[str]()
    for one in found.slices:
        sizes[one.by] += one.num_records
        assert one.score.low is not None
        assert one.score.low <= one.score.value
    assert sizes == {"class": 400, "length": 400, "teacher confidence": 400}


def test_quartiles() -> None:
    parts = parts_of(HeldOut(name="test", length_M=np.arange(1, 9)), None, np.ones(8))
    assert [(part.by, part.value, part.is_in_M.sum()) for part in parts] == [
        ("length", "1 to 2", 2),
        ("length", "3 to 4", 2),
        ("length", "5 to 6", 2),
        ("length", "7 to 8", 2),
    ]
    alike = parts_of(HeldOut(name="test", length_M=np.full(8, 30)), None, np.ones(8))
    assert [(part.value, part.is_in_M.sum()) for part in alike] == [("30", 8)]


def test_small_and_many_classes_are_one_part_together() -> None:
    names = np.array([f"word {i:02}" for i in range(MAX_CLASSES + 3) for _ in range(6)] + ["rare"])
    parts = parts_of(HeldOut(name="test", class_M=names), None, np.ones(len(names)))
    assert len(parts) == MAX_CLASSES + 1
    assert (parts[-1].by, parts[-1].value, parts[-1].is_in_M.sum()) == ("other classes", "4 together", 19)
    assert sum(part.is_in_M.sum() for part in parts) == len(names)
    distinct = np.array([f"answer {i}" for i in range(50)])
    assert parts_of(HeldOut(name="test", class_M=distinct), None, np.ones(50)) == ()


def test_records_without_a_target_make_no_slice() -> None:
    """With -nll a record counts by its known targets."""
    weight_M = np.array([1.0] * 6 + [0.0] * 2)
    parts = parts_of(HeldOut(name="test", length_M=np.arange(1, 9)), None, weight_M)
    assert [part.value for part in parts] == ["1 to 2", "3 to 4", "5 to 6"]


def test_a_text_without_choices_is_divided_by_length_alone() -> None:
    arms, held_out = simulate(study_of(num_records=100), 1)
    plain = [
        replace(a, predicted_RM=None, probability_RMC=None, num_tied_RM=None, credit_RM=a.credit_RM - 3) for a in arms
    ]
    found = text_figures(plain, HeldOut(name="test", length_M=held_out.length_M), "-nll").arms[-1]
    assert [one.by for one in found.slices] == ["length"] * 4
    assert found.slices[0].imitation is None
    assert found.slices[0].teacher_score is not None
