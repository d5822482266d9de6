"""A held-out text as questions: for each record, what is read and which tokens are to be scored."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator
from typing import Any

from pipeline.corpus import segments
from pipeline.text import Rejections, Text, read_records
from pipeline.types import InputError, Record

Pairs = tuple[tuple[int, int], ...]  # (position, token): what to score


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One continuation of one record: the tokens read and the (position, token) pairs to score."""

    record_id: int
    choice: int | None
    """None: the record's own targets, for the negative log-likelihood."""
    ids: tuple[int, ...]
    pairs: Pairs


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Exam:
    """A held-out text, read and tokenized: all that can be wrong with it is found before a model loads."""

    records: tuple[Record, ...]
    items: tuple[Item, ...]


def open_exam(text: Text, tokenizer: Any, *, longest: int | None) -> Exam:
    """Read a held-out text; refuses one that asks nothing, and records longer than the model's positions."""
    rejections = Rejections(skip=text.skip_malformed)
    records: list[Record] = []
    items: list[Item] = []
    for record in read_records(text, tokenizer):
        try:
            asked = [*_own_items(record, text, tokenizer), *_choice_items(record, text, tokenizer)]
            most = max((len(item.ids) for item in asked), default=0)
            if longest is not None and most > longest:
                raise InputError(f"expected at most {longest} tokens, the model's positions, found {most}")
        except InputError as error:
            rejections.reject(record.where, str(error))
            continue
        records.append(record)
        items += asked
    rejections.tell(text.what)
    if not items:
        raise InputError(
            f"{text.what}: expected records with targets or choices, found none; there is nothing to score"
        )
    return Exam(records=tuple(records), items=tuple(items))


def _own_items(record: Record, text: Text, tokenizer: Any) -> Iterator[Item]:
    if record.completion is None:
        return
    for segment in segments([record], text, tokenizer, Rejections(skip=False), window=1 << 30):
        yield Item(
            record_id=record.record_id,
            choice=None,
            ids=segment.ids[: segment.targets[-1][0] + 1],
            pairs=segment.targets,
        )


def _choice_items(record: Record, text: Text, tokenizer: Any) -> Iterator[Item]:
    if not record.choices:
        return
    if record.prompt is None:
        raise InputError("expected a prompt beside the choices, found plain text")
    prompt = tuple(tokenizer(record.prompt, add_special_tokens=not record.templated)["input_ids"])
    end = [tokenizer.eos_token_id] if text.end_token else []
    choices = [tuple(tokenizer(c, add_special_tokens=False)["input_ids"] + end) for c in record.choices]
    for one, other in itertools.permutations(choices, 2):
        if other[: len(one)] == one:  # the shorter could never lose
            raise InputError("expected choices of which none begins another, found such; set end_token=true")
    for index, ids in enumerate(choices):
        pairs = tuple((len(prompt) - 1 + j, token) for j, token in enumerate(ids))
        yield Item(record_id=record.record_id, choice=index, ids=prompt + ids[:-1], pairs=pairs)


def record_key(record: Record) -> bytes:
    """16 bytes over all that a prediction answers to: predictions of two models are joined by it."""
    parts = [record.prompt or "", record.completion or "", *record.choices, str(record.answer)]
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part.encode()).to_bytes(8, "little") + part.encode())
    return digest.digest()
