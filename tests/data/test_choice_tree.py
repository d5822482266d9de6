"""Choices of several tokens: the nodes of their tree, each supervised once; records and texts that name them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.schema import Targets
from pipeline.core.types import UNKNOWN_TARGET, InputError, TokenSequence
from pipeline.data.choice_tree import choice_segments
from pipeline.data.records import MalformedRecords, read_records
from pipeline.data.text_files import all_records
from pipeline.data.tokenize import load_labeled_sequences, read_sequences
from support.tiny import text_of, write_lines

NONE = UNKNOWN_TARGET
CHOICES = [" one", " two", " tail", " stream", " string"]
"""288; 259 88 80; 259 290 77; 282 263 78; 282 74 79 72."""


def test_segments_by_hand() -> None:
    """Shared prefixes are supervised in the first segment alone; the answer is known along its path."""
    found = list(choice_segments([8, 9], [[1, 2], [1, 3], [4, 5, 6], [4, 5, 7], [4, 8, 6], [3]], answer=4, record_id=7))
    assert [segment.ids for segment in found] == [(8, 9, 1), (8, 9, 4, 5), (8, 9, 4, 8)]
    assert [segment.targets for segment in found] == [((1, 4), (2, NONE)), ((2, 8), (3, NONE)), ((3, 6),)]
    assert [segment.depths for segment in found] == [(0, 1), (1, 2), (2,)]
    assert {segment.record_id for segment in found} == {7}


def test_choices_of_one_token_need_the_prompt_alone() -> None:
    (segment,) = choice_segments([8, 9], [[1], [2], [3]], answer=None, record_id=0)
    assert (segment.ids, segment.targets, segment.depths) == ((8, 9), ((1, NONE),), (0,))
    (segment,) = choice_segments([8, 9], [[1], [2], [3]], answer=2, record_id=0)
    assert segment.targets == ((1, 3),)


def test_a_choice_that_begins_another_is_refused() -> None:
    with pytest.raises(InputError, match="expected choices of which none begins another"):
        list(choice_segments([8], [[1, 2], [1]], answer=None, record_id=0))


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), min_size=1, max_size=8))
def test_every_node_once_and_the_answer_once(paths: list[list[int]]) -> None:
    choices = [[*path, 5 + i] for i, path in enumerate(paths)]  # the last token differs: none begins another
    answer, seen, answered = len(choices) - 1, [], []
    for segment in choice_segments([9, 9, 9], choices, answer=answer, record_id=0):
        for (s, target), depth in zip(segment.targets, segment.depths, strict=True):
            assert s - depth == 2
            seen.append(segment.ids[3 : s + 1])
            answered += [target] if target != NONE else []
    assert sorted(seen) == sorted({tuple(choice[:n]) for choice in choices for n in range(len(choice))})
    assert answered == choices[answer]


# ------------------------------------------------------------------------------------------- records


def packed(path: Path, tokenizer: Any, **settings: Any) -> list[TokenSequence]:
    text = text_of(path, **{"targets": Targets.choices, "end_token": False, **settings})
    malformed = MalformedRecords(skip=False)
    return list(read_sequences(all_records(text.files), text, tokenizer, malformed, window=48))


def test_choices_of_a_text_and_of_a_record(tmp_path: Path, tokenizer: Any) -> None:
    """The record's own choices come first; one-token choices give the very sequence of `targets=next`."""
    path = write_lines(tmp_path / "a.jsonl", [{"prompt": "the"}, {"prompt": "gold", "choices": [" of", " on"]}])
    with pytest.raises(InputError, match=r"line 1: expected choices, because targets=choices, found none"):
        packed(path, tokenizer)
    (row,) = packed(path, tokenizer, choices=[" two", " one"])
    the, gold = (tokenizer(text)["input_ids"] for text in ("the", "gold"))
    assert row.input_ids_S.tolist() == [*the, 259, 88, *gold]
    assert row.depths_N is not None
    assert row.depths_N.tolist() == [0, 1, 2, 0]
    (first,), (second,) = (
        packed(path, tokenizer, choices=[" the", " one"]),
        packed(path, tokenizer, targets=Targets.next),
    )
    assert first.key == second.key
    assert first.depths_N is None


