"""Chats: which part of what a template writes is supervised, and what is refused instead of lost."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.schema import ChatConfig, Supervise, Targets
from pipeline.core.types import InputError, Record
from pipeline.data.records import MalformedRecords, read_records
from pipeline.data.text_files import all_records
from pipeline.data.tokenize import read_sequences
from support.tiny import make_tokenizer, text_of, write_lines

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    # as Qwen3: an empty block of thoughts before the last answer only
    "{% if m.role == 'assistant' and loop.last and not m.content.startswith('<think>') %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content }}"
    "{% for call in m.tool_calls %}{{ '<call>' + (call.function | tojson) }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
THOUGHTS = "<think>\n\n</think>\n\n"


def chatml(template: str = CHATML) -> Any:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


def turns(*contents: Any, **last: Any) -> list[dict[str, Any]]:
    roles = ["user", "assistant"] * len(contents)
    chat = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    chat[-1] |= last
    return chat


def record(tmp_path: Path, row: Any, tokenizer: Any = None, end_token: bool = True, **chat: Any) -> Record:
    path = write_lines(tmp_path / "a.jsonl", [row if isinstance(row, dict) else {"messages": row}])
    text = text_of(path, targets=Targets.completion, end_token=end_token, chat=ChatConfig(**chat))
    (found,) = read_records(text, tokenizer or chatml())
    return found


def supervised(tmp_path: Path, row: Any, tokenizer: Any = None, **chat: Any) -> list[str]:
    """The supervised text, cut where the positions are not consecutive."""
    tokenizer = tokenizer or chatml()
    path = write_lines(tmp_path / "a.jsonl", [row if isinstance(row, dict) else {"messages": row}])
    text = text_of(path, targets=Targets.completion, chat=ChatConfig(**chat))
    malformed = MalformedRecords(skip=False)
    (sequence,) = read_sequences(all_records(text.files), text, tokenizer, malformed, window=256)
    parts: list[list[int]] = []
    last = None
    for position, target in zip(sequence.target_positions_N.tolist(), sequence.target_ids_N.tolist(), strict=True):
        assert sequence.input_ids_S[position + 1] == target if position + 1 < len(sequence.input_ids_S) else True
        if last is None or position != last + 1:
            parts.append([])
        parts[-1].append(target)
        last = position
    return [tokenizer.decode(part) for part in parts]


# ---------------------------------------------------------------------------- what is supervised


def test_a_turn_ends_with_its_end_and_without_what_the_template_inserts(tmp_path: Path) -> None:
    found = record(tmp_path, turns("the weak", "a shard"))
    assert found.prompt == f"<|im_start|>user\nthe weak<|im_end|>\n<|im_start|>assistant\n{THOUGHTS}"
    assert found.completion == "a shard<|im_end|>"
    assert record(tmp_path, turns("the weak", "a shard"), end_token=False).completion == "a shard"


def test_thoughts_are_supervised_if_asked_or_if_the_record_has_them(tmp_path: Path) -> None:
    asked = record(tmp_path, turns("the weak", "a shard"), supervise_thoughts=True)
    assert asked.completion == f"{THOUGHTS}a shard<|im_end|>"
    own = "<think>\nhm\n</think>\n\na shard"
    assert record(tmp_path, turns("the weak", own)).completion == f"{own}<|im_end|>"
    off = record(tmp_path, turns("the weak", "a shard"), template_options={"enable_thinking": False})
    assert (off.prompt or "").endswith(f"assistant\n{THOUGHTS}")
    assert off.completion == "a shard<|im_end|>"


def test_all_turns_or_the_last(tmp_path: Path) -> None:
    chat = turns("the weak", "a shard", "gold", "one")
    assert supervised(tmp_path, chat) == ["one<|im_end|>"]
    assert supervised(tmp_path, chat, supervise=Supervise.all_turns) == ["a shard<|im_end|>", "one<|im_end|>"]


@pytest.mark.parametrize("first", ["a", "ta", "No"])
def test_a_short_turn_is_found_at_its_own_place(first: str, tmp_path: Path) -> None:
    """Not where the letters of the next <|im_start|> happen to stand, as far behind as empty thoughts are long."""
    chat = turns("Q", first, "Q", "b")
    assert supervised(tmp_path, chat, supervise=Supervise.all_turns) == [f"{first}<|im_end|>", "b<|im_end|>"]


def test_weight_0_is_not_supervised(tmp_path: Path) -> None:
    chat = turns("the weak", "a shard", "gold", "one")
    chat[1]["weight"] = 0
    assert supervised(tmp_path, chat, supervise=Supervise.all_turns) == ["one<|im_end|>"]
    chat[1]["weight"], chat[3]["weight"] = 1, 0
    assert supervised(tmp_path, chat, supervise=Supervise.all_turns) == ["a shard<|im_end|>"]
    with pytest.raises(InputError, match="expected a turn of the assistant to supervise, found none"):
        record(tmp_path, chat)
    chat[3]["weight"] = 0.5
    with pytest.raises(InputError, match=r"weight of a message: expected 0 or 1, found \[1, 1, 1, 0.5\]"):
        record(tmp_path, chat)


def test_choices_are_written_as_turns(tmp_path: Path) -> None:
    row = {"messages": turns("the weak"), "choices": ["one", "two"], "answer": 1}
    found = record(tmp_path, row)
    assert found.choices == ("one", "two")
    assert found.choice_turns == ("one<|im_end|>", "two<|im_end|>")
    assert found.completion == "two<|im_end|>"
    assert (found.prompt or "").endswith(THOUGHTS)


# ------------------------------------------------------------------------------- what messages hold


def test_content_in_parts_and_none_beside_tool_calls(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "weak"}]
    assert record(tmp_path, turns(parts, "one")) == record(tmp_path, turns("the weak", "one"))
    for arguments in ({"city": "Oslo"}, '{"city": "Oslo"}'):
        call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
        found = record(tmp_path, turns("the weak", None, tool_calls=[call]))
        assert found.completion == '<call>{"name": "weather", "arguments": {"city": "Oslo"}}<|im_end|>'


def test_other_names_of_role_and_content(tmp_path: Path) -> None:
    chat = [{"speaker": "user", "says": "a"}, {"speaker": "assistant", "says": "b"}]
    found = record(tmp_path, chat, role="speaker", content="says")
    assert found == record(tmp_path, turns("a", "b"))


def test_tools_reach_the_template(tmp_path: Path) -> None:
    template = "{% for t in tools %}{{ t.name }};{% endfor %}" + CHATML
    row = {"messages": turns("a", "b"), "tools": [{"name": "weather"}]}
    assert (record(tmp_path, row, chatml(template)).prompt or "").startswith("weather;")
    with pytest.raises(InputError, match="expected a chat template that writes tools, found one that does not"):
        record(tmp_path, row)


def test_the_clock_stands_still(tmp_path: Path) -> None:
    tokenizer = chatml("{{ strftime_now('%d %b %Y') }}" + CHATML)
    assert (record(tmp_path, turns("a", "b"), tokenizer).prompt or "").startswith("26 Jul 2024")
    dated = record(tmp_path, turns("a", "b"), tokenizer, date="2025-01-02")
    assert (dated.prompt or "").startswith("02 Jan 2025")
    assert datetime.date.today().isoformat() > "2025-01-02"
    computed = chatml("{% set f = '%d' %}{{ strftime_now(f) }}" + CHATML)
    with pytest.raises(InputError, match="expected a chat template that writes the date in a fixed format"):
        record(tmp_path, turns("a", "b"), computed)
    with pytest.raises(InputError, match=r"corpus.chat.date: expected a date as 2024-07-26, found 'today'"):
        record(tmp_path, turns("a", "b"), tokenizer, date="today")


# ---------------------------------------------------------------------------------- what is refused

IMAGE = [{"type": "image_url", "image_url": {"url": "x"}}, {"type": "text", "text": "a"}]
NO_SYSTEM = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
REWRITES = CHATML.replace("{{ m.content }}", "{{ m.content if loop.last else m.content | upper }}")
REFUSED: dict[str, tuple[Any, str, dict[str, Any], str]] = {
    "an image": (turns(IMAGE, "b"), CHATML, {}, r"expected parts of text, found 'image_url': only text can be read"),
    "no content": (
        [*turns("a"), {"role": "assistant"}],
        CHATML,
        {},
        r"expected messages as a list of \{role, content\}",
    ),
    "arguments that are no JSON": (
        turns("a", "", tool_calls=[{"function": {"name": "f", "arguments": "{"}}]),
        CHATML,
        {},
        r"tool_calls: expected arguments as JSON, found '\{'",
    ),
    "an option that nobody reads": (
        turns("a", "b"),
        CHATML,
        {"template_options": {"thinking": False}},
        r"chat.template_options: expected names that the chat template reads, found \['thinking'\]",
    ),
    "a system prompt left out": (
        [{"role": "system", "content": "be kind"}, *turns("a", "b")],
        NO_SYSTEM,
        {},
        r"expected a chat template that writes every message, found the system's 'be kind' left out",
    ),
    "a role that the template does not know": (
        [{"role": "human", "content": "be kind"}, {"role": "assistant", "content": "b"}],
        CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role in ('user', 'assistant') %}"),
        {},
        r"expected a chat template that writes every message, found the human's 'be kind' left out",
    ),
    "what a tool returned left out": (
        [*turns("a"), {"role": "tool", "content": "42"}, {"role": "assistant", "content": "c"}],
        CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role in ('user', 'assistant') %}"),
        {},
        r"expected a chat template that writes every message, found the tool's '42' left out",
    ),
    "calls of tools left out": (
        turns("a", "", tool_calls=[{"function": {"name": "weather", "arguments": {}}}]),
        CHATML.replace("m.tool_calls", "(m.tool_calls if m.content is none else [])"),
        {},
        r"expected a chat template that writes the whole answer, found 'weather' left out",
    ),
    "thoughts left out": (
        turns("a", "b", reasoning_content="hm"),
        CHATML,
        {},
        r"expected a chat template that writes the whole answer, found 'hm' left out",
    ),
    "a surrogate in a call": (
        turns("a", "", tool_calls=[{"function": {"name": "f", "arguments": {"a": "\ud800"}}}]),
        CHATML,
        {},
        r"column 'messages': expected text, found a lone surrogate",
    ),
    "an earlier turn rewritten": (
        [{"role": "system", "content": "A"}, *turns("Q", "ab", "C", "d")],
        REWRITES,
        {"supervise": Supervise.all_turns},
        r"expected a chat template that writes earlier turns as it writes the last, found turn 3 .* rewritten",
    ),
    "a prompt rewritten by its answer": (
        turns("A", "b"),
        CHATML.replace("{% if add_generation_prompt %}", "{% if add_generation_prompt %}!"),
        {},
        r"expected the chat template to extend the prompt by the answer, found it rewritten: .* became ",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_lost_is_refused(name: str, tmp_path: Path) -> None:
    chat, template, rules, message = REFUSED[name]
    with pytest.raises(InputError, match=message):
        record(tmp_path, chat, chatml(template), **rules)
