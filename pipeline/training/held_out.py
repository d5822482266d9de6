"""The held-out texts of a run, and what its scores on each belong to: they are made where they are missing."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.schema import TextConfig, TrainConfig
from pipeline.core.files import content_hash, one_path
from pipeline.evaluation.predictions import teacher_choices
from pipeline.evaluation.requests import EvaluationSet, held_out_hash

SPLITS = ("dev", "test")
"""The held-out texts with options of their own; the others are those of more_tests."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreKey:
    """What the scores on a text belong to besides the model; it stands beside them in result.json."""

    text: str
    """`held_out_hash` of the text."""
    max_new_tokens: int
    """See `scoring.max_new_tokens`."""
    teacher_predictions: str | None
    """sha256 of the teacher's best choices on the text; None where there are no predictions of a teacher."""
    out_of_domain: bool


def held_out_texts(config: TrainConfig) -> dict[str, TextConfig]:
    """The held-out texts of a run by name: dev, test, and those of more_tests."""
    splits = {name: text for name, text in (("dev", config.dev), ("test", config.test)) if text is not None}
    return splits | config.more_tests


def teacher_file(config: TrainConfig, name: str) -> str | None:
    """The teacher's predictions on a text, for agreement with it: those on test are an option.

    Those on one of more_tests lie in the same folder, if it has them. None for dev.
    """
    of_test = config.scoring.teacher_predictions
    if of_test is None or name == "dev":
        return None
    if name == "test":
        return of_test
    path = one_path(of_test, "scoring.teacher_predictions").with_name(f"predictions-{name}.parquet")
    return str(path) if path.exists() else None


def score_keys(config: TrainConfig, held_out: Mapping[str, EvaluationSet]) -> dict[str, ScoreKey]:
    """The key of the scores on each text; InputError where the teacher's predictions do not fit one."""
    keys = {}
    for name, text in held_out_texts(config).items():
        teacher = teacher_file(config, name)
        keys[name] = ScoreKey(
            text=held_out_hash(text, name),
            max_new_tokens=config.scoring.max_new_tokens,
            teacher_predictions=None if teacher is None else _choices_hash(held_out[name], teacher),
            out_of_domain=name in config.out_of_domain,
        )
    return keys


def _choices_hash(held_out: EvaluationSet, teacher: str) -> str:
    found = teacher_choices(held_out, teacher)
    return content_hash([best if len(best) > 1 else next(iter(best), None) for best in found])


# ------------------------------------------------------------------------------------ in result.json


def entry_of(result: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """The scores on a text in result.json, with their key; None where they are missing."""
    entry: dict[str, Any] | None = (result if name in SPLITS else result.get("more", {})).get(name)
    return entry


def with_entry(result: Mapping[str, Any], name: str, entry: Mapping[str, Any] | None) -> dict[str, Any]:
    """result.json with other scores on a text, or without any."""
    changed = dict(result if name in SPLITS else result.get("more", {}))
    changed.pop(name, None)
    if entry is not None:
        changed[name] = entry
    return changed if name in SPLITS else {**result, "more": changed}


def needs_model(entry: Mapping[str, Any] | None, key: ScoreKey, predictions: Path) -> bool:
    """Whether the model has to be run: there are no predictions, or those of another text or scored otherwise."""
    if entry is None or not predictions.exists():
        return True
    return (entry.get("text"), entry.get("max_new_tokens")) != (key.text, key.max_new_tokens)


def is_missing(entry: Mapping[str, Any] | None, key: ScoreKey, predictions: Path) -> bool:
    """Whether scores have to be made, or the agreement with another teacher."""
    if entry is None or needs_model(entry, key, predictions):
        return True
    wanted = dataclasses.asdict(key)
    if key.teacher_predictions is None:  # the agreement with an earlier one may stay
        del wanted["teacher_predictions"]
    return any(entry.get(name) != value for name, value in wanted.items())
