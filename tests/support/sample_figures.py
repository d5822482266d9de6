"""Figures of studies, written by hand: a full one, a minimal one, one of plain text, one with 200 arms."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pipeline.analysis.values import (
    Arm,
    ArmFigures,
    Bin,
    Calibration,
    Comparison,
    Example,
    Imitation,
    Interval,
    LabelSaving,
    Slice,
    StudyFigures,
    TextFigures,
    Training,
    Verdict,
)

TOPICS = ("actor", "album", "animal", "artist", "athlete", "building", "company", "film", "plant", "river", "village")
SHARES = (0.07, 0.12, 0.08, 0.06, 0.12, 0.08, 0.11, 0.09, 0.06, 0.07, 0.14)
WEIGHTS = {  # role -> weights of lm and kd, fraction of gold
    "teacher": (1.0, 0.0, 1.0),
    "zero_shot": (0.0, 0.0, 0.0),
    "gold_only": (1.0, 0.0, 1.0),
    "weak_only": (0.0, 1.0, 0.0),
    "combined": (1.0, 1.0, 0.0625),
    "ceiling": (1.0, 0.0, 1.0),
    "control": (1.0, 1.0, 0.0625),
}


def interval(value: float, half: float = 0.012) -> Interval:
    """An interval that is symmetric about its value."""
    return Interval(value=value, low=value - half, high=value + half)


def arm(role: str, label: str | None = None, *, kd: float | None = None, **changes: Any) -> Arm:
    """An arm with the weights that are usual for its role."""
    lm_weight, kd_weight, gold_fraction = WEIGHTS[role]
    values: dict[str, Any] = {
        "role": role,
        "label": label or role.replace("_", "-"),
        "name": role,
        "seeds": (1,) if role in ("teacher", "zero_shot") else (1, 2, 3),
        "lm_weight": lm_weight,
        "kd_weight": kd_weight if kd is None else kd,
        "gold_fraction": gold_fraction,
        "num_gold": 80 if role in ("gold_only", "combined", "control") else None,
    }
    return Arm(**(values | changes))


def calibration(accuracy: float, *, overconfidence: float) -> Calibration:
    """Ten bins of 150 records; confidence runs ahead of accuracy by `overconfidence`, on average."""
    bins = []
    for i in range(10):
        right = min(max(accuracy + (i - 4.5) * 0.075, 0.06), 0.995)
        bins.append(
            Bin(confidence=min(right + overconfidence * (1.4 - 0.1 * i), 0.999), accuracy=right, num_records=150)
        )
    return Calibration(
        ece=abs(overconfidence) + 0.008, brier=1.3 * (1 - accuracy), overconfidence=overconfidence, bins=tuple(bins)
    )


def imitation(rate: float, correction: float, damage: float, *, excess: float | None) -> Imitation:
    """The cells of a student whose teacher has 257 of 1,500 records wrong."""
    return Imitation(
        num_teacher_wrong=257,
        num_teacher_right=1243,
        imitation=interval(rate, 0.055),
        correction=interval(correction, 0.052),
        damage=interval(damage, 0.013),
        excess=None if excess is None else interval(excess, 0.061),
        agreement=interval(0.829 * (1 - damage) + 0.171 * rate, 0.016),
    )


def slices(gap: float) -> tuple[Slice, ...]:
    """By class, by length and by the teacher's confidence."""

    def part(by: str, value: str, num_records: int, score: float, half: float, **known: float) -> Slice:
        around = Interval(value=min(score, 0.99), low=score - half, high=min(score + half, 1.0))
        return Slice(by=by, value=value, num_records=num_records, score=around, **known)

    found: list[Slice] = []
    for i, (topic, share) in enumerate(zip(TOPICS, SHARES, strict=True)):
        weak = 0.83 + 0.1 * math.sin(1.7 * i) - (0.24 if topic == "village" else 0.0)
        score = weak + gap + 0.03 * math.cos(2.3 * i)
        rate = 0.42 + 0.2 * math.cos(i)
        found.append(part("class", topic, round(1500 * share), score, 0.045, teacher_score=weak, imitation=rate))
    for by, values in (
        ("length", ("1 to 38 characters", "39 to 61 characters", "62 to 180 characters")),
        ("teacher confidence", ("0.00 to 0.72", "0.72 to 0.95", "0.95 to 1.00")),
    ):
        for i, value in enumerate(values):
            weak = 0.79 + 0.05 * i if by == "length" else 0.58 + 0.18 * i
            found.append(part(by, value, 500, weak + gap, 0.028, teacher_score=weak, imitation=0.35 + 0.12 * i))
    return tuple(found)


