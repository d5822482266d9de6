"""The numbers behind a verdict, as lines of text: each with its interval, and what was not measured by its name."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.analysis.findings import Findings
from pipeline.analysis.values import Example, Interval

MAX_EXAMPLES = 3
MAX_CHARACTERS = 60
"""Of a text that is quoted."""


def lines(found: Findings) -> Mapping[str, tuple[str, ...]]:
    """Every line of evidence that there can be, by the name under which the rules ask for it."""
    metric = found.study.main.metric
    differences = {
        "combined - gold_only": found.over_gold,
        "combined - teacher": found.over_teacher,
        "combined - weak_only": found.over_weak,
        "combined - lower KD weight": found.over_lower,
        "higher KD weight - combined": found.higher_over,
        "combined - shuffled teacher": found.over_shuffled,
        "teacher - zero_shot": found.teacher_over_zero_shot,
        "teacher - most frequent answer": found.teacher_over_guess,
    }
    rates = {"excess imitation over gold_only": found.excess, "imitation": found.imitation}
    return {
        **{name: (f"{name}: {difference(value, metric)}",) for name, value in differences.items()},
        **{name: (f"{name} (teacher wrong, student equal): {rate(value)}",) for name, value in rates.items()},
        "judged": _judged(found),
        "seeds": (_seeds(found),),
        "share of errors": (f"errors of combined that are the teacher's: {_percent(found.teacher_share_of_errors)}",),
        "classes": _classes(found),
        "examples": _examples(found),
        "gold loss": (_loss("lm loss on gold, last fifth of training", found.gold_loss, found.gold_loss_falls),),
        "divergence": (_loss("KL to the teacher, last fifth of training", found.divergence, found.divergence_falls),),
        "dev nll": (f"nll on dev, last against its minimum: {_percent(found.dev_nll_rise, sign='+')}",),
        "gold_only loss": (_loss("gold_only: lm loss on gold, last fifth of training", found.gold_only_loss, None),),
        "gold_only dev nll": (
            f"gold_only: nll on dev, last against its minimum: {_percent(found.gold_only_rise, '+')}",
        ),
    }


def difference(value: Interval | None, metric: str) -> str:
    """+0.9 points [+0.3, +1.5], or nats where the metric is -nll."""
    if value is None:
        return "not measured"
    scale, digits, unit = (1.0, 3, "nats") if metric == "-nll" else (100.0, 1, "points")
    text = f"{scale * value.value:+.{digits}f} {unit}"
    if value.low is None or value.high is None:
        return f"{text}, no interval"
    return f"{text} [{scale * value.low:+.{digits}f}, {scale * value.high:+.{digits}f}]"


def rate(value: Interval | None) -> str:
    """41.2 % [35.0, 47.5]."""
    if value is None:
        return "not measured"
    text = f"{100 * value.value:.1f} %"
    return (
        text if value.low is None or value.high is None else f"{text} [{100 * value.low:.1f}, {100 * value.high:.1f}]"
    )


def shortened(text: str) -> str:
    """In one line, of at most MAX_CHARACTERS characters."""
    line = " ".join(text.split())
    return line if len(line) <= MAX_CHARACTERS else line[: MAX_CHARACTERS - 3].rstrip() + "..."


def _percent(value: float | None, sign: str = "") -> str:
    return "not measured" if value is None else f"{100 * value:{sign}.1f} %"


def _loss(name: str, value: float | None, is_falling: bool | None) -> str:
    trend = {None: "", True: ", still falling", False: ", no longer falling"}[is_falling]
    return f"{name}: not measured" if value is None else f"{name}: {value:.3f} nats{trend}"


def _seeds(found: Findings) -> str:
    arms = [arm for arm in (found.combined, found.gold_only, found.weak_only) if arm is not None]
    counts = ", ".join(f"{arm.arm.label} {len(arm.arm.seeds)}" for arm in arms)
    single = any(len(arm.arm.seeds) == 1 for arm in arms)
    noise = "; the noise between seeds is assumed where there is one" if single else ""
    return f"{found.study.main.num_records:,} records of {found.study.main.name}; seeds: {counts or 'none'}{noise}"


def _judged(found: Findings) -> tuple[str, ...]:
    """Where it is not the main arm of combined, on which the rest of the report rests."""
    return () if found.combined is None or found.combined.arm.is_main else (f"judged: {found.combined.arm.label}",)


def _classes(found: Findings) -> tuple[str, ...]:
    return tuple(
        f"class {part.value}: teacher {100 * part.teacher:.0f} % right, gold_only {100 * part.gold_only:.0f} %, "
        f"combined {100 * part.combined:.0f} %; it repeats {100 * part.imitation:.0f} % of the teacher's errors there"
        for part in found.damaged
    )


def _examples(found: Findings) -> tuple[str, ...]:
    """Copied errors, those of damaged classes first; none where another arm is judged than they are of."""
    if _judged(found):
        return ()
    damaged = {part.value.strip() for part in found.damaged}
    copied = [example for example in found.study.examples if example.kind == "copied"]
    copied.sort(key=lambda example: example.truth.strip() not in damaged)
    return tuple(_example(example) for example in copied[:MAX_EXAMPLES])


def _example(example: Example) -> str:
    answers = ", ".join(f"{role}: {shortened(answer)}" for role, answer in example.answers.items())
    return f'copied: "{shortened(example.prompt)}" is {shortened(example.truth)}; {answers}'
