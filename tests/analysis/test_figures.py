"""All figures of a text together: against the truth of simulated studies, and for every kind of text."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pipeline.analysis.figures import text_figures
from pipeline.analysis.values import ArmFigures, ArmPredictions, HeldOut
from support.simulated_study import STUDENTS, TrueArm, TrueStudy, simulate, study_of


def figures_of(study: TrueStudy, seed: int = 1) -> dict[str, ArmFigures]:
    arms, held_out = simulate(study, seed)
    return {one.arm.label: one for one in text_figures(arms, held_out, "accuracy").arms}


def test_figures_of_a_simulated_study_are_near_its_truth() -> None:
    """Within four standard errors of 3,000 records."""
    study = study_of(num_records=3000, seeds=2)
    found = figures_of(study)
    for arm in study.arms:
        one = found[arm.role]
        assert one.imitation is not None
        assert one.score.value == pytest.approx(arm.accuracy, abs=0.035)
        assert one.imitation.imitation.value == pytest.approx(arm.imitation, abs=0.07)
        assert one.imitation.correction.value == pytest.approx(arm.true_correction, abs=0.07)
        assert one.imitation.damage.value == pytest.approx(arm.damage(study.weak), abs=0.04)
    excess = found["combined"].imitation.excess if found["combined"].imitation else None
    assert excess is not None
    assert excess.low is not None
    assert excess.low > 0
    too_sure = figures_of(study_of([replace(STUDENTS[3], confidence=0.95)], num_records=3000))["combined"]
    assert too_sure.calibration is not None
    assert too_sure.calibration.overconfidence == pytest.approx(0.12, abs=0.03)


def test_what_is_compared_with_what() -> None:
    grid = [
        TrueArm(role="combined", label=f"kd {w}", accuracy=0.8, kd_weight=w, is_main=w == 1, seeds=2) for w in (0, 1, 3)
    ]
    control = TrueArm(role="control", label="shuffled", accuracy=0.76, control="shuffled", seeds=1)
    found = figures_of(study_of([*STUDENTS[:3], *grid, control], num_records=300))
    against = {label: [one.against for one in figures.comparisons] for label, figures in found.items()}
    references = ["teacher", "zero_shot", "gold_only", "weak_only"]
    assert against["kd 0"] == [*references, "shuffled"]
    assert against["kd 1"] == [*references, "lower kd", "shuffled"]
    assert against["shuffled"] == references
    assert against["gold_only"] == ["teacher", "zero_shot", "weak_only"]
    assert against["teacher"] == references[1:]
    lower = found["kd 3"].comparisons[4].difference.value
    assert lower == pytest.approx(found["kd 3"].score.value - found["kd 1"].score.value)


def test_another_experiment_is_held_against_combined_with_the_same_weights() -> None:
    """A gate, a pool: of role combined under a name of its own. Where no combined arm is the one, against none."""
    weights = (("kd 1", 1.0), ("kd 3", 3.0), ("gated", 1.0), ("sharp", 0.5))
    grid = [TrueArm(role="combined", label=name, accuracy=0.8, kd_weight=w, is_main=False) for name, w in weights]
    arms, held_out = simulate(study_of([*STUDENTS[:3], *grid], num_records=300), 1)
    renamed = [
        replace(one, arm=replace(one.arm, name=one.arm.label)) if one.arm.label in ("gated", "sharp") else one
        for one in arms
    ]
    found = {one.arm.label: one for one in text_figures(renamed, held_out, "accuracy").arms}
    plain = {
        label: one.difference.value
        for label, figures in found.items()
        for one in figures.comparisons
        if one.against == "combined"
    }
    assert plain == {"gated": pytest.approx(found["gated"].score.value - found["kd 1"].score.value)}


def test_the_lower_kd_weight_differs_in_nothing_else() -> None:
    def combined(label: str, kd: float, rate: float) -> TrueArm:
        differing = (("loss.kd.weight", kd), ("optimizer.lr", rate))
        return TrueArm(
            role="combined", label=label, accuracy=0.8, kd_weight=kd, differing=differing, is_main=label == "a"
        )

    arms = [combined("a", 0.3, 1e-4), combined("b", 0.5, 1e-5), combined("c", 1.0, 1e-4), combined("d", 1.0, 1e-5)]
    found = figures_of(study_of(arms, num_records=300))
    lower = {
        label: found[label].score.value - one.difference.value
        for label in "abcd"
        for one in found[label].comparisons
        if one.against == "lower kd"
    }
    assert lower == pytest.approx({"c": found["a"].score.value, "d": found["b"].score.value})


def test_a_pool_is_no_kd_weight_of_the_teachers_own_capture() -> None:
    def combined(label: str, kd: float, accuracy: float, *, is_pool: bool = False) -> TrueArm:
        return TrueArm(
            role="combined",
            label=label,
            accuracy=accuracy,
            kd_weight=kd,
            differing=(("loss.kd.weight", kd),),
            is_main=label == "kd 1",
            is_pool=is_pool,
        )

    arms = [
        combined("kd 1", 1, 0.8),
        combined("pool 3", 3, 0.85, is_pool=True),
        combined("pool 9", 9, 0.7, is_pool=True),
    ]
    found = figures_of(study_of([*STUDENTS[:3], *arms], num_records=300))
    lower = {
        label: found[label].score.value - one.difference.value
        for label in ("kd 1", "pool 3", "pool 9")
        for one in found[label].comparisons
        if one.against == "lower kd"
    }
    assert lower == pytest.approx({"pool 9": found["pool 3"].score.value})


def test_of_several_teacher_runs_the_first_is_imitated() -> None:
    arms, held_out = simulate(study_of(num_records=500), 1)
    other = simulate(study_of(num_records=500, weak=0.9), 2)[0][0]
    names = ("credit_RM", "predicted_RM", "probability_RMC", "num_tied_RM")
    both = {name: np.concatenate([getattr(arms[0], name), getattr(other, name)]) for name in names}
    two_runs = [replace(arms[0], **both), *arms[1:]]  # type: ignore[arg-type]
    one, two = ({a.arm.label: a for a in text_figures(given, held_out, "accuracy").arms} for given in (arms, two_runs))
    assert two["teacher"].score.value > one["teacher"].score.value + 0.01
    for role in ("combined", "gold_only"):
        assert two[role].imitation == one[role].imitation
        assert two[role].pgr == one[role].pgr
        assert two[role].comparisons[0] == one[role].comparisons[0]
        assert two[role].slices == one[role].slices


def test_texts_without_choices_have_scores_and_gaps() -> None:
    arms, _ = simulate(study_of(num_records=500), 1)
    plain = [replace(arm, predicted_RM=None, probability_RMC=None, num_tied_RM=None) for arm in arms]
    found = text_figures(plain, HeldOut(name="news", is_out_of_domain=True), "exact_match")
    assert (found.name, found.metric, found.num_records, found.is_out_of_domain) == ("news", "exact_match", 500, True)
    combined = next(one for one in found.arms if one.arm.role == "combined")
    assert combined.pgr is not None
    assert len(combined.comparisons) == 4
    assert (combined.imitation, combined.calibration, combined.teacher_calibration) == (None, None, None)
    assert (combined.slices, combined.num_ties, combined.nll) == ((), 0.0, None)


def test_a_study_of_one_arm_alone_has_a_score() -> None:
    arms, held_out = simulate(study_of([STUDENTS[1]], num_records=100), 1)
    (found,) = text_figures(arms[1:], held_out, "accuracy").arms
    assert found.comparisons == ()
    assert found.imitation is None
    assert "no teacher" in str(found.pgr_refused)
    assert {one.by for one in found.slices} == {"class", "length"}


def test_arms_that_do_not_fit_together_are_refused() -> None:
    arms, held_out = simulate(study_of(num_records=100), 1)
    shorter: ArmPredictions = simulate(study_of(num_records=90), 1)[0][1]
    for given in ([arms[0], arms[0]], [arms[0], shorter], []):
        with pytest.raises(ValueError, match="different labels on the same records"):
            text_figures(given, held_out, "accuracy")


def test_figures_are_the_same_each_time() -> None:
    assert figures_of(study_of(num_records=200)) == figures_of(study_of(num_records=200))
