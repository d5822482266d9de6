"""Simulated studies for which one verdict is right: true rates of all arms, and training curves with noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from pipeline.analysis.figures import text_figures
from pipeline.analysis.values import StudyFigures, Training
from support.simulated_study import STUDENTS, TrueArm, TrueStudy, simulate

NUM_STEPS = 200
SEED_NOISE = 0.005


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A true study, and the verdict that it was built for."""

    code: str
    study: TrueStudy
    curves: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Curves of the combined arm: value at the first step and level that it has reached at two thirds of the steps."""
    falling: tuple[str, ...] = ()
    """Curves that fall on a straight line instead, to that value at the last step."""
    dev_nll: tuple[float, ...] = ()
    """Looks at dev, evenly over the steps."""


def arms(**accuracy_and_imitation: tuple[float, float]) -> tuple[TrueArm, ...]:
    """The students of a healthy study, these with another accuracy, imitation and, of what is left, correction."""
    default = {arm.role: arm for arm in STUDENTS}
    found = []
    for role in ("zero_shot", "gold_only", "weak_only", "combined"):
        arm = replace(default[role], seed_noise=0.0 if role == "zero_shot" else SEED_NOISE)
        if role in accuracy_and_imitation:
            accuracy, imitation = accuracy_and_imitation[role]
            arm = replace(arm, accuracy=accuracy, imitation=imitation, correction=min(0.9, 0.95 - imitation) * accuracy)
        found.append(arm)
    return tuple(found)


SHUFFLED = TrueArm(role="control", label="shuffled", control="shuffled", accuracy=0.79, imitation=0.12, correction=0.6)
HIGHER = TrueArm(
    role="combined", label="kd 3", kd_weight=3.0, accuracy=0.86, imitation=0.3, num_gold=500, is_main=False
)
CHANCE = tuple(
    TrueArm(role=role, accuracy=accuracy, imitation=0.06, seed_noise=SEED_NOISE, seeds=seeds)
    for role, accuracy, seeds in (
        ("zero_shot", 0.5, 1),
        ("gold_only", 0.76, 3),
        ("weak_only", 0.2, 3),
        ("combined", 0.76, 3),
    )
)
EVEN = arms(gold_only=(0.76, 0.3), weak_only=(0.76, 0.4), combined=(0.76, 0.3))

SCENARIOS: dict[str, Scenario] = {
    "healthy": Scenario(code="HEALTHY", study=TrueStudy(arms=arms())),
    "healthy, with a control": Scenario(
        code="HEALTHY", study=TrueStudy(arms=(*arms(), replace(SHUFFLED, accuracy=0.75)))
    ),
    "errors copied at a high weight": Scenario(
        code="KD_TOO_HIGH",
        study=TrueStudy(weak=0.7, arms=arms(gold_only=(0.82, 0.1), combined=(0.74, 0.7), weak_only=(0.73, 0.8))),
    ),
    "one class rotated": Scenario(
        code="KD_TOO_HIGH",
        study=TrueStudy(
            weak=0.76,
            num_records=1500,
            num_choices=11,
            rotated_class=4,
            arms=arms(gold_only=(0.78, 0.08), combined=(0.78, 0.8), weak_only=(0.77, 0.85)),
        ),
    ),
    "labels outweigh the teacher": Scenario(
        code="KD_TOO_LOW",
        study=TrueStudy(arms=arms(gold_only=(0.76, 0.12), combined=(0.77, 0.15), weak_only=(0.86, 0.3))),
    ),
    "a higher weight is better": Scenario(
        code="KD_TOO_LOW",
        study=TrueStudy(
            arms=(*arms(combined=(0.78, 0.15), weak_only=(0.78, 0.3)), replace(HIGHER, seed_noise=SEED_NOISE))
        ),
    ),
    "a copy of the teacher": Scenario(
        code="IMITATION_PLATEAU",
        study=TrueStudy(arms=arms(gold_only=(0.74, 0.12), combined=(0.75, 0.85), weak_only=(0.75, 0.85))),
        curves={"kd_at_T1": (1.5, 0.03), "lm": (1.5, 0.1)},
    ),
    "random labels": Scenario(code="BAD_TEACHER", study=TrueStudy(weak=0.2, arms=CHANCE)),
    "a shuffled teacher is as good": Scenario(
        code="BAD_TEACHER",
        study=TrueStudy(
            num_records=2000,
            arms=(
                *arms(combined=(0.78, 0.12), weak_only=(0.77, 0.4)),
                replace(SHUFFLED, accuracy=0.78, seed_noise=SEED_NOISE),
            ),
        ),
    ),
    "training cut off": Scenario(
        code="UNDERTRAINED",
        study=TrueStudy(arms=arms(gold_only=(0.70, 0.12), combined=(0.65, 0.12), weak_only=(0.64, 0.15))),
        curves={"lm": (2.0, 0.9), "kd_at_T1": (1.5, 0.6)},
        falling=("lm", "kd_at_T1"),
    ),
    "gold memorised": Scenario(
        code="GOLD_OVERFIT",
        study=TrueStudy(arms=arms(gold_only=(0.74, 0.12), combined=(0.79, 0.3), weak_only=(0.80, 0.4))),
        curves={"lm": (1.5, 0.01), "kd_at_T1": (1.5, 0.3)},
        dev_nll=(0.9, 0.7, 0.62, 0.6, 0.65, 0.7, 0.75, 0.8),
    ),
    "no difference": Scenario(
        code="INCONCLUSIVE",
        study=TrueStudy(arms=EVEN),
        curves={"lm": (1.5, 0.2), "kd_at_T1": (1.5, 0.3)},
        dev_nll=(0.9, 0.7, 0.62, 0.6, 0.6, 0.6),
    ),
}


def figures(scenario: Scenario, seed: int) -> StudyFigures:
    """One study of a scenario, with all its figures."""
    predictions, held_out = simulate(scenario.study, seed)
    main = text_figures(predictions, held_out, "accuracy")
    training = (_training(scenario, np.random.default_rng(seed)),) if scenario.curves else ()
    return StudyFigures(name="simulated", main=main, training=training)


def _training(scenario: Scenario, rng: np.random.Generator) -> Training:
    """Exponential curves (or straight lines) with noise of 5 % from batch to batch, the mean of three seeds."""
    steps = np.arange(1, NUM_STEPS + 1)
    curves: dict[str, tuple[float | None, ...]] = {}
    for key, (first, last) in scenario.curves.items():
        level = last + (first - last) * np.exp(-steps / (NUM_STEPS / 15))
        if key in scenario.falling:
            level = first + (last - first) * steps / NUM_STEPS
        curves[key] = tuple(map(float, level * (1 + 0.05 / np.sqrt(3) * rng.standard_normal(NUM_STEPS))))
    if scenario.dev_nll:
        every = NUM_STEPS // len(scenario.dev_nll)
        looks = {every * number: nll for number, nll in enumerate(scenario.dev_nll, 1)}
        curves["dev_nll"] = tuple(looks.get(int(step)) for step in steps)
    return Training(label="combined", steps=tuple(map(int, steps)), curves=curves, seconds=1.0)
