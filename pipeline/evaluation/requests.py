"""A held-out text as questions: for each record, what is read and which tokens are to be scored."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from pipeline.core.types import InputError, Record
from pipeline.data.records import MalformedRecords, Text, read_records
from pipeline.data.tokenize import segments

Pairs = tuple[tuple[int, int], ...]  # (position, token): what to score


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LikelihoodRequest:
    """One continuation of one record: the tokens read and the (position, token) pairs to score."""

    record_id: int
    choice: int | None
    """None: the record's own targets, for the negative log-likelihood."""
    ids: tuple[int, ...]
    pairs: Pairs


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """A record without choices whose completion the model is to say."""

    record_id: int
    ids: tuple[int, ...]
    """The prompt's tokens."""
    ends: frozenset[int]
    """The tokens at which an answer ends."""
    wanted: str
    """The completion as the tokenizer gives it back, without the spaces around it."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSet:
    """A held-out text, read and tokenized: all that can be wrong with it is found before a model loads."""

    records: tuple[Record, ...]
    items: tuple[LikelihoodRequest, ...]
    questions: tuple[GenerationRequest, ...]
    """Empty where `max_new_tokens` is 0."""
    max_new_tokens: int
    tokenizer: Any


def open_evaluation_set(text: Text, tokenizer: Any, *, longest: int | None, max_new_tokens: int) -> EvaluationSet:
    """Read a held-out text; refuses one that asks nothing, and records longer than the model's positions.

    With `max_new_tokens` above 0 the model is to complete, in so many tokens at most, what has no choices.
    """
    malformed = MalformedRecords(skip=text.skip_malformed)
    records: list[Record] = []
    items: list[LikelihoodRequest] = []
    questions: list[GenerationRequest] = []
    special = frozenset(token for token, added in tokenizer.added_tokens_decoder.items() if added.special)
    for record in read_records(text, tokenizer):
        try:
            asked = [*_own_items(record, text, tokenizer), *_choice_items(record, text, tokenizer)]
            free = _questions(record, text, tokenizer, special) if max_new_tokens > 0 else []
            lengths = [len(item.ids) for item in asked] + [len(question.ids) + max_new_tokens for question in free]
            most = max(lengths, default=0)
            if longest is not None and most > longest:
                raise InputError(f"expected at most {longest} tokens, the model's positions, found {most}")
        except InputError as error:
            malformed.reject(record.where, str(error))
            continue
        records.append(record)
        items += asked
        questions += free
    malformed.log_count(text.what)
    if not items:
        raise InputError(
            f"{text.what}: expected records with targets or choices, found none; there is nothing to score"
        )
    return EvaluationSet(
        records=tuple(records),
        items=tuple(items),
        questions=tuple(questions),
        max_new_tokens=max_new_tokens,
        tokenizer=tokenizer,
    )


def check_generation_requests(exams: Sequence[EvaluationSet]) -> None:
    """Refuse to ask for exact match where nothing can be asked."""
    if any(exam.max_new_tokens > 0 for exam in exams) and not any(exam.questions for exam in exams):
        raise InputError(
            "scoring.max_new_tokens: expected records with a prompt and a completion and without choices, found none; "
            "use scoring.max_new_tokens=0"
        )


def _own_items(record: Record, text: Text, tokenizer: Any) -> Iterator[LikelihoodRequest]:
    if record.completion is None:
        return
    for segment in segments([record], text, tokenizer, MalformedRecords(skip=False), window=1 << 30):
        yield LikelihoodRequest(
            record_id=record.record_id,
            choice=None,
            ids=segment.ids[: segment.targets[-1][0] + 1],
            pairs=segment.targets,
        )


def _choice_items(record: Record, text: Text, tokenizer: Any) -> Iterator[LikelihoodRequest]:
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
        yield LikelihoodRequest(record_id=record.record_id, choice=index, ids=prompt + ids[:-1], pairs=pairs)


def _questions(record: Record, text: Text, tokenizer: Any, special: frozenset[int]) -> list[GenerationRequest]:
    if record.choices or record.prompt is None or record.completion is None:
        return []
    ids = tokenizer(record.prompt, add_special_tokens=not record.templated)["input_ids"]
    wanted = tokenizer(record.completion, add_special_tokens=False)["input_ids"]
    # as a segment has it: a template has written how a turn ends, which need not be the tokenizer's end token
    if text.end_token and not record.templated:
        wanted = [*wanted, tokenizer.eos_token_id]
    if not special & set(wanted):
        raise InputError(
            "expected a completion that ends with a special token, because an answer is said up to there, found none; "
            "set end_token=true (a chat template has to end a turn with one), or use scoring.max_new_tokens=0"
        )
    ends = special & {*wanted, tokenizer.eos_token_id}
    return [
        GenerationRequest(
            record_id=record.record_id, ids=tuple(ids), ends=ends, wanted=decode_answer(tokenizer, wanted)
        )
    ]


def decode_answer(tokenizer: Any, ids: Sequence[int]) -> str:
    """Tokens as text: no special ones, no spaces around it."""
    return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()


def record_key(record: Record) -> bytes:
    """16 bytes over all that a prediction answers to: predictions of two models are joined by it."""
    parts = [record.prompt or "", record.completion or "", *record.choices, str(record.answer)]
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part.encode()).to_bytes(8, "little") + part.encode())
    return digest.digest()
