"""Records -> token ids -> segments with their targets: the only place where tokens are shifted to targets."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pipeline.core.files import file_hash
from pipeline.core.types import UNKNOWN_TARGET, InputError, Record, TokenSequence
from pipeline.data.choice_tree import choice_segments
from pipeline.data.encode import EncodedRecord, encode_records
from pipeline.data.packing import Segment, pack
from pipeline.data.records import MalformedRecords, find_shape, parse_records
from pipeline.data.text_files import Raw, Text, all_records
from pipeline.data.text_ids import open_encoder

CUT_LEFT = "a prompt cut at the left to fit the window"  # for the log

Targets = tuple[tuple[int, int], ...]
"""(position s, token s+1): what each supervised position should predict."""


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
    begin_ids = open_encoder(tokenizer).begin_ids
    for whole in encode_records(records, tokenizer, malformed, end_token=text.end_token, with_choices=with_choices):
        encoded = _fitted(whole, text, malformed, window=window, begin_ids=begin_ids)
        if encoded is None:
            continue
        try:
            if text.targets == "next":
                _check_one_token(encoded, tokenizer, end_token=text.end_token)
            if encoded.completion_ids is None and text.completes:
                yield _prompt_segment(encoded, window)
            else:
                yield from record_segments(
                    encoded,
                    text.targets,
                    window=window,
                    require_targets=require_targets,
                    window_begin=begin_ids if text.begins_windows else (),
                )
        except InputError as error:
            malformed.reject(encoded.record.where, str(error))


def _fitted(
    encoded: EncodedRecord, text: Text, malformed: MalformedRecords, *, window: int, begin_ids: tuple[int, ...]
) -> EncodedRecord | None:
    """The record as the policy `too_long` wants it, where its prompt and completion are longer than the window.

    None where it is left out. Without a policy, or where even the completion is too long, it stays, to be rejected.
    """
    prompt_ids = encoded.prompt_ids
    excess = len(prompt_ids) + _num_after_prompt(encoded, text) - window
    if not prompt_ids or text.too_long is None or excess <= 0:
        return encoded
    if text.too_long == "stop":
        raise InputError(
            f"{encoded.record.where}: expected at most {window} tokens (window), found {window + excess}; widen the "
            "window, or set too_long=skip or cut_left"
        )
    if text.too_long == "skip":
        malformed.reasons[f"expected at most {window} tokens (window)"] += 1
        return None
    begin = list(begin_ids) if tuple(prompt_ids[: len(begin_ids)]) == begin_ids else []
    first = len(begin) + excess
    if first >= len(prompt_ids):
        return encoded
    malformed.notes[CUT_LEFT] += 1
    spans = [(max(start - excess, len(begin) + 1), stop - excess) for start, stop in encoded.prompt_spans]
    return dataclasses.replace(
        encoded,
        prompt_ids=begin + prompt_ids[first:],
        prompt_spans=tuple((start, stop) for start, stop in spans if start < stop),
    )


def _num_after_prompt(encoded: EncodedRecord, text: Text) -> int:
    """The tokens that follow a record's prompt in its longest segment."""
    if text.targets == "choices":
        return max((len(ids) - 1 for ids in encoded.choice_ids), default=0)
    if encoded.completion_ids is None:
        return int(text.completes)
    return 0 if text.targets == "next" else len(encoded.completion_ids)