def comparisons(score: float, others: Mapping[str, float], half: float = 0.011) -> tuple[Comparison, ...]:
    """Paired differences to other roles."""
    return tuple(
        Comparison(
            against=role,
            difference=interval(score - other, half),
            won=max(score - other, 0.0) * 1500 + 61.0,
            lost=max(other - score, 0.0) * 1500 + 61.0,
        )
        for role, other in others.items()
    )


MAIN_SCORES = {
    "teacher": 0.829,
    "zero_shot": 0.412,
    "gold_only": 0.797,
    "weak_only": 0.861,
    "combined": 0.874,
    "ceiling": 0.911,
}


def role_figures(role: str) -> ArmFigures:
    """The main arm of a role."""
    score = MAIN_SCORES[role]
    is_student = role not in ("teacher", "zero_shot")
    others = {name: MAIN_SCORES[name] for name in ("teacher", "zero_shot", "gold_only", "weak_only") if name != role}
    rates = {
        "zero_shot": imitation(0.21, 0.22, 0.55, excess=-0.17),
        "gold_only": imitation(0.384, 0.41, 0.118, excess=None),
        "weak_only": imitation(0.553, 0.392, 0.041, excess=0.169),
        "combined": imitation(0.471, 0.468, 0.043, excess=0.087),
        "ceiling": imitation(0.262, 0.668, 0.039, excess=-0.122),
    }
    return ArmFigures(
        arm=arm(role, "combined kd 1" if role == "combined" else None),
        score=interval(score, 0.019 if role == "teacher" else 0.013),
        nll={"teacher": 0.558, "zero_shot": 2.01, "gold_only": 1.049, "weak_only": 0.423}.get(role, 0.405),
        num_ties=0.0 if is_student else 3.0,
        comparisons=comparisons(score, others) if role != "teacher" else (),
        pgr=Interval(
            value=(score - 0.829) / 0.082, low=(score - 0.829) / 0.082 - 0.2, high=(score - 0.829) / 0.082 + 0.21
        )
        if role in ("weak_only", "combined")
        else None,
        calibration=calibration(score, overconfidence={"gold_only": 0.062, "combined": 0.014}.get(role, 0.028)),
        teacher_calibration=calibration(0.872, overconfidence=0.02) if role == "combined" else None,
        imitation=rates.get(role),
        slices=slices(0.045 if role == "combined" else 0.01) if role in ("combined", "gold_only") else (),
    )


def extra_figures() -> list[ArmFigures]:
    """Other KD weights and the two controls."""
    found = []
    for kd, score in ((0.1, 0.829), (0.3, 0.858), (3.0, 0.866), (10.0, 0.853)):
        found.append(
            ArmFigures(
                arm=arm("combined", f"combined kd {kd:g}", kd=kd, is_main=False, differing={"loss.kd.weight": kd}),
                score=interval(score, 0.013),
                nll=0.43,
                comparisons=comparisons(score, {"teacher": 0.829, "gold_only": 0.797}),
                pgr=interval((score - 0.829) / 0.082, 0.2),
                imitation=imitation(0.4 + 0.03 * kd, 0.47 - 0.02 * kd, 0.045, excess=0.02 + 0.03 * kd),
                calibration=calibration(score, overconfidence=0.02),
            )
        )
    for control, score in (("shuffled", 0.781), ("smoothed", 0.804)):
        found.append(
            ArmFigures(
                arm=arm("control", control, control=control, is_main=control == "shuffled"),
                score=interval(score, 0.014),
                nll=1.1,
                comparisons=comparisons(score, {"gold_only": 0.797}),
                imitation=imitation(0.36, 0.42, 0.13, excess=-0.02),
            )
        )
    return found


def training(label: str, role: str) -> Training:
    """Curves of 200 logged steps; diagnostics every tenth step, looks at dev every twentieth."""
    steps = tuple(range(2, 402, 2))

    def noise(i: int) -> float:
        return math.sin(12.9898 * i) * 0.5 + math.sin(4.1414 * i) * 0.5

    def falling(start: float, end: float, spread: float) -> tuple[float | None, ...]:
        return tuple(
            end + (start - end) * math.exp(-i / 30) * (1 + 0.1 * noise(i)) + spread * noise(i + 7) for i in range(200)
        )

    def every(number: int, values: tuple[float | None, ...]) -> tuple[float | None, ...]:
        return tuple(value if i % number == number - 1 else None for i, value in enumerate(values))

    final = MAIN_SCORES[role]
    rate = {"gold_only": 0.384, "weak_only": 0.553, "combined": 0.471, "ceiling": 0.262}[role]
    curves: dict[str, tuple[float | None, ...]] = {
        "dev_accuracy": every(20, falling(0.42, final, 0.004)),
        "dev_nll": every(20, falling(2.0, 1.0 if role == "gold_only" else 0.42, 0.01)),
        "dev_imitation": every(20, falling(0.2, rate, 0.01)),
    }
    if role != "weak_only":
        curves["lm"] = falling(2.1, {"gold_only": 0.02, "ceiling": 0.25}.get(role, 0.05), 0.012)
    if role in ("weak_only", "combined"):
        curves["kd"] = falling(1.5, 0.11 if role == "weak_only" else 0.14, 0.02)
    if role == "combined":
        curves["grad_cosine"] = every(10, falling(0.62, 0.18, 0.05))
        curves["grad_cosine_teacher_wrong"] = every(10, falling(0.1, -0.34, 0.06))
    return Training(label=label, steps=steps, curves=curves, seconds=171.4)


