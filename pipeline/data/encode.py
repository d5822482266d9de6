"""Records -> token ids: the parts of a record in one sequence of tokens, with one beginning and one end."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.core.types import InputError, Record
from pipeline.data.records import MalformedRecords
from pipeline.data.text_ids import Encoder, continuation, join_parts, open_encoder

RECORDS_PER_CALL, CHARACTERS_PER_CALL = 1024, 4 << 20  # handed to the tokenizer at once: bounds the memory

# what is done with a record, for the log; a corpus with such records has a fingerprint of its own
JOINED = "a completion or turn tokenized to continue its prompt"
OWN_BEGINNING = "a beginning token of their own"
OTHER_END = "special tokens that the tokenizer puts after a text, left out"


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedRecord:
    """A record as token ids."""

    record: Record
    prompt_ids: list[int]
    """Empty for plain text."""
    completion_ids: list[int] | None
    """With the end token where the text asks for one; None where the record has no completion."""
    choice_ids: list[list[int]]
    """Of each choice, with the same end as a completion."""
    prompt_spans: tuple[tuple[int, int], ...] = ()
    """The tokens of supervised turns in the prompt, as (start, end)."""


def encode_records(
    records: Iterable[Record],
    tokenizer: Any,
    malformed: MalformedRecords,
    *,
    end_token: bool,
    with_choices: bool = False,
) -> Iterator[EncodedRecord]:
    """Tokenize records in batches: prompts, completions and, if asked, choices by the same rules.

    The tokenizer's beginning token comes before a record once, unless the text itself or a chat template has written
    it. A completion of a chat ends as its template ends a turn, any other with the end token. Records that the
    tokenizer cannot write go to `malformed`.
    """
    encoder = open_encoder(tokenizer)
    end = [tokenizer.eos_token_id] if end_token else []
    for batch in _batches(records):
        parts = [_parts(record, with_choices=with_choices) for record in batch]
        ids = iter(encoder.ids([text for texts in parts for text in texts]))
        for record, texts in zip(batch, parts, strict=True):
            alone = [next(ids) for _ in texts]
            try:
                yield _encoded(record, texts, alone, encoder, malformed, end=[] if record.templated else end)
            except InputError as error:
                malformed.reject(record.where, str(error))


def _batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Records to be tokenized at once: bounded in number and in characters, whatever their length."""
    batch: list[Record] = []
    num_characters = 0
    for record in records:
        batch.append(record)
        num_characters += len(record.prompt or "") + len(record.completion or "") + sum(map(len, record.choices))
        if len(batch) >= RECORDS_PER_CALL or num_characters >= CHARACTERS_PER_CALL:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


def _parts(record: Record, *, with_choices: bool) -> list[str]:
    """The texts of a record that are tokenized apart: the prompt, cut at its supervised turns, completion, choices."""
    texts = []
    if record.prompt is not None:
        cuts = [0, *(place for span in record.prompt_spans for place in span), len(record.prompt)]
        texts += [record.prompt[start:stop] for start, stop in itertools.pairwise(cuts)]
    if record.completion is not None:
        texts.append(record.completion)
    return [*texts, *(record.choice_turns or record.choices)] if with_choices else texts


def _encoded(
    record: Record,
    texts: Sequence[str],
    alone: Sequence[list[int]],
    encoder: Encoder,
    malformed: MalformedRecords,
    *,
    end: list[int],
) -> EncodedRecord:
    """A record from its parts; `alone` are the token ids of each part alone."""
    num_parts = 0 if record.prompt is None else 2 * len(record.prompt_spans) + 1
    num_joined = num_parts + (record.completion is not None)
    # of what a chat template wrote, only the supervised turns must decode to themselves: parts 1, 3, 5, ...
    must_match = [not record.templated or number % 2 == 1 for number in range(num_joined)]
    joined = join_parts(encoder, texts[:num_joined], alone[:num_joined], must_match)
    prompt_parts, completion = joined[:num_parts], joined[num_parts:]
    spans, prompt_ids = [], list[int]()
    for number, ids in enumerate(prompt_parts):
        if number % 2:
            spans.append((len(prompt_ids), len(prompt_ids) + len(ids)))
        prompt_ids += ids
    choices = [
        continuation(encoder, prompt_ids, record.prompt or "", text, ids)
        for text, ids in zip(texts[num_joined:], alone[num_joined:], strict=True)
    ]
    if any(ids != before for ids, before in zip([*joined, *choices], alone, strict=True)):
        malformed.notes[JOINED] += 1
    begin = [] if record.templated else _beginning(joined, encoder, malformed)
    completion_ids = _ended(completion[0], end) if completion else None
    if not prompt_parts and completion_ids is not None:
        completion_ids = begin + completion_ids
    return EncodedRecord(
        record=record,
        prompt_ids=begin + prompt_ids if prompt_parts else [],
        completion_ids=completion_ids,
        choice_ids=[_ended(ids, end) for ids in choices],
        prompt_spans=tuple((len(begin) + start, len(begin) + stop) for start, stop in spans),
    )


def _beginning(parts: Sequence[list[int]], encoder: Encoder, malformed: MalformedRecords) -> list[int]:
    """The beginning tokens, unless the first part has brought them; notes what the tokenizer would do otherwise."""
    if encoder.end_ids:
        malformed.notes[OTHER_END] += 1
    first = parts[0] if parts else []
    if encoder.begin_ids and tuple(first[: len(encoder.begin_ids)]) == encoder.begin_ids:
        malformed.notes[OWN_BEGINNING] += 1
        return []
    return list(encoder.begin_ids)


def _ended(ids: list[int], end: list[int]) -> list[int]:
    """With the end token, unless the text has brought it."""
    return ids if not end or ids[-1:] == end else ids + end
