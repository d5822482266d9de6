"""Shapes of records: a row of named columns -> text, prompt and completion, or a chat.

A new shape is one function and its row in `SHAPES`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.core.types import InputError
from pipeline.data.messages import check_unicode, without_nulls

Row = Mapping[str, Any]
Columns = Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fields:
    """What a row says: exactly one of text, prompt and messages, and what belongs to it."""

    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[Any] | None = None
    choices: tuple[str, ...] = ()
    answer: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordShape:
    """One shape: how it is read, and by which columns it is recognised."""

    read: Callable[[Row, Columns], Fields]
    columns: Callable[[Columns], Sequence[str]]
    """The columns that it reads."""
    is_found: Callable[[Collection[str], Columns], bool]
    """Whether a row with columns of these names has this shape, for shape=auto."""
    others: tuple[str, ...] = field(default=())
    """Columns that are left unread on purpose."""


# -------------------------------------------------------------------------------- the project's own


def read_own(row: Row, columns: Columns) -> Fields:
    """Text, prompt and completion, or chat: whichever of the three columns a row has."""
    kinds = {kind: columns[kind] for kind in ("text", "prompt", "messages")}
    present = [kind for kind, column in kinds.items() if row.get(column) is not None]
    if len(present) != 1:
        raise InputError(
            f"expected exactly one of the columns {list(kinds.values())}, found {sorted(row)}; "
            "name yours with columns.text, columns.prompt or columns.messages, or set shape"
        )
    return {"text": read_text, "prompt": read_prompt_completion, "messages": read_chat}[present[0]](row, columns)


def read_text(row: Row, columns: Columns) -> Fields:
    """Plain text."""
    choices, _ = _own_choices(row, columns)
    return Fields(text=_string(row, columns["text"]), choices=choices)


def read_prompt_completion(row: Row, columns: Columns) -> Fields:
    """A prompt, and a completion or choices where there are any; both may be lists of messages, as TRL has them."""
    prompt, completion = row.get(columns["prompt"]), row.get(columns["completion"])
    choices, answer = _own_choices(row, columns)
    if isinstance(prompt, list):
        messages = [*prompt, *(_list(completion, columns["completion"]) if completion is not None else [])]
        return Fields(messages=messages, tools=_tools(row, columns), choices=choices, answer=answer)
    return Fields(
        prompt=_string(row, columns["prompt"]),
        completion=None if completion is None else _string(row, columns["completion"]),
        choices=choices,
        answer=answer,
    )


def read_chat(row: Row, columns: Columns) -> Fields:
    """A chat as a list of {role, content}, with the tools that the assistant may call."""
    choices, answer = _own_choices(row, columns)
    messages = _list(row.get(columns["messages"]), columns["messages"])
    return Fields(messages=messages, tools=_tools(row, columns), choices=choices, answer=answer)


# ------------------------------------------------------------------------------------ those of others


def read_alpaca(row: Row, columns: Columns) -> Fields:
    """Alpaca: instruction, with input after it; output; a system prompt; history as [question, answer] pairs."""
    messages = [{"role": "system", "content": _string(row, "system")}] if row.get("system") else []
    for pair in _list(row.get("history") or [], "history"):
        if not isinstance(pair, list) or len(pair) != 2:
            raise InputError(f"column 'history': expected [question, answer] pairs, found {pair!r}")
        messages += [{"role": role, "content": text} for role, text in zip(("user", "assistant"), pair, strict=True)]
    question = _string(row, "instruction") + (f"\n{_string(row, 'input')}" if row.get("input") else "")
    messages.append({"role": "user", "content": question})
    if row.get("output") is not None:
        messages.append({"role": "assistant", "content": _string(row, "output")})
    return Fields(messages=messages)


SHAREGPT_ROLES = {
    **{"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant"},
    **{"system": "system", "tool": "tool", "observation": "tool", "function_response": "tool"},
}


def read_sharegpt(row: Row, columns: Columns) -> Fields:
    """ShareGPT: conversations of {from, value}, with a system prompt and tools beside them."""
    turns = _list(row.get("conversations"), "conversations")
    if not all(isinstance(turn, dict) and turn.get("from") in SHAREGPT_ROLES for turn in turns):
        found = [turn.get("from") if isinstance(turn, dict) else turn for turn in turns]
        raise InputError(f"conversations: expected 'from' to be one of {list(SHAREGPT_ROLES)}, found {found}")
    messages = [{"role": "system", "content": _string(row, "system")}] if row.get("system") else []
    for turn in turns:
        others = {name: value for name, value in turn.items() if name not in ("from", "value")}
        content = {"content": turn["value"]} if "value" in turn else {}
        messages.append({"role": SHAREGPT_ROLES[turn["from"]], **content, **others})
    return Fields(messages=messages, tools=_tools(row, columns))


def read_preference(row: Row, columns: Columns) -> Fields:
    """A preference pair, of which the chosen answer alone is read: after its prompt, as a chat, or as whole text."""
    chosen, prompt = row.get("chosen"), row.get(columns["prompt"])
    if isinstance(chosen, list):
        before = prompt if isinstance(prompt, list) else []
        if isinstance(prompt, str) and not any(isinstance(m, dict) and m.get("role") == "user" for m in chosen):
            before = [{"role": "user", "content": _string(row, columns["prompt"])}]
        return Fields(messages=[*before, *chosen], tools=_tools(row, columns))
    if isinstance(prompt, list):
        return Fields(messages=[*prompt, {"role": "assistant", "content": _string(row, "chosen")}])
    if prompt is None:
        return Fields(text=_string(row, "chosen"))
    return Fields(prompt=_string(row, columns["prompt"]), completion=_string(row, "chosen"))


QUESTIONS, CHOICES, ANSWERS = (
    ("question", "question_stem", "ctx", "query"),
    ("endings", "options"),
    ("answerKey", "label"),
)


def read_multiple_choice(row: Row, columns: Columns) -> Fields:
    """A question with choices: ARC ({text, label}, answerKey), HellaSwag (ctx, endings, label), MMLU (index or letter).

    A question is asked as "Question: ...\\nAnswer:", a context is continued; a space stands before each choice.
    """
    question = _first(row, (columns["prompt"], *QUESTIONS), "a question")
    choices = row[_first(row, (columns["choices"], *CHOICES), "choices")]
    choices = _parsed(choices)
    names: list[str] = []
    if isinstance(choices, dict):
        names = [str(label) for label in choices.get("label", [])]
        choices = choices.get("text")
    choices = _choice_texts(choices, "choices")
    text = _string(row, question)
    prompt = f"Question: {text}\nAnswer:" if question.startswith("question") else text
    separator = "" if prompt[-1].isspace() else " "
    named = next((row[name] for name in (columns["answer"], *ANSWERS) if row.get(name) is not None), None)
    answer = _answer_index(named, choices, names)
    spaced = tuple(choice if choice[0].isspace() else separator + choice for choice in choices)
    return Fields(prompt=prompt, choices=spaced, answer=answer)


def _answer_index(named: Any, choices: Sequence[str], names: Sequence[str]) -> int | None:
    """The index of an answer given as an index, a digit, a letter, a label or the choice itself; None if unknown."""
    if named in (None, "", -1, "-1"):
        return None
    if isinstance(named, float) and named.is_integer():  # what pandas makes of a column with a gap
        named = int(named)
    found = set()
    if names:
        found = {i for i, label in enumerate(names) if label == str(named)}
        if len(found) == 1:  # labels decide, also where a choice reads the same
            return found.pop()
    elif type(named) is int or (isinstance(named, str) and named.isdecimal()):
        found = {int(named)} & set(range(len(choices)))
    elif isinstance(named, str) and len(named) == 1 and named.isupper():
        found = {ord(named) - ord("A")} & set(range(len(choices)))
    as_text = {i for i, choice in enumerate(choices) if isinstance(named, str) and choice.strip() == named.strip()}
    if len(found | as_text) != 1:
        what = f"the labels {list(names)}" if names else f"{len(choices)} choices"
        raise InputError(f"answer: expected one of {what}, as index, letter or text, found {named!r}")
    return (found | as_text).pop()


SHAPES: dict[str, RecordShape] = {
    "preference": RecordShape(
        read=read_preference,
        columns=lambda columns: ("chosen", columns["prompt"], columns["tools"]),
        is_found=lambda names, columns: "chosen" in names and "rejected" in names,
        others=("rejected",),
    ),
    "sharegpt": RecordShape(
        read=read_sharegpt,
        columns=lambda columns: ("conversations", "system", columns["tools"]),
        is_found=lambda names, columns: "conversations" in names and columns["messages"] not in names,
    ),
    "own": RecordShape(
        read=read_own,
        columns=lambda columns: tuple(columns.values()),
        is_found=lambda names, columns: any(columns[kind] in names for kind in ("text", "prompt", "messages")),
    ),
    "alpaca": RecordShape(
        read=read_alpaca,
        columns=lambda columns: ("instruction", "input", "output", "system", "history"),
        is_found=lambda names, columns: "instruction" in names,
    ),
    "multiple_choice": RecordShape(
        read=read_multiple_choice,
        columns=lambda columns: (
            *(columns["prompt"], *QUESTIONS, columns["choices"], *CHOICES, columns["answer"], *ANSWERS),
        ),
        is_found=lambda names, columns: (
            any(name in names for name in QUESTIONS) and any(name in names for name in (columns["choices"], *CHOICES))
        ),
    ),
    "text": RecordShape(
        read=read_text,
        columns=lambda columns: (columns["text"], columns["choices"]),
        is_found=lambda names, columns: False,
    ),
    "prompt_completion": RecordShape(
        read=read_prompt_completion,
        columns=lambda columns: tuple(columns[kind] for kind in ("prompt", "completion", "choices", "answer", "tools")),
        is_found=lambda names, columns: False,
    ),
    "chat": RecordShape(
        read=read_chat,
        columns=lambda columns: tuple(columns[kind] for kind in ("messages", "tools", "choices", "answer")),
        is_found=lambda names, columns: False,
    ),
}
"""Every shape, by the name of the option `shape`; auto takes the first that it finds in the first records."""


# -------------------------------------------------------------------------------------------- values


def _own_choices(row: Row, columns: Columns) -> tuple[tuple[str, ...], int | None]:
    choices = _parsed(row.get(columns["choices"])) or []
    texts = _choice_texts(choices, columns["choices"])
    answer = row.get(columns["answer"]) if texts else None
    if isinstance(answer, str) and answer.isdecimal() and answer in texts and texts.index(answer) != int(answer):
        raise InputError(f"column {columns['answer']!r}: expected an index, found {answer!r}, which is a choice, too")
    if (isinstance(answer, str) and answer.isdecimal()) or (isinstance(answer, float) and answer.is_integer()):
        answer = int(answer)
    if answer is not None and (type(answer) is not int or not 0 <= answer < len(texts)):
        raise InputError(f"column {columns['answer']!r}: expected an index into {len(texts)} choices, found {answer!r}")
    return tuple(texts), answer


def _choice_texts(choices: Any, column: str) -> list[str]:
    if not isinstance(choices, list) or not all(isinstance(choice, str) and choice for choice in choices):
        raise InputError(f"column {column!r}: expected a list of strings, found {choices!r}")
    for choice in choices:
        check_unicode(choice, column)
    if len(set(choices)) != len(choices):
        raise InputError(f"column {column!r}: expected different choices, found {choices!r}")
    return choices


def _tools(row: Row, columns: Columns) -> list[Any] | None:
    tools = _parsed(row.get(columns["tools"]))
    return _list(tools, columns["tools"]) if tools else None


def _list(value: Any, column: str) -> list[Any]:
    value = _parsed(value)
    if not isinstance(value, list):
        raise InputError(f"column {column!r}: expected a list, found {value!r}")
    return value


def _parsed(value: Any) -> Any:
    """A list or an object that a file without nesting (CSV) holds as JSON."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return without_nulls(json.loads(value))
    except (ValueError, RecursionError) as error:
        raise InputError(f"expected JSON in a cell, found it broken ({error})") from None


def _first(row: Row, names: Sequence[str], what: str) -> str:
    for name in names:
        if row.get(name) is not None:
            return name
    raise InputError(f"expected {what} in one of the columns {list(names)}, found {sorted(row)}")


def _string(row: Row, column: str) -> str:
    if not isinstance(row.get(column), str) or not row[column]:
        raise InputError(f"column {column!r}: expected text, found {row.get(column)!r}")
    return check_unicode(row[column], column)
