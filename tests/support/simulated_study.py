"""Simulated studies: predictions of arms whose true scores, copying and seed noise are known exactly.

Given whether the teacher is right on a record, a run of an arm compares a uniform number v with the arm's rates:

    teacher right:  right where v < 1 - damage, else a wrong choice
    teacher wrong:  right where v < correction, the teacher's choice where v > 1 - imitation, else another wrong choice
    v = Phi(sqrt(a) difficulty_record + sqrt(b) effect_record,arm + sqrt(1 - a - b) noise_record,run)

so rates over many records are the arm's own, and records are alike for all arms (a) and for the seeds of an arm (b).
Seed noise moves 1 - damage and correction of a run by the same normal number, with the standard deviation of the score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np

from pipeline.analysis.values import Arm, ArmPredictions, HeldOut


@dataclass(frozen=True, slots=True, kw_only=True)
class TrueArm:
    """The truth about an arm."""

    role: str
    accuracy: float
    imitation: float = 0.0
    """P(student = teacher | teacher wrong)."""
    correction: float | None = None
    """P(student right | teacher wrong); None: `accuracy` of what imitation leaves."""
    seeds: int = 3
    seed_noise: float = 0.0
    """Standard deviation over seeds of the score, as a fraction."""
    confidence: float | None = None
    """Mean probability of the predicted choice; None: the accuracy."""
    kd_weight: float = 1.0
    label: str | None = None
    is_main: bool = True
    is_pool: bool = False
    control: str = "none"
    gold_fraction: float = 0.1
    num_gold: int | None = None
    differing: tuple[tuple[str, float], ...] = ()

    @property
    def true_correction(self) -> float:
        return self.accuracy * (1 - self.imitation) if self.correction is None else self.correction

    def damage(self, weak: float) -> float:
        """Solved from score = weak (1 - damage) + (1 - weak) correction."""
        damage = 1 - (self.accuracy - (1 - weak) * self.true_correction) / weak
        assert -1e-9 <= damage <= 1, f"{self.role}: no damage gives accuracy {self.accuracy}"
        assert self.true_correction + self.imitation <= 1 + 1e-9, f"{self.role}: correction and imitation exceed 1"
        return max(damage, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrueStudy:
    """The truth about a study. The teacher is the first arm, its `accuracy` the weak score."""

    weak: float = 0.75
    arms: tuple[TrueArm, ...]
    num_records: int = 1000
    num_choices: int = 5
    shared_difficulty: float = 0.3
    """a of the module's formula."""
    arm_effect: float = 0.4
    """b of the module's formula."""
    rotated_class: int | None = None
    """A class that the teacher always takes for the next one; its other errors fill up to `weak`."""

    def true_pgr(self, label: str) -> float:
        """(accuracy - weak) / (accuracy of the ceiling - weak)."""
        ceiling = next(arm.accuracy for arm in self.arms if arm.role == "ceiling" and arm.is_main)
        return (self.arm(label).accuracy - self.weak) / (ceiling - self.weak)

    def arm(self, label: str) -> TrueArm:
        return next(arm for arm in self.arms if (arm.label or arm.role) == label)


STUDENTS = (
    TrueArm(role="zero_shot", accuracy=0.55, imitation=0.1, seeds=1, kd_weight=0.0),
    TrueArm(role="gold_only", accuracy=0.76, imitation=0.12, kd_weight=0.0, gold_fraction=1.0, num_gold=500),
    TrueArm(role="weak_only", accuracy=0.79, imitation=0.5, correction=0.3, gold_fraction=0.0),
    TrueArm(role="combined", accuracy=0.83, imitation=0.3, correction=0.5, num_gold=500),
    TrueArm(role="ceiling", accuracy=0.9, imitation=0.06, kd_weight=0.0, gold_fraction=1.0),
)
"""A healthy study: combined above gold only, weak only and the teacher (0.75)."""


def study_of(students: Sequence[TrueArm] = STUDENTS, *, seeds: int | None = None, **options: object) -> TrueStudy:
    """A study of these students; `seeds` replaces the number of seeds of all that were trained."""
    arms = tuple(arm if seeds is None or arm.role == "zero_shot" else replace(arm, seeds=seeds) for arm in students)
    return TrueStudy(arms=arms, **options)  # type: ignore[arg-type]


def simulate(study: TrueStudy, seed: int) -> tuple[list[ArmPredictions], HeldOut]:
    """Predictions of the teacher (one run) and of all arms, and what is known of the records."""
    rng = np.random.default_rng(seed)
    num_records, num_choices = study.num_records, study.num_choices
    answer_M = rng.integers(num_choices, size=num_records)
    teacher_M = _teacher_choices(study, answer_M, rng)
    difficulty_M = rng.standard_normal(num_records)
    teacher = TrueArm(role="teacher", accuracy=study.weak, seeds=1, kd_weight=0.0, gold_fraction=1.0)
    arms = [_predictions(teacher, teacher_M[None], answer_M, num_choices, rng)]
    for arm in study.arms:
        predicted_RM = _student_choices(study, arm, answer_M, teacher_M, difficulty_M, rng)
        arms.append(_predictions(arm, predicted_RM, answer_M, num_choices, rng))
    held_out = HeldOut(
        name="test",
        answer_M=answer_M,
        class_M=np.array([f"class {answer}" for answer in answer_M]),
        length_M=rng.integers(20, 400, size=num_records),
    )
    return arms, held_out