def record_segments(
    encoded: EncodedRecord,
    targets: str,
    *,
    window: int | None,
    require_targets: bool = False,
    window_begin: Sequence[int] = (),
) -> Iterator[Segment]:
    """The segments of one record; InputError where it does not fit the window (None: no limit) or has no target.

    `window_begin` are tokens that begin each further window of a long text.
    """
    prompt_ids, completion_ids, is_text = encoded.prompt_ids, encoded.completion_ids, not encoded.prompt_ids
    if targets == "choices":
        yield from _choice_segments(encoded, window, require_targets)
        return
    if completion_ids is None and not encoded.prompt_spans and (require_targets or targets == "completion"):
        raise InputError("expected a known target, found no completion (nor choices with an answer)")
    if is_text and targets != "all":
        raise InputError(f"expected a prompt, because targets={targets}, found plain text or an empty prompt")
    ids, first = prompt_ids + (completion_ids or []), 0 if targets == "all" else len(prompt_ids) - 1
    pairs = shifted_targets(ids, first=first)
    if targets == "completion":
        pairs = (*((s - 1, ids[s]) for span in encoded.prompt_spans for s in range(*span)), *pairs)
    if targets == "next":
        ids, pairs = prompt_ids, pairs[:1] or ((first, UNKNOWN_TARGET),)
    if not pairs:
        raise InputError(f"expected at least two tokens, found {len(ids)}: nothing to predict")
    record_id = encoded.record.record_id
    if is_text and window is not None:
        yield from _windows(ids, window, window_begin, record_id)
        return
    _check_length(len(ids), window)
    yield Segment(record_id=record_id, ids=tuple(ids), targets=pairs)


def _windows(ids: Sequence[int], window: int, begin: Sequence[int], record_id: int) -> Iterator[Segment]:
    """A long text in windows that overlap by one token: each token is a target once."""
    if window < len(begin) + 2:
        raise InputError(f"window: expected at least {len(begin) + 2} with window_begin_token, found {window}")
    start, before = 0, list[int]()
    while start < len(ids) - 1:
        size = window - len(before)
        part = [*before, *ids[start : start + size]]
        yield Segment(record_id=record_id, ids=tuple(part), targets=shifted_targets(part, first=len(before)))
        start, before = start + size - 1, list(begin)


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
    """Refuse `targets=next` where a choice has several tokens: most of it would be left out.

    How a choice ends, with the end token or as the template of a chat ends a turn, does not count.
    """
    choices, choice_ids = encoded.record.choices, encoded.choice_ids
    if encoded.record.templated:
        if len({ids[0] for ids in encoded.choice_ids}) < len(choice_ids):
            raise InputError(
                f"expected turns that differ in their first token, found that the chat template begins {choices} with "
                "the same; use targets=choices"
            )
        choice_ids = [tokenizer(choice, add_special_tokens=False)["input_ids"] for choice in choices]
    elif end_token:
        choice_ids = [ids[:-1] for ids in choice_ids]
    for choice, ids in zip(choices, choice_ids, strict=True):
        if len(ids) > 1:
            raise InputError(
                f"expected choices of one token, found {choice!r} of {len(ids)}: "
                f"{[tokenizer.decode([token]) for token in ids]}; targets=next captures the first token alone; use "
                "targets=choices"
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
    text = find_shape(text)
    records = parse_records(raw, text, tokenizer, malformed, first_id=first_id)
    parts = segments(records, text, tokenizer, malformed, window=window, require_targets=require_targets)
    return pack(parts, window=window)


def labeled_sequences(text: Text, tokenizer: Any, *, window: int) -> Iterator[TokenSequence]:
    """A text with known targets, packed; at its end, one without a usable record is refused."""
    check_end_token(text, tokenizer)
    malformed, text = MalformedRecords(skip=text.skip_malformed), find_shape(text)
    raw, num_sequences = all_records(text.files, text.read_columns, take=text.take), 0
    for sequence in read_sequences(raw, text, tokenizer, malformed, window=window, require_targets=True):
        num_sequences += 1
        yield sequence
    if num_sequences == 0:
        files = ", ".join(map(str, text.files))
        raise InputError(f"{text.what}: expected usable records, found none in {files} ({malformed.count} malformed)")
    malformed.log_count(text.what)


def load_labeled_sequences(text: Text, tokenizer: Any, *, window: int) -> list[TokenSequence]:
    """The same in memory."""
    return list(labeled_sequences(text, tokenizer, window=window))


def check_end_token(text: Text, tokenizer: Any) -> None:
    """Refuse a text that wants an end token of a tokenizer that has none."""
    if text.end_token and tokenizer.eos_token_id is None:
        raise InputError(f"{text.what}: expected a tokenizer with an end token, found none; set end_token=false")


def text_hash(text: Text) -> str:
    """sha256 over the hash of each file, in order, whatever the files are called."""
    joined = "".join(file_hash(file) for file in text.files)
    return hashlib.sha256(joined.encode()).hexdigest()
