"""What the driver has read and checked once, left in the run folder for its ranks: texts as tokens, learnt trust."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.cache.sequence_files import MappedSequences, write_mapped_sequences
from pipeline.core.files import RunPaths, write_json
from pipeline.core.types import InputError
from pipeline.data.text_files import Text
from pipeline.data.tokenize import labeled_sequences
from pipeline.evaluation.requests import EvaluationSet, load_evaluation_set, save_evaluation_set
from pipeline.objective.trust import TrustScore
from pipeline.objective.trust_fit import TrustFit
from pipeline.training.held_out import ScoreKey

KEYS = ".keys.json"  # a name that no text can have
GOLD = "gold.arrow"


@dataclass(frozen=True, kw_only=True, eq=False)
class GoldText:
    """The gold set. It is tokenized when it is needed, which it is not by a finished run, and not held in memory."""

    text: Text
    tokenizer: Any
    window: int

    @functools.cached_property
    def _tokenized(self) -> tempfile.TemporaryDirectory[str]:
        folder = tempfile.TemporaryDirectory(prefix="gold-")
        sequences = labeled_sequences(self.text, self.tokenizer, window=self.window)
        try:
            write_mapped_sequences(Path(folder.name) / GOLD, sequences)
        except OSError as error:
            raise InputError(
                f"gold: expected to write the tokenized text into {folder.name}, found {error.strerror or error}; make "
                "room, or name another folder for temporary files in the environment (TMPDIR)"
            ) from error
        return folder

    def check(self) -> None:
        """Tokenize it into a temporary file; InputError for a record that cannot be used, or where there is none."""
        assert self._tokenized

    def save(self, folder: Path) -> None:
        """Leave it in a folder, for `load_gold`."""
        unfinished = folder / f".{GOLD}.tmp"
        shutil.move(Path(self._tokenized.name) / GOLD, unfinished)
        unfinished.replace(folder / GOLD)
        del self.__dict__["_tokenized"]  # the file is gone; whoever needs another one tokenizes again


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RunInputs:
    """The inputs of a run; what a run does not use is empty."""

    gold: GoldText | None
    held_out: dict[str, EvaluationSet]
    """By name: dev, test, and those of more_tests."""
    keys: dict[str, ScoreKey]
    """What the scores on each of them belong to."""
    trust: TrustFit | None = None
    """Learnt on gold; None also where it stands in the run folder already."""


def save_inputs(paths: RunPaths, inputs: RunInputs) -> None:
    """Write them; given again, they are written again."""
    paths.inputs.mkdir(exist_ok=True)
    if inputs.gold is not None:
        inputs.gold.save(paths.inputs)
    for name, held_out in inputs.held_out.items():
        save_evaluation_set(held_out, paths.inputs / f"{name}.json")
    if inputs.trust is not None:
        write_json(paths.trust, dataclasses.asdict(inputs.trust))
    write_json(paths.inputs / KEYS, {name: dataclasses.asdict(key) for name, key in inputs.keys.items()})


def load_keys(paths: RunPaths) -> dict[str, ScoreKey]:
    """What the scores on each held-out text belong to."""
    return {name: ScoreKey(**key) for name, key in json.loads((paths.inputs / KEYS).read_text()).items()}


def load_gold(paths: RunPaths) -> MappedSequences:
    """The gold set, packed; it stays on the disk."""
    return MappedSequences(paths.inputs / GOLD)


def load_trust(paths: RunPaths) -> TrustScore:
    """The learnt score."""
    found: dict[str, Any] = json.loads(paths.trust.read_text())["score"]
    columns = {name: tuple(value) for name, value in found.items() if name != "bias"}
    return TrustScore(**columns, bias=found["bias"])


def load_held_out(paths: RunPaths, name: str, tokenizer: Any) -> EvaluationSet:
    """A held-out text as requests."""
    return load_evaluation_set(paths.inputs / f"{name}.json", tokenizer)