EXAMPLES = (
    Example(
        kind="copied",
        prompt="Title: Krzywa Wieś, Opole Voivodeship\nTopic:",
        truth="village",
        answers={"teacher": "river", "zero_shot": "album", "gold_only": "village", "combined": "river"},
    ),
    Example(
        kind="copied",
        prompt="Title: Lady in the Lake\nTopic:",
        truth="film",
        answers={"teacher": "album", "zero_shot": "river", "gold_only": "film", "combined": "album"},
    ),
    Example(
        kind="corrected",
        prompt="Title: Acacia pycnostachya\nTopic:",
        truth="plant",
        answers={"teacher": "animal", "zero_shot": "animal", "gold_only": "animal", "combined": "plant"},
    ),
    Example(
        kind="damaged",
        prompt="Title: Bill Hartley (footballer)\nTopic:",
        truth="athlete",
        answers={"teacher": "athlete", "zero_shot": "artist", "gold_only": "athlete", "combined": "actor"},
    ),
)


def further_text(name: str, *, shift: float, is_out_of_domain: bool) -> TextFigures:
    arms = tuple(
        ArmFigures(
            arm=arm(role, "combined kd 1" if role == "combined" else None),
            score=interval(score + shift, 0.018),
            comparisons=comparisons(score, {"gold_only": MAIN_SCORES["gold_only"]}) if role == "combined" else (),
        )
        for role, score in MAIN_SCORES.items()
    )
    return TextFigures(name=name, metric="accuracy", num_records=800, is_out_of_domain=is_out_of_domain, arms=arms)


def full_study() -> StudyFigures:
    """Everything that can be measured, as of a study of Wikipedia titles with three seeds."""
    arms = (*(role_figures(role) for role in MAIN_SCORES), *extra_figures())
    return StudyFigures(
        name="demo",
        main=TextFigures(name="test", metric="accuracy", num_records=1500, is_out_of_domain=False, arms=arms),
        more=(
            further_text("long titles", shift=-0.021, is_out_of_domain=False),
            further_text("news headlines", shift=-0.148, is_out_of_domain=True),
        ),
        training=tuple(
            training("combined kd 1" if role == "combined" else role.replace("_", "-"), role)
            for role in ("gold_only", "weak_only", "combined", "ceiling")
        ),
        label_saving=LabelSaving(
            sizes=(40, 80, 160, 320, 640, 1280),
            scores=tuple(interval(score, 0.016) for score in (0.741, 0.797, 0.832, 0.859, 0.882, 0.901)),
            num_gold=80,
            equivalent=Interval(value=496.0, low=352.0, high=720.0),
            note="Between sizes the curve is interpolated linearly in the logarithm of the size.",
        ),
        examples=EXAMPLES,
        cache={
            "num_sequences": 3000,
            "num_targets": 3000,
            "bytes": 1_870_000,
            "k": 32,
            "retained_mass": 0.9931,
            "histogram": [0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 2, 3, 5, 8, 11, 18, 31, 58, 163, 2698],
        },
        counts={
            "num_corpus": 3000,
            "num_gold": 80,
            "gold_fraction": 0.0625,
            "lm_weight": 1.0,
            "kd_weight": 1.0,
            "temperature": 1.0,
            "num_steps": 400,
            "teacher": "SmolLM2-135M, 4 of 30 layers",
            "student": "SmolLM2-135M",
            "teacher_parameters": 42_500_000,
            "student_parameters": 134_500_000,
        },
        provenance={
            "commands": ["python scripts/study.py study=demo seeds=1,2,3 grid=kd_weight:0.1,0.3,1,3,10"],
            "versions": {"weak-to-strong": "0.9.0", "python": "3.11.2", "torch": "2.13.0", "transformers": "5.23.0"},
            "hashes": {"teacher": "3f6f0b6c1a9e", "cache": "b1946ac92492", "test": "9ae0ea9e3c9c"},
            "hardware": "2 cores of an AMD EPYC 9B14, 8 GB",
            "seconds": 2963.0,
        },
        command="python scripts/study.py study=demo seeds=1,2,3",
    )


