"""Files -> records, for both stages and for scoring.

A record that cannot be used is never changed silently: `MalformedRecords` stops with file, line and reason, or counts.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from pipeline.core.progress import log
from pipeline.core.types import InputError, Record
from pipeline.data.chat import ChatRenderer, open_renderer, render_chat
from pipeline.data.messages import Chat, plain_chat, text_content, without_nulls
from pipeline.data.shapes import SHAPES, Fields
from pipeline.data.text_files import Raw, Text, all_records, raw_records, read_chunks

TRIMMED = "text of the chat template that is not supervised"  # a note
SAMPLE_RECORDS = 100  # read to find the shape of a text and the columns that nobody reads


class MalformedRecords:
    """The policy for a record that cannot be used: stop, or skip and count it."""

    def __init__(self, *, skip: bool) -> None:
        self.skip = skip
        self.reasons: Counter[str] = Counter()
        """Skipped records by reason: the message without what was found."""
        self.notes: Counter[str] = Counter()
        """Records that are used, but not as they stand, by what was done."""
        self.num_answered = 0
        """Records that are used and have a known answer beside a prompt."""

    @property
    def count(self) -> int:
        """The number of skipped records."""
        return self.reasons.total()

    def reject(self, where: str, reason: str) -> None:
        """Stop with the place and the reason, or count the record."""
        if not self.skip:
            raise InputError(f"{where}: {reason}; fix the record, or set malformed=skip to skip and count bad records")
        self.reasons[reason.split(", found")[0]] += 1

    def log_count(self, what: str) -> None:
        """Warn of the number of skipped records, and say what was done with others."""
        log_counts(what, self.reasons, self.notes)


def log_counts(what: str, reasons: Mapping[str, int], notes: Mapping[str, int]) -> None:
    """One line for the skipped records of a text by reason, and one for each note."""
    if reasons:
        by_reason = "; ".join(f"{count} x {reason}" for reason, count in Counter(reasons).most_common())
        log.warning("%s: %d malformed records skipped: %s", what, sum(reasons.values()), by_reason)
    for note, count in sorted(notes.items()):
        log.info("%s: %d records with %s", what, count, note)


# --------------------------------------------------------------------------------------------- shape


def find_shape(text: Text) -> Text:
    """The text with its shape and the columns that are read; says once which columns of its records nobody reads."""
    if text.read_columns is not None:
        return text
    sampled = list(_sampled_columns(text))
    found = (name for names in sampled for name, shape in SHAPES.items() if shape.is_found(names, text.columns))
    # without a sign of any shape each record is refused with the project's own columns
    name = next(found, "own") if text.shape == "auto" else text.shape
    columns = SHAPES[name].columns(text.columns)
    has_choices = name == "multiple_choice" or bool(text.choices)
    column = text.columns["choices"]
    has_choices = has_choices or (column in columns and any(column in names for names in sampled))
    targets = text.targets if text.targets != "auto" else "choices" if has_choices else "all"
    unread = sorted(set().union(*sampled) - {*columns, *SHAPES[name].others})
    if name != "own" or unread:
        left = f"; columns that are not read: {', '.join(unread)}" if unread else ""
        log.info("%s: shape=%s%s", text.what, name if name != "own" else "text, prompt_completion or chat", left)
    return dataclasses.replace(text, shape=name, targets=targets, read_columns=tuple(dict.fromkeys(columns)))


def _sampled_columns(text: Text) -> Iterator[set[str]]:
    """The names of the columns of the first records, of a table those that are not null."""
    for chunk in next(read_chunks(text.files, size=SAMPLE_RECORDS, take=text.take), []):
        if chunk.rows is not None:  # not as Python values: a column that nobody reads may hold some that Python has not
            yield {
                name
                for name, column in zip(chunk.rows.schema.names, chunk.rows.columns, strict=True)
                if column.null_count < len(column)
            }
            continue
        for _, kind, content in raw_records([chunk]):
            try:
                yield set(_row(kind, content, text))
            except InputError:
                continue  # it is rejected, with its place, when the records are read


# -------------------------------------------------------------------------------------------- records


def parse_records(
    raw: Iterable[Raw], text: Text, tokenizer: Any, malformed: MalformedRecords, *, first_id: int = 0
) -> Iterator[Record]:
    """Raw lines -> records, numbered from `first_id`; bad ones go to `malformed`."""
    text = find_shape(text)
    renderer: ChatRenderer | None = None
    for record_id, (where, kind, content) in enumerate(raw, first_id):
        try:
            fields = _fields(_row(kind, content, text), text)
            make = partial(Record, record_id=record_id, where=where)
            if fields.messages is None:
                record = _plain_record(fields, make)
            else:
                chat = plain_chat(fields.messages, text.chat)
                renderer = renderer or open_renderer(tokenizer, text.chat)
                record, is_trimmed = _chat_record(fields, chat, renderer, make)
                if is_trimmed:
                    malformed.notes[TRIMMED] += 1
            malformed.num_answered += record.prompt is not None and record.completion is not None
            yield record
        except InputError as error:
            malformed.reject(where, str(error))


def read_records(text: Text, tokenizer: Any) -> list[Record]:
    """All records of a text, in memory; refuses an empty one."""
    malformed = MalformedRecords(skip=text.skip_malformed)
    text = find_shape(text)
    raw = all_records(text.files, text.read_columns, take=text.take)
    records = list(parse_records(raw, text, tokenizer, malformed))
    if not records:
        raise InputError(f"{text.what}: expected records, found none in {', '.join(map(str, text.files))}")
    malformed.log_count(text.what)
    return records


def row_of(raw: Raw, text: Text) -> dict[str, Any]:
    """The columns of a raw record by name, without those that are null; InputError where it is malformed."""
    _, kind, content = raw
    return _row(kind, content, text)


def fields_of(raw: Raw, text: Text) -> Fields:
    """What a raw record of a text of known shape holds, chats not yet rendered; InputError where it is malformed."""
    return _fields(row_of(raw, text), text)


def _row(kind: str, content: Any, text: Text) -> dict[str, Any]:
    """The columns of a raw record, without those that are null."""
    if kind == "bad":
        raise InputError(content)
    row = content if kind == "row" else _parse_line(kind, content, text.columns)
    return without_nulls(row)


def _parse_line(kind: str, line: bytes, columns: Mapping[str, str]) -> dict[str, Any]:
    if kind == "text":
        return {columns["text"]: _parse_text(line)}
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # RecursionError: nested without end
        raise InputError(f"expected a JSON object, found it broken ({error})") from None
    if not isinstance(row, dict):
        raise InputError(f"expected a JSON object, found {type(row).__name__}")
    return row


def _parse_text(line: bytes) -> str:
    try:
        text = line.decode().rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise InputError(f"expected UTF-8, found it broken ({error})") from None
    if "\r" in text:
        raise InputError("expected lines that end in LF or CRLF, found a lone CR; convert the file")
    return text


def _fields(row: dict[str, Any], text: Text) -> Fields:
    """What a row says; one with a prompt or a chat has the choices of its text if it brings none of its own."""
    column = text.columns["choices"]
    # a column of this name may also be that of the prompt
    is_plain = text.columns["text"] in row and text.shape != "prompt_completion"
    is_common = bool(text.choices) and column not in row and not is_plain
    if not is_common:
        return SHAPES[text.shape].read(row, text.columns)
    fields = SHAPES[text.shape].read({**row, column: list(text.choices)}, text.columns)
    fields = dataclasses.replace(fields, choices=fields.choices or text.choices)
    messages = fields.messages or []
    if messages and isinstance(messages[-1], dict) and messages[-1].get(text.chat.role) == "assistant":
        answer = _answer_of(text_content(messages[-1].get(text.chat.content)), fields.choices)
        return dataclasses.replace(fields, messages=messages[:-1], answer=answer)
    if fields.answer is None and fields.completion is not None:
        return dataclasses.replace(fields, answer=_answer_of(fields.completion, fields.choices))
    return fields


def _answer_of(completion: str, choices: Sequence[str]) -> int:
    """The index of a completion among the choices of its text, whatever the spaces around it."""
    for index, choice in enumerate(choices):
        if choice.strip() == completion.strip():
            return index
    raise InputError(f"expected a completion that is one of the choices {list(choices)}, found {completion!r}")


def _plain_record(fields: Fields, make: Any) -> Record:
    """A record of plain text, or of a prompt and its completion."""
    completion = fields.text if fields.prompt is None else fields.completion
    if fields.prompt is not None and completion is None and fields.answer is not None:
        completion = fields.choices[fields.answer]
    record: Record = make(
        prompt=fields.prompt, completion=completion, choices=fields.choices, answer=fields.answer, templated=False
    )
    return record


def _chat_record(fields: Fields, messages: Chat, renderer: ChatRenderer, make: Any) -> tuple[Record, bool]:
    """A chat as its template writes it, and whether something that it wrote is not supervised."""
    chat = render_chat(renderer, messages, tools=fields.tools, choices=fields.choices)
    completion = chat.completion
    if completion is None and fields.answer is not None:
        completion = chat.choices[fields.answer]
    record: Record = make(
        prompt=chat.prompt,
        completion=completion,
        choices=fields.choices,
        choice_turns=chat.choices,
        answer=fields.answer,
        prompt_spans=chat.prompt_spans,
        templated=True,
    )
    return record, chat.is_trimmed
