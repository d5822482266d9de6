"""Texts that the driver has read, checked and tokenized once, left in the run folder for its ranks."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from pipeline.cache.sequence_files import open_sequence_file, write_sequence_file
from pipeline.core.files import RunPaths, write_json
from pipeline.core.types import TokenSequence
from pipeline.evaluation.requests import EvaluationSet, load_evaluation_set, save_evaluation_set
from pipeline.training.held_out import ScoreKey

KEYS = ".keys.json"  # a name that no text can have


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RunInputs:
    """The texts of a run as tokens; what a run does not use is empty."""

    gold: list[TokenSequence]
    held_out: dict[str, EvaluationSet]
    """By name: dev, test, and those of more_tests."""
    keys: dict[str, ScoreKey]
    """What the scores on each of them belong to."""


def save_inputs(paths: RunPaths, inputs: RunInputs) -> None:
    """Write them; given again, they are written again."""
    paths.inputs.mkdir(exist_ok=True)
    if inputs.gold:
        write_sequence_file(paths.inputs / "gold.parquet", inputs.gold)
    for name, held_out in inputs.held_out.items():
        save_evaluation_set(held_out, paths.inputs / f"{name}.json")
    write_json(paths.inputs / KEYS, {name: dataclasses.asdict(key) for name, key in inputs.keys.items()})


def load_keys(paths: RunPaths) -> dict[str, ScoreKey]:
    """What the scores on each held-out text belong to."""
    return {name: ScoreKey(**key) for name, key in json.loads((paths.inputs / KEYS).read_text()).items()}


def load_gold(paths: RunPaths) -> list[TokenSequence]:
    """The gold set, packed."""
    return list(open_sequence_file(paths.inputs / "gold.parquet"))


def load_held_out(paths: RunPaths, name: str, tokenizer: Any) -> EvaluationSet:
    """A held-out text as requests."""
    return load_evaluation_set(paths.inputs / f"{name}.json", tokenizer)
