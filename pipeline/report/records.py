"""The texts behind the scores, read again: the records of a test text, and how many records a gold set has.

A run folder holds no text. Where the files are gone or have changed, what needs them is left out, with a warning.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Sequence
from typing import Any

from pipeline.config.options import load_config
from pipeline.config.schema import TrainConfig
from pipeline.core.files import RunPaths
from pipeline.core.progress import log
from pipeline.core.types import InputError, Record
from pipeline.data.record_counts import count_records
from pipeline.data.records import MalformedRecords, find_shape, parse_records
from pipeline.data.text_files import all_records, open_text
from pipeline.data.tokenize import text_hash
from pipeline.evaluation.requests import record_key
from pipeline.models.tokenizer import open_tokenizer
from pipeline.report.runs import StudyRun, scores_on


class TokenizerOnDemand:
    """The tokenizer of a run, loaded when something of it is asked for: only the records of chats need one."""

    def __init__(self, config: TrainConfig, paths: RunPaths) -> None:
        self._config, self._paths = config, paths

    @functools.cached_property
    def _tokenizer(self) -> Any:
        student, model = self._config.student, self._paths.model
        if model.is_dir():
            student = dataclasses.replace(student, path=str(model), revision=None)
        return open_tokenizer(student)[1]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def held_out_records(runs: Sequence[StudyRun], test: str, keys: Collection[bytes]) -> dict[bytes, Record]:
    """The records of a test text by `record_key`; `keys`: of all that were scored.

    Empty, with a warning, where no run leads to them any more: a record that has changed has another key.
    """
    tried = set[str]()
    for run in runs:
        files = str(_plain_text(run, test))
        if scores_on(run, test) is None or files in tried:
            continue
        tried.add(files)
        try:
            found = _read(run, test)
            num_missing = len(set(keys) - found.keys())
            if not num_missing:
                return found
            error = f"expected the records that were scored, found {num_missing} of {len(set(keys))} missing or changed"
        except (InputError, OSError) as problem:
            error = str(problem)
        log.warning("%s: its records cannot be read again, so there are no classes and examples: %s", test, error)
    return {}


def _plain_text(run: StudyRun, test: str) -> Any:
    return run.config.get("test") if test == "test" else (run.config.get("more_tests") or {}).get(test)


def _read(run: StudyRun, test: str) -> dict[bytes, Record]:
    config = load_config(run.paths.config, TrainConfig)
    text_config = config.test if test == "test" else config.more_tests.get(test)
    if text_config is None:
        raise InputError(f"{run.folder}: expected a text called {test} in {run.paths.config.name}, found none")
    text = find_shape(open_text(text_config, test))
    raw = all_records(text.files, text.read_columns, take=text.take)
    records = parse_records(raw, text, TokenizerOnDemand(config, run.paths), MalformedRecords(skip=True))
    return {record_key(record): record for record in records}


def gold_sizes(runs: Sequence[StudyRun]) -> dict[str, int]:
    """Number of records of each gold set, by its hash; without those whose files are gone or have changed."""
    sizes: dict[str, int] = {}
    for run in runs:
        key = run.inputs.get("gold")
        if key is None or key in sizes:
            continue
        size = _gold_size(run)
        if size is not None:
            sizes[key] = size
    return sizes


def _gold_size(run: StudyRun) -> int | None:
    try:
        gold = load_config(run.paths.config, TrainConfig).gold
        if gold is None or text_hash(text := open_text(gold, "gold")) != run.identity["gold"]:
            return None
        is_exact, count = count_records(text)
    except (InputError, OSError):
        return None
    if not is_exact and gold.take is None:
        log.info("gold: about %.0f records, estimated from the beginning of its files", count)
    return round(count) if gold.take is None else min(round(count), gold.take)
