"""Finished runs -> everything a study found: the figures of all arms on all texts, curves, examples, provenance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.analysis.figures import text_figures
from pipeline.analysis.values import HeldOut, StudyFigures, TextFigures
from pipeline.core.progress import log
from pipeline.report.arms import ArmRuns, group_arms
from pipeline.report.curves import training_of
from pipeline.report.examples import find_examples
from pipeline.report.predictions import TextPredictions, held_out, read_predictions
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


def read_study(patterns: Sequence[str], *, name: str | None = None, command: str | None = None) -> Study:
    """Read run folders, or globs of them, and compute all figures.

    `name`: of the study; None: as the runs have it, else their folder's. `command`: how the study is run; None: by
    that name. InputError where there is no finished run, or where runs cannot be compared.
    """
    runs = read_runs(patterns)
    arms = group_arms(runs, gold_sizes(runs))
    further = further_texts(runs)
    texts = [read_predictions(arms), *(read_predictions(arms, text) for text in further)]
    records = held_out_records(runs)
    found = [_figures(texts[0], held_out(texts[0], records))]
    for text in texts[1:]:
        found.append(_figures(text, held_out(text, held_out_records(runs, text.name))))
    training = tuple(curves for of_arm in arms if (curves := training_of(of_arm)) is not None)
    cache = cache_figures(arms, training)
    given = runs[0].config.get("study") if name is None else name
    figures = StudyFigures(
        name=given or Path(runs[0].folder).resolve().parent.name,
        main=found[0],
        more=tuple(found[1:]),
        training=training,
        label_saving=None,
        examples=find_examples(arms, texts[0], records),
        cache=cache,
        counts=diagram_counts(arms, cache),
        provenance=provenance(arms),
        command=command or "python scripts/study.py" + (f" study={given}" if given else ""),
    )
    return Study(figures=figures, arms=tuple(arms), texts=tuple(texts))


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


def _figures(text: TextPredictions, of_text: HeldOut) -> TextFigures:
    return text_figures(text.arms, of_text, text.metric)