def _teacher_choices(study: TrueStudy, answer_M: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Right with probability `weak` over all records, else a wrong choice."""
    is_rotated_M = answer_M == (-1 if study.rotated_class is None else study.rotated_class)
    share = 0.0 if study.rotated_class is None else 1 / study.num_choices
    assert study.weak <= 1 - share, f"a teacher that loses a class cannot score {study.weak}"
    is_right_M = (rng.random(len(answer_M)) < study.weak / (1 - share)) & ~is_rotated_M
    step_M = np.where(is_rotated_M, 1, rng.integers(1, study.num_choices, size=len(answer_M)))
    return np.where(is_right_M, answer_M, (answer_M + step_M) % study.num_choices)


def _student_choices(
    study: TrueStudy,
    arm: TrueArm,
    answer_M: np.ndarray,
    teacher_M: np.ndarray,
    difficulty_M: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """The choices of all runs of an arm, as the module describes."""
    shape = (arm.seeds, len(answer_M))
    a, b = study.shared_difficulty, study.arm_effect
    latent_RM = np.sqrt(a) * difficulty_M + np.sqrt(b) * rng.standard_normal(len(answer_M))
    latent_RM = latent_RM + np.sqrt(1 - a - b) * rng.standard_normal(shape)
    shift_R1 = arm.seed_noise * rng.standard_normal((arm.seeds, 1))
    correction = arm.true_correction
    right_R1, mended_R1 = 1 - arm.damage(study.weak) + shift_R1, correction + shift_R1
    # what a seed corrects more, it takes from copied and from other errors alike
    kept_R1 = 1 - arm.imitation * (1 - shift_R1 / max(1 - correction, 1e-9))
    is_teacher_right_M = teacher_M == answer_M
    is_right_RM = latent_RM < np.where(is_teacher_right_M, _quantile(right_R1), _quantile(mended_R1))
    is_copy_RM = ~is_teacher_right_M & (latent_RM > _quantile(kept_R1))
    wrong_RM = _another_wrong_choice(answer_M, teacher_M, study.num_choices, rng, shape)
    return np.where(is_right_RM, answer_M, np.where(is_copy_RM, teacher_M, wrong_RM))


def _quantile(probability: np.ndarray) -> np.ndarray:
    """Inverse of the normal distribution function: v < p is the same as latent < quantile(p)."""
    inside = np.clip(probability, 1e-12, 1 - 1e-12)
    return np.vectorize(NormalDist().inv_cdf, otypes=[float])(inside)


def _another_wrong_choice(
    answer_M: np.ndarray, teacher_M: np.ndarray, num_choices: int, rng: np.random.Generator, shape: tuple[int, int]
) -> np.ndarray:
    """Uniform over the choices that are neither the answer nor the teacher's."""
    assert num_choices >= 3, "with two choices a wrong student always agrees with a wrong teacher"
    step_M = (teacher_M - answer_M) % num_choices  # 0 where the teacher is right
    step_RM = rng.integers(1, num_choices - (step_M > 0), size=shape)
    step_RM = step_RM + ((step_M > 0) & (step_RM >= step_M))
    return (answer_M + step_RM) % num_choices


def _predictions(
    arm: TrueArm, predicted_RM: np.ndarray, answer_M: np.ndarray, num_choices: int, rng: np.random.Generator
) -> ArmPredictions:
    """With probabilities: Beta distributed between 1/C and 1 for the predicted choice, equal for all others."""
    mean = max(arm.accuracy if arm.confidence is None else arm.confidence, 1 / num_choices + 0.01)
    scaled = min((mean - 1 / num_choices) / (1 - 1 / num_choices), 0.999)
    top_RM = 1 / num_choices + (1 - 1 / num_choices) * rng.beta(6 * scaled, 6 * (1 - scaled), size=predicted_RM.shape)
    probability_RMC = np.repeat(((1 - top_RM) / (num_choices - 1))[..., None], num_choices, axis=2)
    np.put_along_axis(probability_RMC, predicted_RM[..., None], top_RM[..., None], axis=2)
    value = Arm(
        role=arm.role,
        label=arm.label or arm.role,
        name=arm.role,
        seeds=tuple(range(1, arm.seeds + 1)),
        lm_weight=1.0,
        kd_weight=arm.kd_weight,
        gold_fraction=arm.gold_fraction,
        num_gold=arm.num_gold,
        control=arm.control,
        differing=dict(arm.differing),
        is_main=arm.is_main,
        is_pool=arm.is_pool,
    )
    return ArmPredictions(
        arm=value,
        credit_RM=(predicted_RM == answer_M).astype(float),
        weight_M=np.ones(len(answer_M)),
        predicted_RM=predicted_RM,
        probability_RMC=probability_RMC,
        num_tied_RM=np.ones_like(predicted_RM),
    )
