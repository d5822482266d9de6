"""Records -> tokens -> packed sequences: the only place where targets are shifted."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.core.files import file_hash
from pipeline.core.types import UNKNOWN_TARGET, InputError, Record, TokenSequence
from pipeline.data.packing import Segment, pack
from pipeline.data.records import MalformedRecords, Raw, Text, all_records, parse_records

RECORDS_PER_CALL = 1024  # records handed to the tokenizer at once


# --------------------------------------------------------------------------------------------- tokens


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

    Plain text longer than the window is split into segments that overlap by
    one token, so that every token is a target once; a record with a prompt must fit. With `require_targets`
    a record whose truth is unknown is rejected.
    """
    records = iter(records)
    while some := list(itertools.islice(records, RECORDS_PER_CALL)):
        for record, (head, tail) in zip(some, _encode(some, tokenizer, text.end_token), strict=True):
            try:
                if tail is None and text.completes:
                    yield _prompt_of(record.record_id, head, window)
                else:
                    yield from _segments_of(record.record_id, head, tail, window, text.targets, require_targets)
            except InputError as error:
                malformed.reject(record.where, str(error))


def _encode(records: list[Record], tokenizer: Any, end_token: bool) -> list[tuple[list[int], list[int] | None]]:
    """(prompt ids, completion ids) of each record; plain text is a completion after an empty prompt."""
    end = [tokenizer.eos_token_id] if end_token else []

    def ids(texts: list[str], special: bool) -> list[list[int]]:
        if not texts:
            return []
        return tokenizer(texts, add_special_tokens=special, return_attention_mask=False, return_token_type_ids=False)[
            "input_ids"
        ]

    by_special: dict[bool, list[str]] = {True: [], False: []}
    plan: list[tuple[tuple[bool, int] | None, tuple[bool, int] | None]] = []
    for record in records:
        places: list[tuple[bool, int] | None] = []
        for text, starts in ((record.prompt, True), (record.completion, record.prompt is None)):
            special = starts and not record.templated
            places.append(None if text is None else (special, len(by_special[special])))
            if text is not None:
                by_special[special].append(text)
        plan.append((places[0], places[1]))
    encoded = {special: ids(texts, special) for special, texts in by_special.items()}
    return [
        (
            [] if prompt is None else encoded[prompt[0]][prompt[1]],
            None
            if completion is None
            # a templated completion brings the template's own end of turn
            else encoded[completion[0]][completion[1]] + ([] if record.templated else end),
        )
        for record, (prompt, completion) in zip(records, plan, strict=True)
    ]


def _segments_of(
    record_id: int, head: list[int], tail: list[int] | None, window: int, targets: str, require_targets: bool
) -> Iterator[Segment]:
    is_text = not head
    if tail is None and (require_targets or targets == "completion"):
        raise InputError("expected a known target, found no completion (nor choices with an answer)")
    if is_text and targets != "all":
        raise InputError(f"expected a prompt, because targets={targets}, found plain text or an empty prompt")
    if targets == "next":
        pairs = [(len(head) - 1, tail[0] if tail else UNKNOWN_TARGET)]
        ids = head
    else:
        ids = head + (tail or [])
        first = 0 if targets == "all" else len(head) - 1
        pairs = [(s, ids[s + 1]) for s in range(first, len(ids) - 1)]
    if not pairs:
        raise InputError(f"expected at least two tokens, found {len(ids)}: nothing to predict")
    if is_text:
        for start in range(0, len(ids) - 1, window - 1):
            part = ids[start : start + window]
            shifted = tuple((s, part[s + 1]) for s in range(len(part) - 1))
            yield Segment(record_id=record_id, ids=tuple(part), targets=shifted)
        return
    if len(ids) > window:
        raise InputError(f"expected at most {window} tokens (window), found {len(ids)}")
    yield Segment(record_id=record_id, ids=tuple(ids), targets=tuple(pairs))


def _prompt_of(record_id: int, head: list[int], window: int) -> Segment:
    """A segment without targets: the teacher is to say what follows."""
    if not 1 <= len(head) < window:
        raise InputError(f"expected a prompt of 1 to {window - 1} tokens (the window less one), found {len(head)}")
    return Segment(record_id=record_id, ids=tuple(head), targets=())


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
    """The whole way from raw records to packed sequences."""
    records = parse_records(raw, text, tokenizer, malformed, first_id=first_id)
    parts = segments(records, text, tokenizer, malformed, window=window, require_targets=require_targets)
    return pack(parts, window=window)


def load_labeled_sequences(text: Text, tokenizer: Any, *, window: int) -> list[TokenSequence]:
    """A whole text with known targets, packed, in memory."""
    malformed = MalformedRecords(skip=text.skip_malformed)
    raw = all_records(text.files)
    return list(read_sequences(raw, text, tokenizer, malformed, window=window, require_targets=True))


# -------------------------------------------------------------------------------------------- packing


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSummary:
    """What a text is, whatever its files are called."""

    num_records: int
    """Malformed ones included."""
    sha256: str


def check_text(text: Text, tokenizer: Any, *, window: int, require_targets: bool = False) -> TextSummary:
    """Read, parse and tokenize every record once, and hash the files: what cannot be used stops before a model loads.

    Refuses a text with no usable record.
    """
    if text.end_token and tokenizer.eos_token_id is None:
        raise InputError(f"{text.what}: expected a tokenizer with an end token, found none; set end_token=false")
    malformed, num_records = MalformedRecords(skip=text.skip_malformed), 0

    def counted() -> Iterator[Raw]:
        nonlocal num_records
        for raw in all_records(text.files):
            num_records += 1
            yield raw

    records = parse_records(counted(), text, tokenizer, malformed)
    parts = segments(records, text, tokenizer, malformed, window=window, require_targets=require_targets)
    if sum(1 for _ in parts) == 0:
        files = ", ".join(map(str, text.files))
        raise InputError(f"{text.what}: expected usable records, found none in {files} ({malformed.count} malformed)")
    malformed.log_count(text.what)
    return TextSummary(num_records=num_records, sha256=text_hash(text))


def text_hash(text: Text) -> str:
    """sha256 over the hash of each file, in order, whatever the files are called."""
    joined = "".join(file_hash(file) for file in text.files)
    return hashlib.sha256(joined.encode()).hexdigest()
