"""The messages of a record, made plain: role and content as text, tool calls with their arguments as objects."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.core.types import InputError

Message = dict[str, Any]

TEXT_PARTS = ("text", "input_text", "output_text")  # types of content parts that hold text
SHOWN_CHARACTERS = 60  # of a text in a message


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRules:
    """How chats are rendered and supervised: the options of `ChatConfig` as a value."""

    supervise_all: bool = False
    """All turns of the assistant are supervised, not the last alone."""
    supervise_thoughts: bool = False
    """An empty block of thoughts that the template inserts is supervised like the answer after it."""
    template_options: Mapping[str, Any]
    date: datetime.date
    """What a template that reads the clock is given."""
    role: str = "role"
    content: str = "content"
    """The names of a message's fields."""
    end_token: bool = True
    """A turn ends with the template's end of turn; without it, with its last word."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """The messages of a record, as a chat template expects them."""

    messages: list[Message]
    """Each with role and content as text; tool calls have their arguments as objects."""
    is_trained: list[bool]
    """Whether each message may be supervised: its `weight`, 0 or 1, as in OpenAI's chat format."""


def plain_chat(messages: Any, rules: ChatRules) -> Chat:
    """The messages of a record; InputError where they are none."""
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise InputError("expected messages as a list of {role, content}, found something else")
    weights = [message.get("weight", 1) for message in messages]
    if any(weight not in (0, 1) for weight in weights):
        raise InputError(f"weight of a message: expected 0 or 1, found {weights}")
    return Chat(
        messages=[_plain_message(message, rules) for message in messages],
        is_trained=[bool(weight) for weight in weights],
    )


def _plain_message(message: Message, rules: ChatRules) -> Message:
    """A message with role and content as text, and tool calls whose arguments are objects."""
    others = {name: value for name, value in message.items() if name not in (rules.role, rules.content, "weight")}
    calls = others.get("tool_calls")
    if calls:
        others["tool_calls"] = [_plain_call(call) for call in calls]
    has_content = rules.content in message or bool(calls or others.get("reasoning_content"))
    if not isinstance(message.get(rules.role), str) or not has_content:
        raise InputError(
            f"expected messages as a list of {{{rules.role}, {rules.content}}}, found one with {sorted(message)}; name "
            "their fields with chat.role and chat.content"
        )
    return {"role": message[rules.role], "content": text_content(message.get(rules.content, "")), **others}


def text_content(content: Any) -> str:
    """The content of a message as text: itself, or its parts of text joined."""
    if isinstance(content, str):
        return check_unicode(content, "messages")
    if not isinstance(content, list):
        raise InputError(f"content of a message: expected text or a list of text parts, found {type(content).__name__}")
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind not in TEXT_PARTS or not isinstance(part.get("text"), str):
            raise InputError(f"content of a message: expected parts of text, found {kind!r}: only text can be read")
    return check_unicode("".join(part["text"] for part in content), "messages")


def _plain_call(call: Any) -> Any:
    """A tool call with its arguments as an object: some data sets hold them as a string of JSON."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InputError(f"tool_calls: expected {{function: {{name, arguments}}}}, found {call!r}")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = without_nulls(json.loads(arguments))
        except ValueError:
            raise InputError(f"tool_calls: expected arguments as JSON, found {shown(arguments)}") from None
    plain = {**function, "arguments": arguments}
    return {**call, "function": plain} if "function" in call else plain


def check_unicode(text: str, column: str) -> str:
    """Refuse what is no text: a lone surrogate, which JSON can spell and no tokenizer takes, and NUL."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"column {column!r}: expected text, found a lone surrogate at character {error.start}"
        ) from None
    if "\0" in text:
        raise InputError(f"column {column!r}: expected text, found NUL at character {text.index(chr(0))}")
    return text


def shown(text: str) -> str:
    """A text for a message, cut where it is long."""
    return repr(text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "...")


def without_nulls(value: Any) -> Any:
    """A value without the fields that are null, at any depth: Arrow adds them, JSON may leave them out.

    JSON schemas and arguments lose theirs too: the same record then reads the same from every kind of file.
    """
    if isinstance(value, dict):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value
