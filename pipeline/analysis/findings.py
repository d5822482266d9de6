"""What the rules of the verdict read: differences, rates, damaged classes and the ends of training curves."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from pipeline.analysis import curve_ends
from pipeline.analysis.curve_ends import curve
from pipeline.analysis.values import ArmFigures, Interval, StudyFigures

ASSUMED_SEED_SD = 0.01
"""With one seed the noise between seeds cannot be measured; a standard deviation of 1 point (0.01 nats) is assumed. On
small labeled sets it can be several points (Dodge et al. 2020, arXiv 2002.06305)."""
CLASS_TEACHER_SCORE = 0.5
"""The teacher has a class systematically wrong where it misses most of its records."""
CLASS_COPIED = 0.5
"""Most of the teacher's errors in the class are repeated."""
CLASS_GAP = 0.2
"""By so much the student is below gold_only in the class: classes are small, and there are many of them."""
CLASS_RECORDS = 20
"""Fewer records of a class decide nothing."""
KD_WEIGHT = "loss.kd.weight"
FIXED_ROLES = ("teacher", "zero_shot")
"""Models that the students' seeds do not change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DamagedClass:
    """A class that the teacher gets systematically wrong, that gold_only knows, and that the student lost."""

    value: str
    teacher: float
    gold_only: float
    combined: float
    imitation: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """All that the rules read; None where a study did not measure it.

    Differences are scores of the first arm minus scores of the second, above 0 where the first one is better. Their
    intervals are widened where an arm has one seed only.
    """

    study: StudyFigures
    combined: ArmFigures | None = None
    """The arm that is judged: the main combined arm or, where its KD weight is 0, that of the smallest other weight."""
    gold_only: ArmFigures | None = None
    weak_only: ArmFigures | None = None
    teacher: ArmFigures | None = None
    over_gold: Interval | None = None
    over_teacher: Interval | None = None
    over_weak: Interval | None = None
    over_lower: Interval | None = None
    """To the next lower KD weight."""
    over_shuffled: Interval | None = None
    """To the control with shuffled outputs of the teacher."""
    higher: ArmFigures | None = None
    higher_over: Interval | None = None
    """The next higher KD weight, minus the judged arm."""
    teacher_over_zero_shot: Interval | None = None
    teacher_over_guess: Interval | None = None
    """The teacher's score minus the share of the most frequent answer."""
    excess: Interval | None = None
    imitation: Interval | None = None
    teacher_share_of_errors: float | None = None
    """Share of the student's errors that are the teacher's: imitation P(teacher wrong) / P(student wrong)."""
    damaged: tuple[DamagedClass, ...] = ()
    gold_loss: float | None = None
    """Mean of `lm` over the last fifth of training, nats."""
    gold_loss_left: float | None = None
    """That, divided by its first value."""
    gold_loss_falls: bool | None = None
    divergence: float | None = None
    """Mean KL to the teacher at T = 1 over the last fifth, nats; of the term `kd` where that was not logged."""
    divergence_falls: bool | None = None
    dev_nll_rise: float | None = None
    """Last nll on dev divided by its minimum, minus 1."""
    gold_only_loss: float | None = None
    """`gold_loss` of gold_only."""
    gold_only_rise: float | None = None
    """`dev_nll_rise` of gold_only."""


def findings(study: StudyFigures) -> Findings:
    """Read everything that the rules need off a study's figures."""
    combined, gold_only, teacher = judged_arm(study), _main(study, "gold_only"), _main(study, "teacher")
    found = Findings(
        study=study,
        combined=combined,
        gold_only=gold_only,
        weak_only=_main(study, "weak_only"),
        teacher=teacher,
        teacher_over_zero_shot=_difference(teacher, _main(study, "zero_shot")),
        teacher_over_guess=_over_guess(study, teacher),
        gold_only_loss=curve_ends.end(curve(study, "lm", gold_only)),
        gold_only_rise=curve_ends.rise(curve(study, "dev_nll", gold_only)),
    )
    return found if combined is None else _of_combined(found, combined)


