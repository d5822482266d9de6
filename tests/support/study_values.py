"""Figures of a study by hand, with just what a rule of the verdict reads."""

from __future__ import annotations

from typing import Any

from pipeline.analysis.values import (
    Arm,
    ArmFigures,
    Comparison,
    Imitation,
    Interval,
    Slice,
    StudyFigures,
    TextFigures,
    Training,
)


def interval(value: float, half: float = 0.01) -> Interval:
    return Interval(value=value, low=value - half, high=value + half)


def arm(role: str, score: float, *, against: dict[str, Interval] | None = None, **options: Any) -> ArmFigures:
    """An arm with its score, its differences and, among the options, fields of `ArmFigures` and of `Arm`."""
    figures = {name: options.pop(name) for name in ("imitation", "slices") if name in options}
    kd_weight = 1.0 if role in ("weak_only", "combined", "control") else 0.0
    values = {
        "label": role,
        "seeds": (1, 2, 3),
        "lm_weight": 1.0,
        "kd_weight": kd_weight,
        "gold_fraction": 0.1,
    } | options
    return ArmFigures(
        arm=Arm(role=role, name=role, **values),
        score=interval(score),
        comparisons=tuple(
            Comparison(against=name, difference=difference, won=0.0, lost=0.0)
            for name, difference in (against or {}).items()
        ),
        **figures,
    )


def imitation(value: float, *, excess: Interval | None = None, teacher: float = 0.8) -> Imitation:
    num_right = round(1000 * teacher)
    return Imitation(
        num_teacher_wrong=1000 - num_right,
        num_teacher_right=num_right,
        imitation=interval(value),
        correction=interval(1 - value),
        damage=interval(0.1),
        excess=excess,
        agreement=interval(0.8),
    )


def slice_of(
    value: str, score: float, *, teacher: float, copied: float, records: int = 100, half: float = 0.05
) -> Slice:
    return Slice(
        by="class",
        value=value,
        num_records=records,
        score=interval(score, half),
        teacher_score=teacher,
        imitation=copied,
    )


def study(*arms: ArmFigures, training: tuple[Training, ...] = (), **options: Any) -> StudyFigures:
    metric = options.pop("metric", "accuracy")
    main = TextFigures(name="test", metric=metric, num_records=1000, is_out_of_domain=False, arms=arms)
    return StudyFigures(name="mine", main=main, training=training, **options)


def curves(label: str, **values: list[float | None]) -> Training:
    """Curves with a value at each step from 1 on."""
    steps = tuple(range(1, 1 + max(len(curve) for curve in values.values())))
    return Training(label=label, steps=steps, curves={k: tuple(v) for k, v in values.items()}, seconds=1.0)
