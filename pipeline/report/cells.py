"""Figures as words: numbers with their units, the cells of a table of arms, one sentence for each conclusion."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipeline.analysis.values import ArmFigures, Comparison, Interval, LabelSaving, TextFigures
from pipeline.page.main_arms import first_of
from pipeline.report.arms import short_name, shown

MAIN = " *"
"""Marks the arm of a role with several on which conclusions rest."""
METRIC_HEADS = {"accuracy": "accuracy %", "exact_match": "exact match %", "-nll": "perplexity"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column of a table: its head and one cell for each row; an empty cell where there is nothing to show."""

    head: str
    cells: tuple[str, ...]
    is_text: bool = False
    """Aligned to the left; numbers are aligned to the right."""
    is_kept: bool = False
    """Shown even where all rows have the same."""


# ------------------------------------------------------------------------------------------ numbers


def bounds(interval: Interval, form: str, *, scale: float = 1.0) -> str:
    """0.874 [0.861, 0.887] in a format such as ".3f", all multiplied by `scale`; a bound that is not known is a "?"."""
    value = format(scale * interval.value, form)
    if interval.low is None and interval.high is None:
        return value
    low, high = ("?" if end is None else format(scale * end, form) for end in (interval.low, interval.high))
    return f"{value} [{low}, {high}]"


def score_text(score: Interval, metric: str) -> str:
    """A score in percent; of minus the nll its perplexity exp(nll), whose bounds change places."""
    if metric != "-nll":
        return bounds(score, ".1f", scale=100)
    low, high = (None if bound is None else _exp(-bound) for bound in (score.high, score.low))
    return bounds(Interval(value=_exp(-score.value), low=low, high=high), ".4g")


def _exp(nll: float) -> float:
    return math.exp(min(nll, 700.0))


def difference_text(difference: Interval, metric: str) -> str:
    """A difference of scores in points of a hundred, of minus the nll in nats a target; above 0 is better."""
    return bounds(difference, "+.3f") if metric == "-nll" else bounds(difference, "+.1f", scale=100)


def unit(metric: str) -> str:
    """The unit of a difference."""
    return "nats" if metric == "-nll" else "points"


def percent(value: Interval) -> str:
    """A rate in percent with its interval."""
    return bounds(value, ".1f", scale=100)


# -------------------------------------------------------------------------------------------- table


def columns(text: TextFigures, *, is_wide: bool) -> list[Column]:
    """The table of arms. Columns without content, or with the same in all rows, are left out.

    `is_wide`: also differences to the other roles, intervals on the PGR, imitation, calibration, nll.
    """
    arms = text.arms
    found = [Column(head="arm", cells=tuple(row_names(arms)), is_text=True, is_kept=True)]
    found += _option_columns(arms)
    found.append(Column(head="seeds", cells=tuple(str(len(figures.arm.seeds)) for figures in arms)))
    found.append(
        Column(
            head=METRIC_HEADS[text.metric],
            cells=tuple(score_text(figures.score, text.metric) for figures in arms),
            is_kept=True,
        )
    )
    for role in ("gold_only", "weak_only", "combined", "teacher", "zero_shot") if is_wide else ("gold_only",):
        found.append(Column(head=f"- {role}", cells=tuple(_difference(figures, role, text.metric) for figures in arms)))
    found += [Column(head=head, cells=cells) for head, cells in _measures(arms, text.metric, is_wide=is_wide).items()]
    return [column for column in found if column.is_kept or _is_informative(column)]


def _measures(arms: Sequence[ArmFigures], metric: str, *, is_wide: bool) -> dict[str, tuple[str, ...]]:
    form = (lambda value: bounds(value, ".2f")) if is_wide else (lambda value: f"{value.value:.2f}")
    measures = {
        "PGR": tuple("" if f.pgr is None else form(f.pgr) for f in arms),
        "agree %": tuple("" if f.imitation is None else f"{100 * f.imitation.agreement.value:.1f}" for f in arms),
        "ties": tuple(f"{f.num_ties:.3g}" for f in arms) if any(f.num_ties for f in arms) else ("",) * len(arms),
    }
    if is_wide:
        measures["imitation %"] = tuple("" if f.imitation is None else percent(f.imitation.imitation) for f in arms)
        excess = [None if f.imitation is None else f.imitation.excess for f in arms]
        measures["excess imitation"] = tuple("" if e is None else bounds(e, "+.1f", scale=100) for e in excess)
        measures["ECE"] = tuple("" if f.calibration is None else f"{f.calibration.ece:.3f}" for f in arms)
    if is_wide and metric != "-nll":
        measures["nll"] = tuple("" if f.nll is None else f"{f.nll:.3f}" for f in arms)
    return measures


def row_names(arms: Sequence[ArmFigures]) -> list[str]:
    """A name for each row: the whole label only where the columns of options do not tell two rows apart."""
    bases = [_base(figures) for figures in arms]
    options = [repr(sorted(figures.arm.differing.items(), key=str)) for figures in arms]
    rows = list(zip(bases, options, strict=True))
    roles = [figures.arm.role for figures in arms]
    return [
        (base if rows.count(row) == 1 else figures.arm.label)
        + MAIN * (figures.arm.is_main and roles.count(figures.arm.role) > 1)
        for base, row, figures in zip(bases, rows, arms, strict=True)
    ]


def _base(figures: ArmFigures) -> str:
    arm = figures.arm
    if arm.role == "control":
        return arm.control
    return arm.role if arm.label.startswith(arm.role) else arm.name