def test_a_choice_ends_as_it_is_scored(tmp_path: Path, tokenizer: Any) -> None:
    """With an end token, whether a choice goes on is a part of it: " t" may begin " two"."""
    path = write_lines(tmp_path / "a.jsonl", [{"prompt": "the", "choices": [" t", " two"]}])
    rows = packed(path, tokenizer, end_token=True)
    assert sum(len(row.target_ids_N) for row in rows) == 4  # nothing, " t", " tw", " two"
    with pytest.raises(InputError, match="none begins another"):
        packed(path, tokenizer)


def test_targets_next_refuses_choices_of_several_tokens(tmp_path: Path, tokenizer: Any) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"prompt": "the", "choices": [" one", " two"]}])
    message = (
        r"line 1: expected choices of one token, found ' two' of 3: \[' t', 'w', 'o'\]; targets=next captures the "
        "first token alone; use targets=choices"
    )
    for end_token in (False, True):
        with pytest.raises(InputError, match=message):
            packed(path, tokenizer, targets=Targets.next, end_token=end_token)
        other = write_lines(tmp_path / "b.jsonl", [{"prompt": "the"}])
        with pytest.raises(InputError, match="targets=next captures"):
            packed(other, tokenizer, targets=Targets.next, choices=CHOICES, end_token=end_token)
        one = {"targets": Targets.next, "choices": [" one", " of"], "end_token": end_token}
        assert len(packed(other, tokenizer, **one)) == 1  # the end token is not counted


def test_the_end_of_a_turn_is_no_part_of_a_label(tmp_path: Path, tokenizer: Any) -> None:
    """In a chat the template ends each choice; with `targets=choices` that end is a part of it, as in scoring."""
    chat = {"messages": [{"role": "user", "content": "the"}]}
    one = write_lines(tmp_path / "a.jsonl", [chat | {"choices": [" one", " of"]}])
    assert len(packed(one, tokenizer, targets=Targets.next)[0].target_ids_N) == 1
    end = tokenizer("</>")["input_ids"]
    assert sum(len(row.target_ids_N) for row in packed(one, tokenizer)) == 1 + 2 * len(end)
    two = write_lines(tmp_path / "b.jsonl", [chat | {"choices": [" one", " two"]}])
    with pytest.raises(InputError, match="found ' two' of 3"):
        packed(two, tokenizer, targets=Targets.next)


def test_an_answer_among_the_choices_of_a_text(tmp_path: Path, tokenizer: Any) -> None:
    """An index, or a completion that is one of them but for spaces."""
    rows = [{"prompt": "a", "answer": 2}, {"prompt": "b", "completion": "two "}, {"prompt": "c"}, {"text": "d"}]
    path = write_lines(tmp_path / "a.jsonl", rows)
    records = read_records(text_of(path, choices=CHOICES), tokenizer)
    assert [record.answer for record in records] == [2, 1, None, None]
    assert [record.completion for record in records] == [" tail", "two ", None, "d"]
    assert [len(record.choices) for record in records] == [5, 5, 5, 0]
    wrong = write_lines(tmp_path / "b.jsonl", [{"prompt": "a", "completion": " three"}])
    with pytest.raises(InputError, match=r"line 1: expected a completion that is one of the choices"):
        read_records(text_of(wrong, choices=CHOICES), tokenizer)
    gold = text_of(path, "gold", choices=CHOICES, targets=Targets.choices)
    with pytest.raises(InputError, match="line 3: expected a known target, found choices without an answer"):
        load_labeled_sequences(gold, tokenizer, window=48)


@pytest.mark.parametrize("choices", [[], [" a"], [" a", "a"], [" a", " "]])
def test_choices_that_cannot_be_told_apart_are_refused(tmp_path: Path, choices: list[str]) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"prompt": "the"}])
    with pytest.raises(InputError, match="corpus.choices: expected two or more completions that differ"):
        text_of(path, choices=choices)
