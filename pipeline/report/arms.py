"""Runs -> arms: all seeds of one setting together, and which arm of a role conclusions rest on.

Nothing here looks at a test score: where one of several settings has to be chosen, dev decides.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from pipeline.analysis.values import Arm
from pipeline.core.progress import log
from pipeline.core.types import InputError
from pipeline.report.pools import settings_of
from pipeline.report.runs import OTHER, StudyRun

ROLE_ORDER = ("teacher", "zero_shot", "gold_only", "weak_only", "combined", "ceiling", "control", OTHER)
"""As one reads them."""
ONE_SETTING = ("teacher",)
"""The role that defines the weak score: with several settings there is no telling which one."""
SHORT = {
    "loss.kd.weight": "kd",
    "loss.lm.weight": "lm",
    "loss.hard.weight": "hard",
    "loss.confidence.weight": "confidence",
    "loss.kd.temperature": "T",
    "loss.kd.control": "control",
    "optimizer.learning_rate": "lr",
    "gold_fraction": "gold fraction",
    "scoring.few_shot": "few shot",
}
"""Options by the words of a table; others by the last part of their name."""

HOW = {
    **dict.fromkeys(
        ("combined", "weak_only"), "the best on dev, pools apart; without dev scores the one with most seeds"
    ),
    "gold_only": "the gold set of combined, then the best on dev",
    "zero_shot": "combined's student before training, without examples",
    "control": "the shuffled teacher, with the settings nearest to combined's",
    "ceiling": "the settings nearest to combined's, then the best on dev",
}
"""How the main arm of a role is chosen among several."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ArmRuns:
    """An arm and its runs, one a seed, in ascending order of the seeds."""

    arm: Arm
    runs: tuple[StudyRun, ...]


