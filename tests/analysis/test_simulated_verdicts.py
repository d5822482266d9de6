"""Verdicts on simulated studies whose truth is known: the right one is found, and no neighbour's; what chance finds."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest

from pipeline.analysis.figures import text_figures
from pipeline.analysis.values import StudyFigures
from pipeline.analysis.verdict import RULES, verdict
from support.simulated_study import TrueArm, TrueStudy, simulate
from support.simulated_verdicts import SCENARIOS, figures


def test_every_code_has_a_scenario() -> None:
    assert {scenario.code for scenario in SCENARIOS.values()} == {rule.code for rule in RULES}


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_study_has_the_verdict_that_it_was_built_for(name: str) -> None:
    """One study each, with the seed 1."""
    assert verdict(figures(SCENARIOS[name], seed=1)).code == SCENARIOS[name].code


@pytest.mark.slow(minutes=1)
@pytest.mark.parametrize("name", SCENARIOS)
def test_studies_of_one_truth_have_one_verdict(name: str) -> None:
    """Of 20 studies at least 17 have the right verdict, and at most 2 another one that is not INCONCLUSIVE.

    A rule needs one or two significant differences, so chance alone leads 2.5 % of studies into each neighbour.
    """
    codes = Counter(verdict(figures(SCENARIOS[name], seed)).code for seed in range(20))
    assert codes[SCENARIOS[name].code] >= 17, codes
    assert all(count <= 2 for code, count in codes.items() if code not in (SCENARIOS[name].code, "INCONCLUSIVE")), codes


def useless_teacher(*, seeds: int, weak: float) -> TrueStudy:
    """Combined is gold_only in truth: the same rates, with a seed noise of 1 point.

    `weak` 0.2: random labels among five choices. 0.4: a teacher above chance that is of no use either.
    """
    students = [("gold_only", 0.7), ("combined", 0.7), ("weak_only", weak)]
    arms = [TrueArm(role=role, accuracy=accuracy, seeds=seeds, seed_noise=0.01) for role, accuracy in students]
    return TrueStudy(weak=weak, num_records=500, arms=tuple(arms))


def null_verdict(study: TrueStudy, seed: int) -> str:
    """Without classes of the records the teacher cannot be compared with chance: that rule does not help."""
    predictions, held_out = simulate(study, seed)
    main = text_figures(predictions, replace(held_out, class_M=None, length_M=None), "accuracy")
    return verdict(StudyFigures(name="null", main=main)).code


@pytest.mark.slow(minutes=2)
def test_a_useless_teacher_is_rarely_called_healthy() -> None:
    """1,000 studies with 1, 2 or 3 seeds: under 50.

    All students are above this teacher, so that one of the two differences is no hurdle.
    """
    codes: dict[tuple[int, float], Counter[str]] = defaultdict(Counter)
    for number in range(1000):
        seeds, weak = 1 + number % 3, (0.2, 0.4)[number % 2]
        codes[seeds, weak][null_verdict(useless_teacher(seeds=seeds, weak=weak), number)] += 1
    assert sum(of_setting["HEALTHY"] for of_setting in codes.values()) < 50, codes


def test_a_real_gain_is_found_in_the_same_study() -> None:
    """So that the test above can fail: with a gain of 10 points it is called HEALTHY."""
    study = useless_teacher(seeds=3, weak=0.4)
    gain = replace(
        study, arms=tuple(replace(arm, accuracy=0.8) if arm.role == "combined" else arm for arm in study.arms)
    )
    assert np.mean([null_verdict(gain, seed) == "HEALTHY" for seed in range(5)]) > 0.5
