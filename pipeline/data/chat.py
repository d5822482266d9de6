"""Chats -> prompt and completion as the tokenizer's chat template writes them, and which turns are supervised."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.core.types import InputError
from pipeline.data.messages import Chat, ChatRules, Message, check_unicode, shown

CLOCK = re.compile(r"""strftime_now\s*\(\s*(["'])(.*?)\1\s*\)""")  # a call in a template, with its format
# what a template writes before an answer that has no thoughts (Qwen3, SmolLM3, DeepSeek)
EMPTY_THOUGHTS = re.compile(r"\s*<think>\s*</think>\s*")


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderedChat:
    """A chat as text."""

    prompt: str
    completion: str | None
    """The last supervised turn of the assistant; None where the chat ends with another role."""
    prompt_spans: tuple[tuple[int, int], ...] = ()
    """The characters of earlier supervised turns, as (start, end) in the prompt."""
    choices: tuple[str, ...] = ()
    """Each choice as a turn."""
    is_trimmed: bool = False
    """Whether something that the template wrote beside the turn is not supervised."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRenderer:
    """A tokenizer's chat template with the rules of a text."""

    tokenizer: Any
    rules: ChatRules
    specials: re.Pattern[str]
    """One special token."""
    final_specials: re.Pattern[str]
    """The special tokens at the end of a text, with the whitespace between and after them."""

    def render(self, messages: Sequence[Message], tools: Any, *, add_generation_prompt: bool) -> str:
        """The template's text; InputError where the template refuses the messages."""
        dated = None
        if reads_clock(self.tokenizer):
            dated = with_date(self.tokenizer.get_chat_template(tools=tools), self.rules.date)
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages),
                chat_template=dated,
                tools=tools,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self.rules.template_options,
            )
        except Exception as error:  # a template is a program, which may raise anything
            raise InputError(f"expected messages that the chat template accepts, found: {error}") from None
        return check_unicode(str(text), "messages")


def open_renderer(tokenizer: Any, rules: ChatRules) -> ChatRenderer:
    """InputError where the tokenizer has no template, or options that its template does not read."""
    template = template_text(tokenizer)
    if not template:
        raise InputError("expected a tokenizer with a chat template, because records hold messages, found none")
    unread = [name for name in rules.template_options if not re.search(rf"\b{re.escape(name)}\b", template)]
    if unread:
        raise InputError(
            f"chat.template_options: expected names that the chat template reads, found {unread}; correct them"
        )
    tokens = getattr(tokenizer, "added_tokens_decoder", {}).values()
    # the longest first, so that no token is taken for the beginning of another
    names = sorted((token.content for token in tokens if token.special), key=len, reverse=True)
    one = "|".join(map(re.escape, names)) or r"(?!)"
    return ChatRenderer(
        tokenizer=tokenizer,
        rules=rules,
        specials=re.compile(one),
        final_specials=re.compile(rf"(?:{one})(?:\s*(?:{one}))*\s*\Z"),
    )


def template_text(tokenizer: Any) -> str:
    """The chat template of a tokenizer; of several, all."""
    template = tokenizer.chat_template
    return "\n".join(template.values()) if isinstance(template, dict) else template or ""


def reads_clock(tokenizer: Any) -> bool:
    """Whether the chat template writes the date of today, unless it is given another."""
    return "strftime_now" in template_text(tokenizer)


def with_date(template: str, date: datetime.date) -> str:
    """The template with a fixed date wherever it asks the clock; InputError where it does so by a computed format."""
    dated = CLOCK.sub(lambda call: repr(date.strftime(call[2])), template)
    if re.search(r"strftime_now\s*\(", dated):
        raise InputError("expected a chat template that writes the date in a fixed format, found a computed one")
    return dated


# ---------------------------------------------------------------------------------------- one record


def render_chat(
    renderer: ChatRenderer, messages: Chat, *, tools: Any = None, choices: Sequence[str] = ()
) -> RenderedChat:
    """Render a chat; InputError where the template loses a part of it, or writes the prompt otherwise with an answer.

    A turn of the assistant is supervised from where the template asks for it (the generation prompt) to the end of
    turn, included. What the template writes after that (a line break) is not, nor is an empty block of thoughts.
    """
    chat = messages.messages
    _check_template_reads(renderer, chat, tools)
    last = chat[-1]
    if last["role"] != "assistant":
        prompt = renderer.render(chat, tools, add_generation_prompt=True)
        _check_complete(prompt, chat)
        answers = [[*chat, {"role": "assistant", "content": choice}] for choice in choices]
        turns = [_last_turn(renderer, answer, tools) for answer in answers]
        return RenderedChat(
            prompt=turns[0][0] if turns else prompt,
            completion=None,
            choices=tuple(turn for _, turn, _ in turns),
            is_trimmed=bool(turns),
        )
    supervised = [i for i, message in enumerate(chat) if message["role"] == "assistant" and messages.is_trained[i]]
    if not renderer.rules.supervise_all:
        supervised = [i for i in supervised if i == len(chat) - 1]
    if not supervised:
        raise InputError("expected a turn of the assistant to supervise, found none (weight 0)")
    chat = chat[: supervised[-1] + 1]
    prompt, completion, is_trimmed = _last_turn(renderer, chat, tools)
    _check_complete(prompt, chat[:-1])
    _check_answer(prompt + completion, chat[-1])
    spans = [_earlier_turn(renderer, chat, turn, tools, prompt) for turn in supervised[:-1]]
    return RenderedChat(prompt=prompt, completion=completion, prompt_spans=tuple(spans), is_trimmed=is_trimmed)


