"""Texts that the driver has read, checked and tokenized once, left in the run folder for its ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.cache.sequence_files import open_sequence_file, write_sequence_file
from pipeline.core.files import RunPaths
from pipeline.core.types import TokenSequence
from pipeline.evaluation.requests import EvaluationSet, load_evaluation_set, save_evaluation_set


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RunInputs:
    """The texts of a run as tokens; what a run does not use is empty."""

    gold: list[TokenSequence]
    held_out: dict[str, EvaluationSet]
    """By name: dev, test."""


def save_inputs(paths: RunPaths, inputs: RunInputs) -> None:
    """Write them; given again, they are written again."""
    paths.inputs.mkdir(exist_ok=True)
    if inputs.gold:
        write_sequence_file(paths.inputs / "gold.parquet", inputs.gold)
    for name, held_out in inputs.held_out.items():
        save_evaluation_set(held_out, paths.inputs / f"{name}.json")


def load_gold(paths: RunPaths) -> list[TokenSequence]:
    """The gold set, packed."""
    return list(open_sequence_file(paths.inputs / "gold.parquet"))


def load_held_out(paths: RunPaths, name: str, tokenizer: Any) -> EvaluationSet:
    """dev or test."""
    return load_evaluation_set(paths.inputs / f"{name}.json", tokenizer)