def group_arms(runs: Sequence[StudyRun], gold_sizes: Mapping[str, int]) -> list[ArmRuns]:
    """The arms of a study, by role, then by what differs; `gold_sizes`: records of each gold set by its hash.

    InputError where a role that defines the gap has several settings.
    """
    by_role: dict[str, dict[str, list[StudyRun]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        by_role[run.role][run.settings].append(run)
    unique = {
        role: sorted((_one_a_seed(of_setting) for of_setting in by_role[role].values()), key=_order)
        for role in ROLE_ORDER
        if role in by_role
    }
    for role in ONE_SETTING:
        check_one_setting(role, unique.get(role, []))
    mains = main_settings(unique, gold_sizes)
    arms = []
    for role, settings in unique.items():
        names = _labels(role, settings, gold_sizes)
        for of_setting, (label, differing) in zip(settings, names, strict=True):
            is_main = mains.get(role) == of_setting[0].settings
            arm = make_arm(of_setting, label, differing, gold_sizes, is_main=is_main)
            arms.append(ArmRuns(arm=arm, runs=tuple(of_setting)))
            if is_main and len(settings) > 1:
                log.info("%s: conclusions rest on %s, one of %d settings: %s", role, label, len(settings), HOW[role])
    return arms


def make_arm(
    runs: Sequence[StudyRun], label: str, differing: Mapping[str, Any], gold_sizes: Mapping[str, int], *, is_main: bool
) -> Arm:
    """The value that describes the runs of one setting; a weight that nothing reads is 0."""
    first = runs[0]
    return Arm(
        role=first.role,
        label=label,
        name=name_of(first),
        seeds=tuple(run.seed for run in runs),
        lm_weight=first.options.get("loss.lm.weight", 0.0),
        kd_weight=first.options.get("loss.kd.weight", 0.0),
        gold_fraction=first.options.get("gold_fraction", 0.0) if first.reads_gold else 0.0,
        num_gold=gold_sizes.get(first.inputs.get("gold", "")),
        control=first.options.get("loss.kd.control", "none"),
        differing=differing,
        is_main=is_main,
        is_pool=first.pool is not None,
    )


def _one_a_seed(runs: Sequence[StudyRun]) -> list[StudyRun]:
    """The runs of a setting by seed; of several with the same seed the first, because their results are the same."""
    found: dict[int, StudyRun] = {}
    for run in runs:
        if run.seed in found:
            log.info("%s is equivalent to %s: they count as one", run.folder.name, found[run.seed].folder.name)
        found.setdefault(run.seed, run)
    return [found[seed] for seed in sorted(found)]


def check_one_setting(role: str, settings: Sequence[Sequence[StudyRun]]) -> None:
    """InputError where several settings of a role would have to be mixed or chosen from."""
    if len(settings) > 1:
        shown = "; ".join(", ".join(str(run.folder) for run in runs) for runs in settings)
        raise InputError(
            f"runs: expected one setting of {role} to measure the gap by, found {len(settings)}: {shown}; name the "
            "right ones in runs="
        )


# --------------------------------------------------------------------------------------- main arms


def main_settings(unique: Mapping[str, Sequence[Sequence[StudyRun]]], gold_sizes: Mapping[str, int]) -> dict[str, str]:
    """For each role the settings that conclusions rest on.

    combined: the best mean score on dev; without dev the most seeds, then the first; a pool only where nothing reads
    the teacher's own capture, because conclusions and controls are about the teacher. The floor has combined's gold
    set, the untrained student is the student before training, without examples, and control and ceiling differ least
    from combined. Among those that are left, dev decides as for combined.
    """
    chosen: dict[str, Sequence[StudyRun]] = {}
    for role in ("combined", *(role for role in ROLE_ORDER if role not in ("combined", OTHER))):
        settings = list(unique.get(role, []))
        if not settings:
            continue
        reference = chosen["combined"][0] if "combined" in chosen else None
        fitting = _fitting(role, settings, reference, gold_sizes)
        chosen[role] = best_on_dev(fitting)
    return {role: runs[0].settings for role, runs in chosen.items()}


def _fitting(
    role: str, settings: Sequence[Sequence[StudyRun]], combined: StudyRun | None, gold_sizes: Mapping[str, int]
) -> list[Sequence[StudyRun]]:
    """The settings of a role that belong to the main arm of combined; all where none of them does."""
    keys = {
        **dict.fromkeys(("combined", "weak_only"), lambda run: run.pool is not None),
        "gold_only": lambda run: _gold_mismatch(run, combined, gold_sizes),
        "zero_shot": lambda run: (
            run.options.get("scoring.few_shot", 0),
            combined is not None and run.inputs["student"] != combined.inputs["student"],
        ),
        "control": lambda run: (run.options.get("loss.kd.control") != "shuffled", _num_differing(run, combined)),
        "ceiling": lambda run: _num_differing(run, combined),
    }
    if role not in keys:
        return list(settings)
    measure = keys[role]
    least = min(measure(runs[0]) for runs in settings)  # type: ignore[type-var]
    return [runs for runs in settings if measure(runs[0]) == least]


def _gold_mismatch(run: StudyRun, combined: StudyRun | None, gold_sizes: Mapping[str, int]) -> float:
    """0 for the gold set of combined, 1 for another; without a combined arm the largest gold set comes first."""
    if combined is None:
        return -gold_sizes.get(run.inputs.get("gold", ""), 0)
    names = ("gold", "gold_cache")
    return float([run.inputs.get(name) for name in names] != [combined.inputs.get(name) for name in names])


def _num_differing(run: StudyRun, combined: StudyRun | None) -> int:
    return 0 if combined is None else sum(value != combined.options.get(name) for name, value in run.options.items())


def best_on_dev(settings: Sequence[Sequence[StudyRun]]) -> Sequence[StudyRun]:
    """The setting with the highest mean score on dev; without dev scores the most seeds, then the first."""
    scores = [dev_score(runs) for runs in settings]
    if all(score is not None for score in scores):
        return max(zip(settings, scores, strict=True), key=lambda pair: (pair[1], len(pair[0])))[0]
    return max(settings, key=len)


def dev_score(runs: Sequence[StudyRun]) -> float | None:
    """Mean over seeds of the score on dev: accuracy, else exact match, else minus the nll; None where one lacks it."""
    found = []
    for run in runs:
        dev = run.result.get("dev") or {}
        scores = (dev.get("accuracy"), dev.get("exact_match"), None if dev.get("nll") is None else -dev["nll"])
        found.append(next((score for score in scores if score is not None), None))
    scored = [score for score in found if score is not None]
    return fmean(scored) if scored and len(scored) == len(found) else None


# ------------------------------------------------------------------------------------------- labels


def _order(runs: Sequence[StudyRun]) -> tuple[Any, ...]:
    options = runs[0].options
    weights = tuple(options.get(name, 0.0) for name in ("loss.kd.weight", "loss.lm.weight", "optimizer.learning_rate"))
    return (runs[0].name, *weights, str(runs[0].folder))


def _labels(
    role: str, settings: Sequence[Sequence[StudyRun]], gold_sizes: Mapping[str, int]
) -> list[tuple[str, dict[str, Any]]]:
    """For each setting of a role a unique label, and the options (or inputs) in which the settings differ."""
    firsts = [runs[0] for runs in settings]
    described = [dict(run.options) | _named_inputs(run, gold_sizes) for run in firsts]
    # the labels of controls begin with the kind of control
    varying = [name for name in varying_names(described) if (role, name) != ("control", "loss.kd.control")]
    if are_apart(described, varying, without="pool.members"):  # a hash is of no use to a reader
        varying.remove("pool.members")
    has_names = role == OTHER or len({run.name for run in firsts}) > 1 or any(run.pool for run in firsts)
    found = []
    for run, options in zip(firsts, described, strict=True):
        differing = {name: options[name] for name in varying if name in options}
        parts = [run.options["loss.kd.control"] if role == "control" else name_of(run) if has_names else role]
        parts += [f"{short_name(name, varying)} {shown(value)}" for name, value in differing.items()]
        found.append((" ".join(parts), differing))
    names = [label for label, _ in found]
    return [
        (label if names.count(label) == 1 else f"{label} {run.settings[:6]}", differing)
        for run, (label, differing) in zip(firsts, found, strict=True)
    ]


def are_apart(described: Sequence[Mapping[str, Any]], varying: Sequence[str], *, without: str) -> bool:
    """Whether a name varies, and the settings differ in what else varies, too."""
    rest = [name for name in varying if name != without]
    values = {repr([options.get(name) for name in rest]) for options in described}
    return without in varying and len(values) == len(described)


def varying_names(described: Sequence[Mapping[str, Any]]) -> list[str]:
    """The options (or inputs) that have several values, sorted.

    One that not all settings read is no difference by itself: what switches it off is.
    """
    values: dict[str, set[str]] = defaultdict(set)
    for options in described:
        for name, value in options.items():
            values[name].add(repr(value))
    return sorted(name for name, found in values.items() if len(found) > 1)


def name_of(run: StudyRun) -> str:
    """The experiment's name, with a word on the pool where the name is that of a role."""
    return f"{run.name} pooled" if run.pool is not None and run.name in ROLE_ORDER else run.name


def _named_inputs(run: StudyRun, gold_sizes: Mapping[str, int]) -> dict[str, Any]:
    """Inputs as something to tell arms apart by: a gold set by its number of records, a pool by its settings, others by
    their hash."""
    named: dict[str, Any] = {name: value[:8] for name, value in run.inputs.items()}
    if run.pool is not None:
        del named["cache"]
        named |= settings_of(run.pool)
    if run.inputs.get("gold") in gold_sizes:
        named["gold"] = gold_sizes[run.inputs["gold"]]
    return named


def short_name(name: str, others: Sequence[str]) -> str:
    """An option by a few words, its full name where another one ends alike."""
    if name in SHORT:
        return SHORT[name]
    last = name.rsplit(".", 1)[-1]
    return name if sum(other.rsplit(".", 1)[-1] == last for other in others) > 1 else last.replace("_", " ")


def shown(value: Any) -> str:
    """An option's value in a table."""
    if isinstance(value, float):
        return f"{value:g}"
    return "-" if value is None else str(value)