def _of_combined(found: Findings, combined: ArmFigures) -> Findings:
    study, higher = found.study, _next_higher(found.study, combined)
    gold_loss = curve(study, "lm", combined)
    divergence = curve(study, "kd_at_T1", combined) or curve(study, "kd", combined)
    imitation = combined.imitation
    return replace(
        found,
        combined=combined,
        over_gold=_difference(combined, found.gold_only),
        over_teacher=_difference(combined, found.teacher),
        over_weak=_difference(combined, found.weak_only),
        over_lower=_lower_kd(combined, _next_lower(study, combined)),
        over_shuffled=_difference(combined, _shuffled(study, combined)),
        higher=higher,
        higher_over=None if higher is None else _lower_kd(higher, combined),
        excess=None if imitation is None else _widened(imitation.excess, combined, found.gold_only),
        imitation=None if imitation is None else imitation.imitation,
        teacher_share_of_errors=_teacher_share_of_errors(study, combined),
        damaged=_damaged_classes(combined, found.gold_only),
        gold_loss=curve_ends.end(gold_loss),
        gold_loss_left=curve_ends.fraction_left(gold_loss),
        gold_loss_falls=curve_ends.falls(gold_loss),
        divergence=curve_ends.end(divergence),
        divergence_falls=curve_ends.falls(divergence),
        dev_nll_rise=curve_ends.rise(curve(study, "dev_nll", combined)),
    )


# ---------------------------------------------------------------------------------------------- arms


def judged_arm(study: StudyFigures) -> ArmFigures | None:
    """The main combined arm; with a KD weight of 0 it has no teacher, so that the smallest other weight is judged."""
    arms = [arm for arm in study.main.arms if arm.arm.role == "combined"]
    main = next((arm for arm in arms if arm.arm.is_main), None)
    if main is None or main.arm.kd_weight > 0:
        return main
    others = [arm for arm in arms if arm.arm.kd_weight > 0]
    return min(others, key=lambda arm: (arm.arm.is_pool != main.arm.is_pool, arm.arm.kd_weight), default=main)


def _main(study: StudyFigures, role: str) -> ArmFigures | None:
    return next((arm for arm in study.main.arms if arm.arm.role == role and arm.arm.is_main), None)


def _shuffled(study: StudyFigures, combined: ArmFigures) -> ArmFigures | None:
    """The shuffled control with the weights and the gold fraction of the judged arm; of several the main one.

    With other weights a difference would not show what the teacher's knowledge is worth.
    """
    controls = [arm for arm in study.main.arms if arm.arm.role == "control" and arm.arm.control == "shuffled"]
    found = [arm for arm in controls if _weights(arm) == _weights(combined)]
    return max(found, key=lambda arm: arm.arm.is_main, default=None)


def _weights(figures: ArmFigures) -> tuple[float, ...]:
    return (figures.arm.kd_weight, figures.arm.lm_weight, figures.arm.gold_fraction)


def _next_higher(study: StudyFigures, combined: ArmFigures) -> ArmFigures | None:
    """The combined arm that differs in a higher KD weight alone: the one whose `lower kd` is the judged arm."""
    higher = [arm for arm in _alike(study, combined) if arm.arm.kd_weight > combined.arm.kd_weight]
    return min(higher, key=lambda arm: arm.arm.kd_weight, default=None)


def _next_lower(study: StudyFigures, combined: ArmFigures) -> ArmFigures | None:
    """The combined arm that differs in a lower KD weight alone: what `lower kd` of the judged arm refers to."""
    lower = [arm for arm in _alike(study, combined) if arm.arm.kd_weight < combined.arm.kd_weight]
    return max(lower, key=lambda arm: arm.arm.kd_weight, default=None)


def _alike(study: StudyFigures, combined: ArmFigures) -> list[ArmFigures]:
    return [arm for arm in study.main.arms if arm.arm.role == "combined" and _rest(arm) == _rest(combined)]


def _rest(figures: ArmFigures) -> tuple[object, ...]:
    """All settings but the KD weight."""
    arm = figures.arm
    differing = {name: value for name, value in arm.differing.items() if name != KD_WEIGHT}
    return (differing, arm.lm_weight, arm.gold_fraction, arm.num_gold, arm.is_pool)