def minimal_study() -> StudyFigures:
    """One student, one seed, and nothing else."""
    only = ArmFigures(arm=arm("combined", seeds=(1,)), score=Interval(value=0.61))
    main = TextFigures(name="test", metric="exact_match", num_records=40, is_out_of_domain=False, arms=(only,))
    return StudyFigures(name="first try", main=main)


def plain_text_study() -> StudyFigures:
    """A study without choices: its score is the negative log-likelihood of a target."""
    scores = {"teacher": -3.412, "zero_shot": -3.288, "gold_only": -3.105, "weak_only": -3.171, "combined": -3.052}
    arms = tuple(
        ArmFigures(
            arm=arm(role),
            score=interval(score, 0.021),
            nll=-score,
            comparisons=comparisons(score, {"teacher": -3.412, "gold_only": -3.105}, 0.017)
            if role == "combined"
            else (),
            pgr_refused="no ceiling" if role in ("weak_only", "combined") else None,
        )
        for role, score in scores.items()
    )
    main = TextFigures(name="test", metric="-nll", num_records=600, is_out_of_domain=False, arms=arms)
    return StudyFigures(name="letters", main=main, counts={"num_corpus": 12_000, "num_gold": 400})


def large_study(num_arms: int = 200) -> StudyFigures:
    """The full study with more combined arms: KD weight x temperature x learning rate."""
    study, arms, curves = full_study(), [], []
    best = role_figures("combined")
    for i in range(num_arms - len(study.main.arms)):
        kd, temperature, rate = 0.05 * 1.3 ** (i % 20), (1.0, 2.0, 4.0)[i // 20 % 3], (1e-5, 3e-5, 1e-4)[i // 60 % 3]
        label = f"combined kd {kd:.3g} T {temperature:g} lr {rate:g} #{i}"
        differing = {"loss.kd.weight": kd, "loss.kd.temperature": temperature, "optimizer.learning_rate": rate}
        score = 0.86 - 0.004 * (i % 20 - 9) ** 2 / 10 - 0.01 * (i // 20 % 3)
        arms.append(
            ArmFigures(
                arm=arm("combined", label, kd=kd, differing=differing, is_main=False),
                score=interval(score, 0.013),
                nll=0.43,
                comparisons=comparisons(score, {"teacher": 0.829, "gold_only": 0.797, "weak_only": 0.861}),
                pgr=interval((score - 0.829) / 0.082, 0.2),
                calibration=best.calibration,
                imitation=best.imitation,
                slices=best.slices,
            )
        )
        curves.append(training(label, "combined"))
    main = TextFigures(
        name="test", metric="accuracy", num_records=1500, is_out_of_domain=False, arms=(*study.main.arms, *arms)
    )
    fields = {
        name: getattr(study, name) for name in ("more", "label_saving", "examples", "cache", "counts", "provenance")
    }
    return StudyFigures(name="sweep", main=main, training=(*study.training, *curves), **fields)


def healthy() -> Verdict:
    """A verdict for the full study."""
    return Verdict(
        code="HEALTHY",
        headline="The teacher helped: combined is 7.7 points above gold only and 4.5 points above its teacher.",
        cause="The student learns what the teacher knows and corrects 46.8 % of its errors.",
        action="Keep this weight. Further gain is more likely from a better teacher or more gold than from tuning.",
        evidence=(
            "combined \N{MINUS SIGN} gold only: +7.7 points [+6.6, +8.8], paired, 1,500 records, 177 won, 61 lost",
            "combined \N{MINUS SIGN} teacher: +4.5 points [+3.4, +5.6]",
            "excess imitation over gold only: +8.7 points [+2.6, +14.8]",
        ),
        command="python scripts/study.py study=demo seeds=1,2,3 grid=gold_fraction:0.03,0.125,0.25",
    )


def too_high() -> Verdict:
    """A verdict that asks for a change."""
    return Verdict(
        code="KD_TOO_HIGH",
        headline="The student copies its teacher's errors, and more of them the higher the KD weight.",
        cause="The KD term outweighs the gold labels where the two disagree.",
        action="Lower the KD weight, let it fall earlier, or gate it by the teacher's confidence.",
        evidence=("excess imitation over gold only: +18.7 points [+12.6, +24.8]",),
        command="python scripts/study.py study=demo grid=kd_weight:0.1,0.3",
    )
