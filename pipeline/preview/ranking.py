"""From scores of records to a ranking: means with paired intervals, as a table, as sentences and as plain data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from pipeline.analysis.bootstrap import Ratio, interval, rates
from pipeline.analysis.values import Interval
from pipeline.preview.recipes import Recipe
from pipeline.preview.trials import Scored, mean_pool

POOLS = (
    "Pools learn gold too, in their members and in their student, as those of a study do: compare them with gold 0.3."
)
WORTH = (
    "What this is good for: it is a forecast by linear students on the untrained student's features. Agreement with "
    "real training was mixed so far: for a gate +1.1 points were forecast and +0.9 came, for a pool of two folds +1.1 "
    "and +0.3; with a teacher below the floor the order was nearly the opposite. Use it to choose what to train next, "
    "with several seeds; it is no result."
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Ranked:
    """One recipe, with the means over resamples and held-out records."""

    recipe: Recipe
    accuracy: float
    nll: float
    """Nats a record."""
    difference: Interval | None
    """Of the accuracy to that of the first recipe, paired; None of that one."""
    nll_difference: Interval | None
    by_resample: tuple[float, ...]
    """The accuracy on each resample."""
    gradient: float
    """The largest entry of a gradient at the end of training."""
    pool: tuple[float, float] | None
    """Weights of teacher and member in its pool, on average over resamples."""


def rank(recipes: Sequence[Recipe], trials: Sequence[Sequence[Scored]]) -> list[Ranked]:
    """The recipes by accuracy, then by nll, best first. `trials` has for each resample the scores of all recipes."""
    correct, nll = (
        {
            recipe.name: np.stack([getattr(scored[place], name).numpy() for scored in trials])
            for place, recipe in enumerate(recipes)
        }
        for name in ("correct_D", "nll_D")
    )
    differences = _differences(correct, recipes[0].name, are_fractions=True)
    nll_differences = _differences(nll, recipes[0].name, are_fractions=False)
    found = [
        Ranked(
            recipe=recipe,
            accuracy=float(correct[recipe.name].mean()),
            nll=float(nll[recipe.name].mean()),
            difference=differences.get(recipe.name),
            nll_difference=nll_differences.get(recipe.name),
            by_resample=tuple(correct[recipe.name].mean(axis=1).tolist()),
            gradient=max(scored[place].gradient for scored in trials),
            pool=mean_pool([pool for scored in trials if (pool := scored[place].pool) is not None]),
        )
        for place, recipe in enumerate(recipes)
    ]
    return sorted(found, key=lambda one: (-one.accuracy, one.nll))


def _differences(values: Mapping[str, np.ndarray], first: str, *, are_fractions: bool) -> dict[str, Interval]:
    """Of each other recipe: mean of its values minus those of the first on the same resample and record [R, D].

    The interval covers new records and new resamples (analysis/bootstrap.py). Because differences are taken before, it
    is paired on both. As there, fractions have a right and a wrong record more, here +1 and -1: else a difference in
    one record, all others alike, would never be 0.
    """
    others = [name for name in values if name != first]
    pairs = [values[name] - values[first] for name in others]
    more_R2 = np.tile([1.0, -1.0] if are_fractions else [], (len(values[first]), 1))
    widened = [np.concatenate([pair_RD, more_R2], axis=1) for pair_RD in pairs]
    weight_M = np.ones(widened[0].shape[1])
    (found,) = rates([Ratio(arm_labels=others, values_RM=widened, weight_M=weight_M, is_fraction=False)])
    return {
        name: interval(float(pair_RD.mean()), rate.draws_D, [(1.0, rate)])
        for name, pair_RD, rate in zip(others, pairs, found, strict=True)
    }


# ------------------------------------------------------------------------------------------- text


def commands_of(one: Ranked, fields: Mapping[str, str]) -> list[str]:
    """The commands of the real training; `fields` are the scripts and places of the study."""
    return [command.format(**fields) for command in one.recipe.commands]


def table(ranked: Sequence[Ranked]) -> list[str]:
    """One line a recipe."""
    lines = [f"{'':>2}  {'recipe':<24} {'accuracy':>8} {'nll':>7}  difference to weak_only, points, 95 % interval"]
    for place, one in enumerate(ranked, 1):
        shown = "" if one.difference is None else _points(one.difference)
        lines.append(f"{place:>2}  {one.recipe.name:<24} {one.accuracy:>8.1%} {one.nll:>7.3f}  {shown}".rstrip())
    return lines


def _points(difference: Interval) -> str:
    assert difference.low is not None
    assert difference.high is not None
    value, low, high = (100 * bound for bound in (difference.value, difference.low, difference.high))
    return f"{value:+5.1f} [{low:+.1f}, {high:+.1f}]"


def advice(ranked: Sequence[Ranked], fields: Mapping[str, str]) -> list[str]:
    """The commands of all recipes, those of the best one, and what the ranking is worth."""
    lines = ["Commands of the real training:", ""]
    for one in ranked:
        lines += [f"  {one.recipe.name}", *(f"      {command}" for command in commands_of(one, fields))]
    best = ranked[0]
    lines += ["", f"The best: {best.recipe.name}. Train it:", ""]
    lines += [f"    {command}" for command in commands_of(best, fields)]
    if best.difference is not None:
        assert best.difference.low is not None
        settled = (
            "is above 0" if best.difference.low > 0 else "contains 0: the ranking does not settle that it is better"
        )
        lines += ["", f"Its interval to weak_only {settled}; as the best of {len(ranked)} it looks better than it is."]
    return [*lines, "", POOLS, WORTH]


def disproof(ranked: Sequence[Ranked], gold_only: float | None) -> list[str]:
    """A warning where a fine-tuned student that learnt gold alone has a better score on dev than each linear one."""
    best = max(one.accuracy for one in ranked)
    if gold_only is None or gold_only <= best:
        return []
    return [
        "",
        f"Do not rely on this ranking: the study's gold_only run has {gold_only:.1%} on dev, the best linear student "
        f"{best:.1%}. Fine-tuning learns from gold what linear students on frozen features do not. Compare "
        "pool.students=gold_only with pool.fit=true, and smaller KD weights, by real training.",
    ]


def as_plain(one: Ranked, fields: Mapping[str, str]) -> dict[str, object]:
    """A recipe with all its numbers, for JSON."""
    return {
        "recipe": dataclasses.asdict(one.recipe) | {"commands": commands_of(one, fields)},
        "accuracy": one.accuracy,
        "nll": one.nll,
        "difference": None if one.difference is None else dataclasses.asdict(one.difference),
        "nll_difference": None if one.nll_difference is None else dataclasses.asdict(one.nll_difference),
        "accuracy_by_resample": list(one.by_resample),
        "gradient": one.gradient,
        "pool": one.pool,
    }
