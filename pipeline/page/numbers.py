"""Numbers as text: scores, differences, intervals, weights and durations, each in one way everywhere."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.analysis.values import Interval

MINUS, NO_BREAK = "\N{MINUS SIGN}", "\N{NARROW NO-BREAK SPACE}"

ROLES = {
    "teacher": "teacher",
    "zero_shot": "zero-shot",
    "gold_only": "gold only",
    "weak_only": "weak only",
    "combined": "combined",
    "control": "control",
    "ceiling": "ceiling",
    "other": "other",
    "lower kd": "the next lower KD weight",
}
"""How a role is written, in the order in which one reads them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How the scores of a metric are shown."""

    factor: float
    digits: int
    unit: str
    difference_unit: str
    axis_format: str
    """In d3's notation."""
    title: str


PERCENT = Scale(
    factor=100.0, digits=1, unit=f"{NO_BREAK}%", difference_unit=" points", axis_format=".0%", title="accuracy"
)
SCALES = {
    "accuracy": PERCENT,
    "exact_match": Scale(
        factor=100.0, digits=1, unit=f"{NO_BREAK}%", difference_unit=" points", axis_format=".0%", title="exact match"
    ),
    "-nll": Scale(
        factor=1.0,
        digits=3,
        unit=f"{NO_BREAK}nats",
        difference_unit=f"{NO_BREAK}nats",
        axis_format=".2f",
        title="minus negative log-likelihood of a target, nats",
    ),
}
"""By the metric of a text."""
RATIO = Scale(factor=1.0, digits=2, unit="", difference_unit="", axis_format=".2f", title="ratio")
COUNT = Scale(factor=1.0, digits=0, unit="", difference_unit="", axis_format=",d", title="count")


def decimal(value: float, digits: int, *, signed: bool = False) -> str:
    """A number with a true minus sign; zero has no sign, however it was rounded."""
    rounded = round(value, digits) or 0.0
    sign = MINUS if rounded < 0 else "+" if signed and rounded > 0 else ""
    return f"{sign}{abs(rounded):,.{digits}f}"


def score(value: float, scale: Scale = PERCENT) -> str:
    """`87.1 %` or, of -nll, `-3.052 nats`."""
    return decimal(value * scale.factor, scale.digits) + scale.unit


def bounds(interval: Interval, scale: Scale = PERCENT, *, signed: bool = False) -> str:
    """`[85.8, 88.4]`, a bound that is not known as a "?"; empty where no interval was computed."""
    if interval.low is None and interval.high is None:
        return ""
    ends = (
        "?" if end is None else decimal(end * scale.factor, scale.digits, signed=signed)
        for end in (interval.low, interval.high)
    )
    return f"[{', '.join(ends)}]"


def difference(value: float, scale: Scale = PERCENT) -> str:
    """`+0.9 points`."""
    return decimal(value * scale.factor, scale.digits, signed=True) + scale.difference_unit


def count(value: float) -> str:
    """A whole number with its thousands apart; one decimal where it is a mean over seeds."""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.1f}"


def plain(value: float) -> str:
    """A weight or another option: as few digits as it has, at most four."""
    return f"{value:.4g}".replace("-", MINUS)


def parameters(value: float) -> str:
    """A number of parameters: 134500000 -> "134 M"."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{NO_BREAK}{unit}"
    return f"{value:.0f}"


def duration(seconds: float) -> str:
    """`49 min 23 s`: the two largest units."""
    whole = round(seconds)
    days, hours, minutes = whole // 86_400, whole // 3600 % 24, whole // 60 % 60
    parts = [(days, "d"), (hours, "h"), (minutes, "min"), (whole % 60, "s")]
    while len(parts) > 1 and not parts[0][0]:
        parts.pop(0)
    return " ".join(f"{value}{NO_BREAK}{unit}" for value, unit in parts[:2])
