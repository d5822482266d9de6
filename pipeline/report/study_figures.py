"""Finished runs -> everything a study found: the figures of all arms on all texts, curves, examples, provenance."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.analysis.figures import text_figures
from pipeline.analysis.label_saving import label_saving
from pipeline.analysis.values import HeldOut, LabelSaving, StudyFigures, TextFigures
from pipeline.core.progress import log
from pipeline.core.types import InputError
from pipeline.report.arms import ArmRuns, best_on_dev, group_arms
from pipeline.report.curves import training_of
from pipeline.report.examples import find_examples
from pipeline.report.predictions import TextPredictions, held_out, mean_nll, read_predictions
from pipeline.report.provenance import cache_figures, diagram_counts, provenance
from pipeline.report.records import gold_sizes, held_out_records
from pipeline.report.runs import StudyRun, check_same_text, read_runs, scores_on


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Study:
    """The runs of a study and what they found."""

    figures: StudyFigures
    arms: tuple[ArmRuns, ...]
    texts: tuple[TextPredictions, ...]
    """The main test text first."""


def read_study(patterns: Sequence[str], *, command: str, name: str | None = None) -> Study:
    """Read run folders, or globs of them, and compute all figures.

    `command`: how the study is run; where it names no study, the one of the runs is added. `name`: of the study; None:
    as the runs have it, else their folder's. InputError where there is no finished run, or where runs cannot be
    compared.
    """
    runs = read_runs(patterns)
    command = of_study(command, runs[0].config.get("study"))
    arms = group_arms(runs, gold_sizes(runs))
    further = further_texts(runs)
    texts = [read_predictions(arms), *(read_predictions(arms, text) for text in further)]
    records = [held_out_records(runs, text.name, text.keys) for text in texts]
    found = [_figures(arms, text, held_out(text, of_text)) for text, of_text in zip(texts, records, strict=True)]
    training = tuple(curves for of_arm in arms if (curves := training_of(of_arm)) is not None)
    cache = cache_figures(arms, training)
    given = runs[0].config.get("study") if name is None else name
    figures = StudyFigures(
        name=given or Path(runs[0].folder).resolve().parent.name,
        main=found[0],
        more=tuple(found[1:]),
        training=training,
        label_saving=gold_curve(arms, texts[0]),
        examples=find_examples(arms, texts[0], records[0]),
        cache=cache,
        counts=diagram_counts(arms, cache),
        provenance=provenance(arms),
        command=command,
    )
    return Study(figures=figures, arms=tuple(arms), texts=tuple(texts))


def of_study(command: str, name: str | None) -> str:
    """The command with its `study=`, so that it can be run as it stands; InputError where a shell could not read it."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise InputError(f"command: expected a command line, found {command!r} ({error}); close its quotes") from error
    if name is None or any(word.startswith("study=") for word in words):
        return command
    return f"{command} study={shlex.quote(name)}"


def further_texts(runs: Sequence[StudyRun]) -> list[str]:
    """The names of further test texts; InputError where one name stands for different texts.

    One on which no arm was scored with all its seeds is left out, with a warning.
    """
    names = list(dict.fromkeys(name for run in runs for name in run.result.get("more", {})))
    complete = []
    for name in names:
        check_same_text(runs, name)
        scored = [run for run in runs if scores_on(run, name) is not None]
        complete_settings = {run.settings for run in scored} - {
            run.settings for run in runs if scores_on(run, name) is None
        }
        if complete_settings:
            complete.append(name)
        else:
            log.warning("%s: no arm was scored on it with all its seeds: left out", name)
    return complete


def _figures(arms: Sequence[ArmRuns], text: TextPredictions, of_text: HeldOut) -> TextFigures:
    """The figures of a text, with the nll of each arm whatever the metric."""
    figures = text_figures(text.arms, of_text, text.metric)
    runs = {of_arm.arm.label: of_arm for of_arm in arms}
    found = tuple(dataclasses.replace(one, nll=mean_nll(runs[one.arm.label], text.tables)) for one in figures.arms)
    return dataclasses.replace(figures, arms=found)


def gold_curve(arms: Sequence[ArmRuns], text: TextPredictions) -> LabelSaving | None:
    """What gold_only with other gold sets shows of the teacher's worth; None without combined or with one size alone.

    Of several settings with the same size the main one counts, else the best on dev.
    """
    predictions = {of_arm.arm.label: of_arm for of_arm in text.arms}
    combined = next((found for found in text.arms if found.arm.role == "combined" and found.arm.is_main), None)
    by_size: dict[int, list[ArmRuns]] = {}
    for of_arm in arms:
        if of_arm.arm.role == "gold_only" and of_arm.arm.num_gold is not None and of_arm.arm.label in predictions:
            by_size.setdefault(of_arm.arm.num_gold, []).append(of_arm)
    if combined is None or combined.arm.num_gold is None or len(by_size) < 2:
        return None
    chosen = []
    for candidates in by_size.values():
        main = [of_arm.runs for of_arm in candidates if of_arm.arm.is_main] or [of_arm.runs for of_arm in candidates]
        best = best_on_dev(main)
        chosen += [predictions[of_arm.arm.label] for of_arm in candidates if of_arm.runs is best]
    return label_saving(chosen, combined, text.metric)
