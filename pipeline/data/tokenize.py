"""Records -> token ids -> segments with their targets: the only place where tokens are shifted to targets."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.core.files import file_hash
from pipeline.core.types import UNKNOWN_TARGET, InputError, Record, TokenSequence
from pipeline.data.choice_tree import choice_segments
from pipeline.data.packing import Segment, pack
from pipeline.data.records import MalformedRecords, parse_records
from pipeline.data.text_files import Raw, Text, all_records

RECORDS_PER_CALL = 1024  # records handed to the tokenizer at once

Targets = tuple[tuple[int, int], ...]
"""(position s, token s+1): what each supervised position should predict."""


# ------------------------------------------------------------------------------------------ token ids


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


def encode_records(
    records: Iterable[Record], tokenizer: Any, *, end_token: bool, with_choices: bool = False
) -> Iterator[EncodedRecord]:
    """Tokenize records in batches: prompts, completions and, if asked, choices by the same rules.

    Special tokens that the tokenizer adds go to the start of a record only, and not where a chat template has written
    them already. A templated completion or choice brings the template's own end of turn; any other gets the end token.
    """
    end = [tokenizer.eos_token_id] if end_token else []
    remaining = iter(records)
    while batch := list(itertools.islice(remaining, RECORDS_PER_CALL)):
        texts: list[tuple[str, bool]] = []
        for record in batch:
            if record.prompt is not None:
                texts.append((record.prompt, not record.templated))
            if record.completion is not None:
                texts.append((record.completion, record.prompt is None and not record.templated))
            if with_choices:
                texts += [(choice, False) for choice in record.choices]
        ids = iter(_tokenize(texts, tokenizer))
        for record in batch:
            end_ids = [] if record.templated else end
            yield EncodedRecord(  # the iterator is read in the order in which the texts were listed above
                record=record,
                prompt_ids=[] if record.prompt is None else next(ids),
                completion_ids=None if record.completion is None else next(ids) + end_ids,
                choice_ids=[next(ids) + end_ids for _ in record.choices] if with_choices else [],
            )


def _tokenize(texts: Sequence[tuple[str, bool]], tokenizer: Any) -> list[list[int]]:
    """Token ids of each (text, whether the tokenizer adds its special tokens), by one call for each kind."""
    found: list[list[int]] = [[] for _ in texts]
    for special in (True, False):
        places = [place for place, (_, adds_special) in enumerate(texts) if adds_special == special]
        if not places:
            continue
        called = tokenizer(
            [texts[place][0] for place in places],
            add_special_tokens=special,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        for place, ids in zip(places, called["input_ids"], strict=True):
            found[place] = ids
    return found


def shifted_targets(ids: Sequence[int], *, first: int) -> Targets:
    """The shift: from position `first` on, each position s predicts the token at s + 1."""
    return tuple((s, ids[s + 1]) for s in range(first, len(ids) - 1))


# ------------------------------------------------------------------------------------------- segments


def segments(
    records: Iterable[Record],
    text: Text,
    tokenizer: Any,
    malformed: MalformedRecords,
    *,
    window: int,
    require_targets: bool = False,
) -> Iterator[Segment]:
    """Records -> segments no longer than the window, with their targets.

    Plain text longer than the window is split into segments that overlap by one token, so that every token is a target
    once; a record with a prompt must fit. With `require_targets` a record without a known target is rejected.
    """
    with_choices = text.targets in ("next", "choices")
    for encoded in encode_records(records, tokenizer, end_token=text.end_token, with_choices=with_choices):
        try:
            if text.targets == "next":
                _check_one_token(encoded, tokenizer, end_token=text.end_token)
            if encoded.completion_ids is None and text.completes:
                yield _prompt_segment(encoded, window)
            else:
                yield from record_segments(encoded, text.targets, window=window, require_targets=require_targets)
        except InputError as error:
            malformed.reject(encoded.record.where, str(error))


def record_segments(
    encoded: EncodedRecord, targets: str, *, window: int | None, require_targets: bool = False
) -> Iterator[Segment]:
    """The segments of one record; InputError where it does not fit the window (None: no limit) or has no target."""
    prompt_ids, completion_ids, is_text = encoded.prompt_ids, encoded.completion_ids, not encoded.prompt_ids
    if targets == "choices":
        yield from _choice_segments(encoded, window, require_targets)
        return
    if completion_ids is None and (require_targets or targets == "completion"):
        raise InputError("expected a known target, found no completion (nor choices with an answer)")
    if is_text and targets != "all":
        raise InputError(f"expected a prompt, because targets={targets}, found plain text or an empty prompt")
    ids, first = prompt_ids + (completion_ids or []), 0 if targets == "all" else len(prompt_ids) - 1
    pairs = shifted_targets(ids, first=first)
    if targets == "next":
        ids, pairs = prompt_ids, pairs[:1] or ((first, UNKNOWN_TARGET),)
    if not pairs:
        raise InputError(f"expected at least two tokens, found {len(ids)}: nothing to predict")
    record_id = encoded.record.record_id
    if is_text and window is not None:
        for start in range(0, len(ids) - 1, window - 1):
            part = ids[start : start + window]
            yield Segment(record_id=record_id, ids=tuple(part), targets=shifted_targets(part, first=0))
        return
    _check_length(len(ids), window)
    yield Segment(record_id=record_id, ids=tuple(ids), targets=pairs)


def _choice_segments(encoded: EncodedRecord, window: int | None, require_targets: bool) -> Iterator[Segment]:
    record, choice_ids = encoded.record, encoded.choice_ids
    if not encoded.prompt_ids:
        raise InputError("expected a prompt, because targets=choices, found plain text or an empty prompt")
    if not choice_ids:
        raise InputError(
            "expected choices, because targets=choices, found none; the option choices of a text names those of all "
            "its records"
        )
    if require_targets and record.answer is None:
        raise InputError("expected a known target, found choices without an answer")
    parts = list(choice_segments(encoded.prompt_ids, choice_ids, answer=record.answer, record_id=record.record_id))
    _check_length(max(len(part.ids) for part in parts), window)
    yield from parts


def _check_length(num_tokens: int, window: int | None) -> None:
    if window is not None and num_tokens > window:
        raise InputError(f"expected at most {window} tokens (window), found {num_tokens}")


def _check_one_token(encoded: EncodedRecord, tokenizer: Any, *, end_token: bool) -> None:
    """Refuse `targets=next` where a choice has several tokens: most of it would be left out."""
    num_end = 1 if end_token and not encoded.record.templated else 0
    for choice, ids in zip(encoded.record.choices, encoded.choice_ids, strict=True):
        if len(ids) - num_end > 1:
            tokens = [tokenizer.decode([token]) for token in ids[: len(ids) - num_end]]
            raise InputError(
                f"expected choices of one token, found {choice!r} of {len(tokens)}: {tokens}; targets=next captures "
                "the first token alone; use targets=choices"
            )


def _prompt_segment(encoded: EncodedRecord, window: int) -> Segment:
    """A segment without targets: the teacher will complete it."""
    ids = encoded.prompt_ids
    if not 1 <= len(ids) < window:
        raise InputError(f"expected a prompt of 1 to {window - 1} tokens (the window less one), found {len(ids)}")
    return Segment(record_id=encoded.record.record_id, ids=tuple(ids), targets=())


def read_sequences(
    raw: Iterable[Raw],
    text: Text,
    tokenizer: Any,
    malformed: MalformedRecords,
    *,
    window: int,
    first_id: int = 0,
    require_targets: bool = False,
) -> Iterator[TokenSequence]:
    """From raw records to packed sequences."""
    records = parse_records(raw, text, tokenizer, malformed, first_id=first_id)
    parts = segments(records, text, tokenizer, malformed, window=window, require_targets=require_targets)
    return pack(parts, window=window)


def load_labeled_sequences(text: Text, tokenizer: Any, *, window: int) -> list[TokenSequence]:
    """A text with known targets, packed, in memory; refuses one without a usable record."""
    check_end_token(text, tokenizer)
    malformed = MalformedRecords(skip=text.skip_malformed)
    sequences = list(
        read_sequences(
            all_records(text.files, text.columns), text, tokenizer, malformed, window=window, require_targets=True
        )
    )
    if not sequences:
        files = ", ".join(map(str, text.files))
        raise InputError(f"{text.what}: expected usable records, found none in {files} ({malformed.count} malformed)")
    malformed.log_count(text.what)
    return sequences


def check_end_token(text: Text, tokenizer: Any) -> None:
    """Refuse a text that wants an end token of a tokenizer that has none."""
    if text.end_token and tokenizer.eos_token_id is None:
        raise InputError(f"{text.what}: expected a tokenizer with an end token, found none; set end_token=false")


def text_hash(text: Text) -> str:
    """sha256 over the hash of each file, in order, whatever the files are called."""
    joined = "".join(file_hash(file) for file in text.files)
    return hashlib.sha256(joined.encode()).hexdigest()
