"""Which runs a study consists of: the options of each, in the order in which they are made."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.config.commands import RunsConfig
from pipeline.config.layers import option_text
from pipeline.config.schema import Control, PoolStudents
from pipeline.config.study import Study, flat
from pipeline.core.types import InputError

SHORT_NAMES = {
    "kd_weight": "loss.kd.weight",
    "lm_weight": "loss.lm.weight",
    "temperature": "loss.kd.temperature",
    "learning_rate": "optimizer.learning_rate",
}
"""Names for the options that are compared most; a grid takes the full name of any other."""
UNSHOWN = ("gold.", "cache", "scoring.teacher_", "loss.kd.adaptive_weight.teacher_", "launcher.", "~more_tests.")
"""Inputs, and how ranks are started: a label does not name them."""
CROSS_FIT, POOLED = "cross_fit", "pooled"
"""The experiments of a pool: its members, one a fold, and the students that learn from it."""
MEMBERS = {PoolStudents.combined: CROSS_FIT, PoolStudents.gold_only: f"{CROSS_FIT}_gold"}
"""The experiment of the members, by what they learn."""
OF_THE_STUDY = ("seed", "runs_dir", "experiment", "name", "role", "study", "cache", "dev", "test", "more_tests")
"""Options that a student may not be given beside the study: its runs would not belong to it."""
UNTRAINED = ("student", "scoring", "trackers", "launcher")
"""Of the options of all students, those that one without training has, too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One run of scripts/train.py."""

    experiment: str
    seed: int
    overrides: tuple[str, ...]
    """Options beside experiment and seed."""

    @property
    def arguments(self) -> list[str]:
        """As on the command line of scripts/train.py."""
        return [f"experiment={self.experiment}", f"seed={self.seed}", *self.overrides]

    @property
    def label(self) -> str:
        """Short, for progress lines: `combined kd_weight=0.3 seed 2`."""
        short = {name: short for short, name in SHORT_NAMES.items()}
        named = [override.partition("=") for override in self.overrides]
        shown = [(name, value) for name, _, value in named if name == "gold.take" or not name.startswith(UNSHOWN)]
        options = " ".join(f"{short.get(name, name)}={value}" for name, value in shown)
        return " ".join(part for part in (self.experiment, options, f"seed {self.seed}") if part)


def teacher_job(study: Study) -> Job:
    """The teacher: trained on its own labels, or scored as it is."""
    return Job(experiment="teacher" if study.trains_teacher else "teacher_as_is", seed=1, overrides=())


def student_jobs(config: RunsConfig, study: Study) -> list[Job]:
    """All runs of the student, those that differ in the seed alone beside each other.

    A ready-made student, and what does not depend on a seed, is scored once. InputError for options that contradict the
    study.
    """
    check_plan(config.seeds, config.overrides)
    own = tuple(config.overrides)
    untrained = tuple(one for one in own if name_of(one).split(".")[0] in UNTRAINED)
    names = experiments(config, study)
    jobs = [Job(experiment=name, seed=config.seeds[0], overrides=untrained) for name in names if name == "zero_shot"]
    if config.few_shot > 0:
        few_shot = (*untrained, f"scoring.few_shot={config.few_shot}")
        jobs.append(Job(experiment="few_shot", seed=config.seeds[0], overrides=few_shot))
    settings = [(name, own) for name in names if name != "zero_shot"]
    of_grid = next((name for name in ("combined", POOLED) if name in names), None)
    if config.grid and of_grid is None:
        raise InputError(f"grid: expected combined among the experiments, whose settings it compares, found {names}")
    settings += [(of_grid or "", own + chosen) for chosen in grid_settings(config.grid)]
    settings += [(control.name, own) for control in config.controls if control is not Control.none]
    settings += [("gold_only", own + chosen) for chosen in label_curve(config, study)]
    unique = list(dict.fromkeys(settings))
    jobs += [Job(experiment=name, seed=seed, overrides=chosen) for name, chosen in unique for seed in config.seeds]
    return jobs


def fold_jobs(config: RunsConfig, study: Study) -> list[Job]:
    """The students of all folds where a pool is asked for: each learns from all folds but its own, with one seed."""
    if POOLED not in experiments(config, study):
        return []
    unscored = tuple(f"~more_tests.{name}" for name in study.file.more_tests)
    folds = [f"leave_out={fold}/{config.folds}" for fold in range(config.folds)]
    name = MEMBERS[config.pool.students]
    return [Job(experiment=name, seed=1, overrides=(*config.overrides, fold, *unscored)) for fold in folds]


def check_plan(seeds: Sequence[int], overrides: Sequence[str]) -> None:
    """Refuse no seed at all, and options of students that belong to the study's file."""
    if not seeds:
        raise InputError("seeds: expected one or more, found none; give them as seeds=1,2,3")
    for one in overrides:
        if name_of(one).split(".")[0].split("@")[-1] in OF_THE_STUDY:
            raise InputError(
                f"{one}: expected an option of training; {name_of(one)} belongs to the study's file (seed: use seeds=)"
            )


def name_of(override: str) -> str:
    """The option of NAME=VALUE."""
    return override.lstrip("+~").partition("=")[0]


def experiments(config: RunsConfig, study: Study) -> list[str]:
    """The experiments of the student that are asked for; by default all that the study has texts for."""
    if config.experiments is not None:
        if members := {*MEMBERS.values()} & {*config.experiments}:
            raise InputError(
                f"experiments: expected students to compare, found {', '.join(sorted(members))}, a member of a pool; "
                f"ask for {POOLED}, which makes one a fold"
            )
        return config.experiments
    return default_experiments(study)


def default_experiments(study: Study) -> list[str]:
    """All experiments of the student that the study has texts for, a pool apart."""
    names = ["zero_shot", "gold_only", "weak_only", "combined"]
    return names + ["ceiling"] * (study.file.ceiling is not None)


def grid_settings(grid: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Every combination of the values: ["kd_weight:0,1", "temperature:1,2"] has four."""
    axes = []
    for axis in grid:
        name, is_axis, values = axis.partition(":")
        if not is_axis or not values:
            raise InputError(f"grid: expected OPTION:VALUE,VALUE,..., found {axis!r}; for example kd_weight:0,0.3,1,3")
        axes.append([f"{SHORT_NAMES.get(name, name)}={value}" for value in values.split(",")])
    return itertools.product(*axes) if axes else iter(())


def label_curve(config: RunsConfig, study: Study) -> Iterator[tuple[str, ...]]:
    """gold_only on so many labels of the ceiling's text, for each size of the curve."""
    if config.label_curve and study.file.ceiling is None:
        raise InputError("label_curve: expected a study with the text `ceiling`, whose labels it takes, found none")
    text: dict[str, Any] = study.content.get("ceiling") or {}
    for size in config.label_curve:
        yield tuple(f"gold.{name}={option_text(value)}" for name, value in flat(text | {"take": size}).items())