def _option_columns(arms: Sequence[ArmFigures]) -> Iterator[Column]:
    names = list(dict.fromkeys(name for figures in arms for name in figures.arm.differing))
    weights = {"loss.kd.weight": "kd_weight", "loss.lm.weight": "lm_weight", "gold_fraction": "gold_fraction"}
    for name in names:
        cells = []
        for figures in arms:
            known = getattr(figures.arm, weights[name]) or None if name in weights else None
            value = figures.arm.differing.get(name, known)
            cells.append("" if value is None else shown(value))
        yield Column(head=short_name(name, names), cells=tuple(cells))


def _difference(figures: ArmFigures, role: str, metric: str) -> str:
    found = next((c for c in figures.comparisons if c.against == role), None)
    return "" if found is None else difference_text(found.difference, metric)


def _is_informative(column: Column) -> bool:
    filled = [cell for cell in column.cells if cell not in ("", "-")]
    return bool(filled) and (len(column.cells) == 1 or len(set(column.cells)) > 1)


# ---------------------------------------------------------------------------------------- sentences


@dataclass(frozen=True, slots=True, kw_only=True)
class Paired:
    """The paired differences of one arm, in parts that a terminal aligns."""

    about: str
    """What all of them share: the records and the seeds."""
    rows: tuple[tuple[str, str, str], ...]
    """(combined - gold_only, +0.9 points [+0.3, +1.5], 26 won / 13 lost)."""


def paired_differences(text: TextFigures) -> Iterator[Paired]:
    """Of combined and of pools to all other roles, of weak_only to the floor and the teacher."""
    combined, weak_only = (first_of(text, role) for role in ("combined", "weak_only"))
    main = "combined" if combined is None else combined.arm.name  # gated, for example, which is compared with combined
    found = [(main, combined, None), *((figures.arm.label, figures, None) for figures in pools(text))]
    for name, figures, others in [*found, ("weak_only", weak_only, ("gold_only", "teacher"))]:
        compared = () if figures is None else figures.comparisons
        rows = tuple(_paired_row(name, one, text.metric) for one in compared if others is None or one.against in others)
        if figures is not None and rows:
            yield Paired(about=f"paired, {text.num_records:,} records; {seeds(figures)}", rows=rows)


def pools(text: TextFigures) -> list[ArmFigures]:
    """The combined arms that learnt from a pool, beside the one on which conclusions rest."""
    arms = [figures for figures in text.arms if figures.arm.role == "combined"]
    return [figures for figures in arms if figures.arm.is_pool and not figures.arm.is_main]


def _paired_row(role: str, other: Comparison, metric: str) -> tuple[str, str, str]:
    value, space, interval = difference_text(other.difference, metric).partition(" ")
    difference = f"{value} {unit(metric)}{space}{interval}"
    return f"{role} - {other.against}", difference, f"{other.won:.0f} won / {other.lost:.0f} lost"


def seeds(figures: ArmFigures) -> str:
    """How many seeds an arm has; of one it is not known how much another would differ."""
    count = len(figures.arm.seeds)
    return f"{count} seeds" if count > 1 else "1 seed: seed noise unknown"


def conclusions(text: TextFigures, saving: LabelSaving | None = None) -> Iterator[str]:
    """What follows from a text's figures beside the paired differences, one sentence each."""
    figures = first_of(text, "combined", "weak_only")
    if figures is not None:
        yield from _student_lines(figures)
    for pool in pools(text):
        if pool.pgr is not None:
            yield f"PGR of {pool.arm.label}  {bounds(pool.pgr, '.2f')}"
    if saving is not None:
        yield saving_line(saving)


def _student_lines(figures: ArmFigures) -> Iterator[str]:
    role, imitation, calibration = figures.arm.role, figures.imitation, figures.calibration
    if figures.pgr is not None:
        yield f"PGR of {role}  {bounds(figures.pgr, '.2f')}  (performance gap recovered, not clamped)"
    elif figures.pgr_refused is not None:
        yield f"PGR of {role}  not given: {figures.pgr_refused}"
    if imitation is not None:
        yield (
            f"where the teacher is wrong ({imitation.num_teacher_wrong:,} records) {role} copies "
            f"{percent(imitation.imitation)} % and corrects {percent(imitation.correction)} %; where it is right, "
            f"{role} errs in {percent(imitation.damage)} %"
        )
        if imitation.excess is not None:
            yield f"excess imitation over gold_only  {bounds(imitation.excess, '+.1f', scale=100)} points"
    if calibration is not None:
        yield (
            f"calibration of {role}  ECE {calibration.ece:.3f}, Brier {calibration.brier:.3f}, over-confidence "
            f"{calibration.overconfidence:+.3f}"
        )
    lowest = sorted((part for part in figures.slices if part.by == "class"), key=lambda part: part.score.value)[:3]
    if lowest:
        parts = [
            f"{part.value} {100 * part.score.value:.1f} %"
            + ("" if part.teacher_score is None else f" (teacher {100 * part.teacher_score:.1f} %)")
            for part in lowest
        ]
        yield f"lowest classes of {role}  {', '.join(parts)}"


def saving_line(saving: LabelSaving) -> str:
    """How many gold labels the teacher was worth."""
    if saving.equivalent is None:
        return f"label saving  not known: {saving.note}"
    return (
        f"label saving  combined with {saving.num_gold:,} gold records scores as gold_only with "
        f"{bounds(saving.equivalent, ',.0f')}; {saving.note}"
    )
