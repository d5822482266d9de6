"""Files -> records, for both stages and for scoring.

A record that cannot be used is never changed silently: `MalformedRecords` stops with file, line and reason, or counts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pipeline.core.progress import log
from pipeline.core.types import InputError, Record
from pipeline.data.text_files import Raw, Text, all_records


class MalformedRecords:
    """The policy for a record that cannot be used: stop, or skip and count it."""

    def __init__(self, *, skip: bool) -> None:
        self.skip, self.count = skip, 0

    def reject(self, where: str, reason: str) -> None:
        """Stop with the place and the reason, or count the record."""
        if not self.skip:
            raise InputError(f"{where}: {reason}; fix the record, or set malformed=skip to skip and count bad records")
        self.count += 1

    def log_count(self, what: str) -> None:
        """Warn of the number of skipped records."""
        if self.count:
            log.warning("%s: %d malformed records skipped", what, self.count)


# -------------------------------------------------------------------------------------------- records


def parse_records(
    raw: Iterable[Raw], text: Text, tokenizer: Any, malformed: MalformedRecords, *, first_id: int = 0
) -> Iterator[Record]:
    """Raw lines -> records, numbered from `first_id`; bad ones go to `malformed`."""
    for record_id, (where, kind, content) in enumerate(raw, first_id):
        try:
            row = content if kind == "row" else _parse_line(kind, content, text.columns)
            yield _record_from_row(_without_nulls(row), where, record_id, text, tokenizer)
        except InputError as error:
            malformed.reject(where, str(error))


def read_records(text: Text, tokenizer: Any) -> list[Record]:
    """All records of a text, in memory; refuses an empty one."""
    malformed = MalformedRecords(skip=text.skip_malformed)
    records = list(parse_records(all_records(text.files, text.columns), text, tokenizer, malformed))
    if not records:
        raise InputError(f"{text.what}: expected records, found none in {', '.join(map(str, text.files))}")
    malformed.log_count(text.what)
    return records


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


def _without_nulls(value: Any) -> Any:
    """A row without the fields that are null, at any depth: Arrow adds them, JSON lines may leave them out."""
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _record_from_row(row: dict[str, Any], where: str, record_id: int, text: Text, tokenizer: Any) -> Record:
    columns = text.columns
    prompt, completion, templated = _prompt_and_completion(row, columns, tokenizer)
    common = text.choices if prompt is not None else ()
    choices, answer = _choices(row, columns, common)
    if common and choices == common and answer is None and completion is not None:
        answer = _answer_of(completion, choices)
    if prompt is not None and completion is None and answer is not None:
        completion = choices[answer]
    return Record(
        record_id=record_id,
        prompt=prompt,
        completion=completion,
        choices=choices,
        answer=answer,
        where=where,
        templated=templated,
    )


def _prompt_and_completion(
    row: dict[str, Any], columns: Mapping[str, str], tokenizer: Any
) -> tuple[str | None, str | None, bool]:
    kinds = {kind: columns[kind] for kind in ("text", "prompt", "messages")}
    present = [kind for kind, column in kinds.items() if row.get(column) is not None]
    if len(present) != 1:
        raise InputError(
            f"expected exactly one of the columns {list(kinds.values())}, found {sorted(row)}; "
            "name yours with columns.text, columns.prompt or columns.messages"
        )
    if present == ["messages"]:
        return *_chat(row[columns["messages"]], tokenizer), True
    if present == ["text"]:
        return None, _string(row, columns["text"]), False
    completion = _string(row, columns["completion"]) if row.get(columns["completion"]) is not None else None
    return _string(row, columns["prompt"]), completion, False


def _chat(messages: Any, tokenizer: Any) -> tuple[str, str | None]:
    is_chat = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )
    if not is_chat or not messages:
        raise InputError("expected messages as a list of {role, content}, found something else")
    for message in messages:
        _check_unicode(message["content"], "messages")
    if not tokenizer.chat_template:
        raise InputError("expected a tokenizer with a chat template, because records hold messages, found none")

    def render(part: list[dict[str, str]], add_generation_prompt: bool) -> str:
        try:
            return tokenizer.apply_chat_template(part, tokenize=False, add_generation_prompt=add_generation_prompt)
        except Exception as error:  # a template is a program, which may raise anything
            raise InputError(f"expected messages that the chat template accepts, found: {error}") from None

    if messages[-1]["role"] != "assistant":
        return render(messages, True), None
    prompt, chat = render(messages[:-1], True), render(messages, False)
    if not chat.startswith(prompt):
        raise InputError("expected the chat template to extend the prompt by the answer, found it rewritten")
    return prompt, chat[len(prompt) :]


def _choices(
    row: dict[str, Any], columns: Mapping[str, str], common: tuple[str, ...]
) -> tuple[tuple[str, ...], int | None]:
    choices = row.get(columns["choices"]) or list(common)
    answer = row.get(columns["answer"]) if choices else None
    if not isinstance(choices, list) or not all(isinstance(choice, str) and choice for choice in choices):
        raise InputError(f"column {columns['choices']!r}: expected a list of strings, found {choices!r}")
    for choice in choices:
        _check_unicode(choice, columns["choices"])
    if len(set(choices)) != len(choices):
        raise InputError(f"column {columns['choices']!r}: expected different choices, found {choices!r}")
    if answer is not None and (type(answer) is not int or not 0 <= answer < len(choices)):
        raise InputError(
            f"column {columns['answer']!r}: expected an index into {len(choices)} choices, found {answer!r}"
        )
    return tuple(choices), answer


def _answer_of(completion: str, choices: tuple[str, ...]) -> int:
    """The index of a completion among the choices of its text, whatever the spaces around it."""
    for index, choice in enumerate(choices):
        if choice.strip() == completion.strip():
            return index
    raise InputError(f"expected a completion that is one of the choices {list(choices)}, found {completion!r}")


def _string(row: dict[str, Any], column: str) -> str:
    if not isinstance(row[column], str) or not row[column]:
        raise InputError(f"column {column!r}: expected text, found {row[column]!r}")
    return _check_unicode(row[column], column)


def _check_unicode(text: str, column: str) -> str:
    """A lone surrogate, which JSON can spell, is no character: no tokenizer takes it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"column {column!r}: expected text, found a lone surrogate at character {error.start}"
        ) from None
    return text
