"""Cells of teacher right or wrong x student right or wrong: by hand, with ties, and their identity with the scores."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from pipeline.analysis.figures import text_figures
from pipeline.analysis.imitation import cells, choice_shares
from pipeline.analysis.values import Arm, ArmFigures, ArmPredictions, HeldOut


def predictions(
    role: str, best: list[list[set[int]]], answers: list[int], *, with_probability: bool = True
) -> ArmPredictions:
    """`best`: by run and record, the choices that are tied for the best, of four."""
    shape = (len(best), len(answers))
    probability_RMC = np.full((*shape, 4), 0.05)
    for (r, m), record in zip(product(*map(range, shape)), (one for run in best for one in run), strict=True):
        probability_RMC[r, m, sorted(record)] = 0.8 / len(record)
    credit_RM = np.array([[(a in s) / len(s) for s, a in zip(run, answers, strict=True)] for run in best])
    arm = Arm(
        role=role,
        label=role,
        name=role,
        seeds=tuple(range(len(best))),
        lm_weight=1.0,
        kd_weight=1.0,
        gold_fraction=0.1,
    )
    return ArmPredictions(
        arm=arm,
        credit_RM=credit_RM,
        weight_M=np.ones(len(answers)),
        predicted_RM=np.array([[min(record) for record in run] for run in best]),
        probability_RMC=probability_RMC if with_probability else None,
        num_tied_RM=np.array([[len(record) for record in run] for run in best]),
    )


def figures(arms: list[ArmPredictions], answers: list[int]) -> dict[str, ArmFigures]:
    found = text_figures(arms, HeldOut(name="test", answer_M=np.array(answers)), "accuracy")
    return {one.arm.label: one for one in found.arms}


def one_each(*choices: int) -> list[set[int]]:
    return [{choice} for choice in choices]


@pytest.mark.parametrize("with_probability", [True, False])
def test_cells_by_hand(with_probability: bool) -> None:
    """The teacher is right on the first four of eight records.

    combined, run 1: damaged 1 of 4; of 4 errors copied 2, corrected 1. Run 2: damaged 2, copied 1, corrected 2.
    gold_only: damaged 0, copied 1, corrected 0.
    """
    answers = [0] * 8
    teacher = one_each(0, 0, 0, 0, 1, 1, 2, 3)
    combined = [one_each(0, 0, 0, 1, 1, 1, 0, 2), one_each(1, 0, 0, 1, 1, 0, 0, 2)]
    gold_only = [one_each(0, 0, 0, 0, 2, 2, 1, 3)]
    given = {"teacher": [teacher], "combined": combined, "gold_only": gold_only}
    arms = [predictions(role, best, answers, with_probability=with_probability) for role, best in given.items()]
    found = figures(arms, answers)
    assert found["teacher"].imitation is None
    own = found["combined"].imitation
    assert own is not None
    assert own.excess is not None
    assert (own.num_teacher_right, own.num_teacher_wrong) == (4, 4)
    values = [one.value for one in (own.imitation, own.correction, own.damage, own.agreement, own.excess)]
    assert values == pytest.approx([1.5 / 4, 1.5 / 4, 1.5 / 4, (5 + 3) / 16, 0.5 / 4])
    floor = found["gold_only"].imitation
    assert floor is not None
    assert floor.excess is None
    assert [floor.imitation.value, floor.correction.value, floor.damage.value] == pytest.approx([0.25, 0, 0])


def test_ties_are_broken_at_random_and_independently() -> None:
    """A twin that goes through all ways to break the ties of one record."""
    rng = np.random.default_rng(1)
    sets = [[{int(c) for c in rng.permutation(4)[: rng.integers(1, 4)]} for _ in range(60)] for _ in range(2)]
    answers = [int(answer) for answer in rng.integers(4, size=60)]
    teacher, student = (
        predictions(role, [best], answers) for role, best in zip(("teacher", "combined"), sets, strict=True)
    )
    found = cells(student, choice_shares(teacher, 4)[0], teacher.credit_RM[0])
    for m, answer in enumerate(answers):
        ways = list(product(sets[0][m], sets[1][m]))
        expected = [
            sum(s == t for t, s in ways),
            sum(s == t != answer for t, s in ways),
            sum(s == answer != t for t, s in ways),
            sum(t == answer != s for t, s in ways),
        ]
        own = [found.same_RM[0, m], found.copied_RM[0, m], found.corrected_RM[0, m], found.damaged_RM[0, m]]
        assert own == pytest.approx([count / len(ways) for count in expected], abs=1e-6)


def test_score_minus_weak_is_correction_minus_damage() -> None:
    """Exactly, with ties, over several runs: score - weak = (1 - weak) correction - weak damage."""
    rng = np.random.default_rng(2)
    answers = [int(answer) for answer in rng.integers(4, size=200)]

    def best() -> list[set[int]]:
        return [
            {int(c) for c in rng.permutation(4)[: rng.integers(1, 3)]} | ({a} if rng.random() < 0.5 else set())
            for a in answers
        ]

    arms = [predictions("teacher", [best()], answers), predictions("combined", [best(), best(), best()], answers)]
    found = figures(arms, answers)
    own, weak = found["combined"].imitation, found["teacher"].score.value
    assert own is not None
    gain = (1 - weak) * own.correction.value - weak * own.damage.value
    assert found["combined"].score.value - weak == pytest.approx(gain, abs=1e-12)
    assert found["combined"].num_ties > 100


def test_a_teacher_that_is_never_wrong_has_no_cells() -> None:
    answers = [0, 1, 2]
    arms = [predictions("teacher", [one_each(0, 1, 2)], answers), predictions("combined", [one_each(0, 0, 2)], answers)]
    found = figures(arms, answers)["combined"]
    assert found.imitation is None
    assert [(one.teacher_score, one.imitation) for one in found.slices] == [(1.0, None)]