def _last_turn(renderer: ChatRenderer, chat: Sequence[Message], tools: Any) -> tuple[str, str, bool]:
    """The prompt, the last turn with its end, and whether anything that the template wrote was left out of the turn."""
    prompt, body, end = _turn(renderer, chat, tools)
    thoughts = _inserted_thoughts(renderer, chat[-1], body)
    mark = renderer.specials.match(end)
    end_mark = mark[0] if mark and renderer.rules.end_token else ""
    # without a special token nothing tells the end of turn from what follows it: all of it stays
    kept_end = end_mark if mark else end
    return prompt + thoughts, body[len(thoughts) :] + kept_end, bool(thoughts) or kept_end != end


def _earlier_turn(renderer: ChatRenderer, chat: Sequence[Message], turn: int, tools: Any, text: str) -> tuple[int, int]:
    """Where a turn before the last one stands in the text of the prompt, with its end."""
    before, body, _ = _turn(renderer, chat[: turn + 1], tools)
    thoughts = _inserted_thoughts(renderer, chat[turn], body)
    # templates leave the empty thoughts out of earlier turns, and some (gpt-oss) end these with another token
    for skipped in dict.fromkeys((thoughts, "")):
        for start in (len(before) + len(skipped), len(before)):
            is_skipped = start == len(before) or text.startswith(skipped, len(before))
            if text.startswith(before) and is_skipped and text.startswith(body[len(skipped) :], start):
                stop = start + len(body) - len(skipped)
                mark = renderer.specials.match(text, stop)
                return start, stop + (len(mark[0]) if mark and renderer.rules.end_token else 0)
    raise InputError(
        f"expected a chat template that writes earlier turns as it writes the last, found turn {turn + 1} "
        f"({shown(body)}) rewritten; use chat.supervise=last"
    )


def _turn(renderer: ChatRenderer, chat: Sequence[Message], tools: Any) -> tuple[str, str, str]:
    """Of a chat that ends with the assistant: the prompt, the turn without its end, and the special tokens after it."""
    prompt = renderer.render(chat[:-1], tools, add_generation_prompt=True)
    text = renderer.render(chat, tools, add_generation_prompt=False)
    if not text.startswith(prompt):
        same = next((i for i, (a, b) in enumerate(zip(text, prompt, strict=False)) if a != b), len(text))
        raise InputError(
            "expected the chat template to extend the prompt by the answer, found it rewritten: "
            f"{shown(prompt[max(same - 20, 0) :])} became {shown(text[max(same - 20, 0) :])}; templates with "
            "thoughts often need chat.template_options={enable_thinking: false}, with a + before it on a command line"
        )
    tail = text[len(prompt) :]
    end = renderer.final_specials.search(tail)
    if end is not None and not tail[: end.start()].strip() and len(renderer.specials.findall(end[0])) > 1:
        raise InputError("expected an answer, found an empty one, whose end cannot be told from its beginning")
    if end is None:
        return prompt, tail, ""
    body = tail[: end.start()]
    return prompt, body, end[0]


def _inserted_thoughts(renderer: ChatRenderer, message: Message, body: str) -> str:
    """The empty block of thoughts that the template has put before an answer, or nothing."""
    has_own = "<think>" in message["content"] or bool(message.get("reasoning_content"))
    found = None if renderer.rules.supervise_thoughts or has_own else EMPTY_THOUGHTS.match(body)
    return found[0] if found else ""


# -------------------------------------------------------------------------------------------- checks


def _check_template_reads(renderer: ChatRenderer, chat: Sequence[Message], tools: Any) -> None:
    """A template without tools would leave them out silently."""
    template = template_text(renderer.tokenizer)
    holds = {"tools": bool(tools), "tool_calls": any(message.get("tool_calls") for message in chat)}
    for name, is_present in holds.items():
        if is_present and name not in template:
            raise InputError(f"expected a chat template that writes {name}, found one that does not read them")


def _check_complete(prompt: str, chat: Sequence[Message]) -> None:
    """Some templates leave out roles that they do not know; an assistant's earlier thoughts they may leave out."""
    for message in chat:
        # what a tool returned is often written as JSON
        spelled = (message["content"], json.dumps(message["content"])[1:-1])
        if message["role"] != "assistant" and not any(content.strip() in prompt for content in spelled):
            raise InputError(
                f"expected a chat template that writes every message, found the {message['role']}'s "
                f"{shown(message['content'])} left out or changed"
            )


def _check_answer(text: str, answer: Message) -> None:
    """Some templates leave out thoughts, or the calls of tools beside a content."""
    calls = [call.get("function", call) for call in answer.get("tool_calls") or []]
    parts = [*re.split(r"</?think>", answer["content"]), answer.get("reasoning_content") or ""]
    for part in (*parts, *(call["name"] for call in calls)):
        if part.strip() not in text:
            raise InputError(
                f"expected a chat template that writes the whole answer, found {shown(part.strip())} left out"
            )