# --------------------------------------------------------------------------------------- differences


def _difference(arm: ArmFigures | None, other: ArmFigures | None) -> Interval | None:
    """Score of `arm` minus score of `other`: paired where it was compared, else as if both were independent.

    The paired interval of positively correlated scores is the narrower one, so the other errs on the careful side.
    """
    if arm is None or other is None:
        return None
    names = (other.arm.label, other.arm.role) if other.arm.is_main else (other.arm.label,)
    paired = next((c.difference for c in arm.comparisons if c.against in names), None)
    return _widened(paired or _independent(arm.score, other.score), arm, other)


def _independent(first: Interval, second: Interval) -> Interval:
    """first - second: value, and half widths added as roots of sums of squares."""
    value = first.value - second.value
    if first.low is None or first.high is None or second.low is None or second.high is None:
        return Interval(value=value)
    below = math.hypot(first.value - first.low, second.high - second.value)
    above = math.hypot(first.high - first.value, second.value - second.low)
    return Interval(value=value, low=value - below, high=value + above)


def _lower_kd(arm: ArmFigures, lower: ArmFigures | None) -> Interval | None:
    """Score of `arm` minus that of the next lower KD weight, which is `lower`."""
    found = next((c.difference for c in arm.comparisons if c.against == "lower kd"), None)
    return _widened(found, arm, lower)


def _widened(interval: Interval | None, *arms: ArmFigures | None) -> Interval | None:
    """Add the assumed noise of n arms with one seed: half width -> sqrt(half width^2 + n (1.96 ASSUMED_SEED_SD)^2)."""
    if interval is None or interval.low is None or interval.high is None:
        return interval
    single = sum(arm is not None and arm.arm.role not in FIXED_ROLES and len(arm.arm.seeds) == 1 for arm in arms)
    noise = math.sqrt(single) * 1.96 * ASSUMED_SEED_SD
    below, above = interval.value - interval.low, interval.high - interval.value
    return replace(
        interval, low=interval.value - math.hypot(below, noise), high=interval.value + math.hypot(above, noise)
    )


def _over_guess(study: StudyFigures, teacher: ArmFigures | None) -> Interval | None:
    """Above chance: the share of the most frequent class is what a constant answer scores."""
    if teacher is None:
        return None
    counts = [part.num_records for part in teacher.slices if part.by == "class"]
    if not counts:
        return None
    share = max(counts) / study.main.num_records
    return _independent(teacher.score, Interval(value=share, low=share, high=share))


def _teacher_share_of_errors(study: StudyFigures, arm: ArmFigures) -> float | None:
    imitation, num_wrong = arm.imitation, 1 - arm.score.value
    if imitation is None or study.main.metric == "-nll" or num_wrong <= 0:
        return None
    num_teacher_wrong = imitation.num_teacher_wrong / (imitation.num_teacher_wrong + imitation.num_teacher_right)
    return min(imitation.imitation.value * num_teacher_wrong / num_wrong, 1.0)


def _damaged_classes(combined: ArmFigures, gold_only: ArmFigures | None) -> tuple[DamagedClass, ...]:
    """Classes with an excess of copied errors; intervals must not touch, as there are many classes to look at."""
    known = {} if gold_only is None else {part.value: part.score for part in gold_only.slices if part.by == "class"}
    damaged = []
    for part in combined.slices:
        gold = known.get(part.value) if part.by == "class" else None
        if gold is None or gold.low is None or part.score.high is None:
            continue
        if part.teacher_score is None or part.imitation is None or part.num_records < CLASS_RECORDS:
            continue
        is_copied = part.teacher_score < CLASS_TEACHER_SCORE and part.imitation >= CLASS_COPIED
        if is_copied and gold.value - part.score.value >= CLASS_GAP and gold.low > part.score.high:
            damaged.append(
                DamagedClass(
                    value=part.value,
                    teacher=part.teacher_score,
                    gold_only=gold.value,
                    combined=part.score.value,
                    imitation=part.imitation,
                )
            )
    return tuple(sorted(damaged, key=lambda part: part.combined - part.gold_only))
