"""Few-shot scoring: answered records before each question (Brown et al. 2020, arXiv 2005.14165, section 2)."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from pipeline.config.schema import ScoringConfig, TextConfig
from pipeline.core.files import content_hash
from pipeline.core.types import InputError, Record
from pipeline.data.records import MalformedRecords, find_shape, parse_records
from pipeline.data.text_files import all_records, open_text


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """The examples that precede each question."""

    records: tuple[Record, ...]
    text: str
    """Each prompt with its completion, and a blank line after each."""

    @property
    def sha256(self) -> str:
        """Hash of their text."""
        return content_hash(self.text)


def open_examples(scoring: ScoringConfig, gold: TextConfig | None, tokenizer: Any) -> Examples | None:
    """From options to a value: the first usable records of `few_shot_from`, else of gold.

    None without few-shot. InputError where there are too few, or where one is not a plain prompt with a completion.
    """
    if scoring.few_shot == 0:
        return None
    config = scoring.few_shot_from or gold
    if config is None:
        raise InputError(
            f"scoring.few_shot={scoring.few_shot}: expected a text to take examples from, found none; give "
            "scoring.few_shot_from, or in a training run gold"
        )
    text = find_shape(open_text(config, "scoring.few_shot_from" if scoring.few_shot_from else "gold"))
    raw = all_records(text.files, text.read_columns, take=text.take)
    usable = parse_records(raw, text, tokenizer, MalformedRecords(skip=text.skip_malformed))
    records = list(itertools.islice(usable, scoring.few_shot))
    if len(records) < scoring.few_shot:
        raise InputError(
            f"scoring.few_shot: expected at most {len(records)}, the usable records of {text.what}, found "
            f"{scoring.few_shot}; give fewer examples or a longer text"
        )
    for record in records:
        _check(record, is_example=True)
    return Examples(records=tuple(records), text="".join(map(_example, records)))


def _example(record: Record) -> str:
    return f"{record.prompt}{record.completion}".rstrip("\n") + "\n\n"


def with_examples(records: Iterable[Record], examples: Examples) -> Iterator[Record]:
    """Records with the examples before each prompt with choices; the others stay as they are.

    InputError for a chat, whose template would have to write the examples as turns.
    """
    for record in records:
        if record.choices and record.prompt is not None:
            _check(record, is_example=False)
            yield dataclasses.replace(record, prompt=examples.text + record.prompt)
        else:
            yield record


def _check(record: Record, *, is_example: bool) -> None:
    if record.templated:
        raise InputError(
            f"{record.where}: expected prompts of plain text, because examples are not yet written as turns of a chat, "
            "found a chat; use scoring.few_shot=0, or give prompts"
        )
    if is_example and (record.prompt is None or record.completion is None):
        raise InputError(f"{record.where}: expected a prompt with its completion as an example, found one without")
