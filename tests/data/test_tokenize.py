"""Files -> records -> targets -> windows, against windows computed by hand."""

from __future__ import annotations

import copy
import gzip
import json
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.schema import ColumnsConfig, MalformedPolicy, Targets, TextConfig, TooLongPolicy
from pipeline.core.types import UNKNOWN_TARGET, InputError
from pipeline.data.packing import Segment, collate_inputs, make_sequence, pack
from pipeline.data.records import MalformedRecords, find_shape, read_records
from pipeline.data.text_files import all_records, open_text
from pipeline.data.tokenize import load_labeled_sequences, read_sequences, text_hash
from support.tiny import text_of, write_lines


class Letters:
    """One token a letter: a = 1, b = 2, ...; 90 begins and 99 ends a text."""

    eos_token_id = 99
    chat_template = None

    def __call__(self, texts: list[str] | str, add_special_tokens: bool = True, **_: bool) -> dict[str, Any]:
        if isinstance(texts, str):
            return {"input_ids": self([texts], add_special_tokens)["input_ids"][0]}
        return {"input_ids": [[90] * add_special_tokens + [ord(c) - 96 for c in text] for text in texts]}

    def decode(self, ids: list[int], **_: bool) -> str:
        return "".join(chr(token + 96) for token in ids)


def packed(path: Path, *, window: int = 16, tokenizer: Any = None, **settings: Any) -> list:
    text = text_of(path, **settings)
    malformed = MalformedRecords(skip=text.skip_malformed)
    return list(read_sequences(all_records(text.files), text, tokenizer or Letters(), malformed, window=window))


def targets_of(row: Any) -> list[tuple[int, int]]:
    return list(zip(row.target_positions_N.tolist(), row.target_ids_N.tolist(), strict=True))


# ------------------------------------------------------------------------------- alignment, by hand


def test_text_by_hand(tmp_path: Path) -> None:
    (row,) = packed(write_lines(tmp_path / "a.jsonl", [{"text": "abc"}]))
    assert row.input_ids_S.tolist() == [90, 1, 2, 3, 99]
    assert targets_of(row) == [(0, 1), (1, 2), (2, 3), (3, 99)]  # position s speaks about token s + 1


def test_completion_by_hand_two_segments(tmp_path: Path) -> None:
    rows = [{"prompt": "ab", "completion": "cd"}, {"prompt": "e", "completion": "f"}]
    (row,) = packed(write_lines(tmp_path / "a.jsonl", rows), targets=Targets.completion)
    #                                0  1  2  3  4   5   6  7  8
    assert row.input_ids_S.tolist() == [90, 1, 2, 3, 4, 99, 90, 5, 6, 99]
    assert row.segment_lengths == (6, 4)
    assert row.record_ids == (0, 1)
    assert targets_of(row) == [(2, 3), (3, 4), (4, 99), (7, 6), (8, 99)]


def test_next_by_hand_known_and_unknown(tmp_path: Path) -> None:
    rows = [{"prompt": "ab", "completion": "cd"}, {"prompt": "efg"}]
    (row,) = packed(write_lines(tmp_path / "a.jsonl", rows), targets=Targets.next)
    assert row.input_ids_S.tolist() == [90, 1, 2, 90, 5, 6, 7]  # the completion is not even read
    assert targets_of(row) == [(2, 3), (6, UNKNOWN_TARGET)]


def test_all_targets_of_a_prompt_and_no_end_token(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"prompt": "ab", "completion": "c"}])
    (row,) = packed(path, end_token=False)
    assert row.input_ids_S.tolist() == [90, 1, 2, 3]
    assert targets_of(row) == [(0, 1), (1, 2), (2, 3)]


def test_long_text_is_split_and_every_token_is_a_target_once(tmp_path: Path) -> None:
    letters = "abcdefghijklmnopqrstuvwxyz"
    rows = packed(write_lines(tmp_path / "a.jsonl", [{"text": letters}]), window=10)
    said = sorted(t for row in rows for _, t in targets_of(row))
    assert said == [*range(1, 27), 99]
    for row in rows:
        assert all(row.input_ids_S[s + 1] == t for s, t in targets_of(row))


def test_answer_is_the_completion(tmp_path: Path) -> None:
    rows = [{"prompt": "ab", "choices": ["c", "d"], "answer": 1}]
    (record,) = read_records(text_of(write_lines(tmp_path / "a.jsonl", rows)), Letters())
    assert record.completion == "d"


def test_chat_uses_the_tokenizers_template(tmp_path: Path, tokenizer: Any) -> None:
    chat = [{"role": "user", "content": "weak"}, {"role": "assistant", "content": "strong"}]
    path = write_lines(tmp_path / "a.jsonl", [{"messages": chat}, {"messages": chat[:1]}])
    first, second = read_records(text_of(path), tokenizer)
    assert (first.prompt, first.completion) == ("<user>weak</><assistant>", "strong</>")
    assert (second.prompt, second.completion) == ("<user>weak</><assistant>", None)
    with pytest.raises(InputError, match="expected a tokenizer with a chat template"):
        read_records(text_of(path), Letters())


# ------------------------------------------------------------------------------------------ packing


@settings(deadline=None)
@given(lengths=st.lists(st.integers(2, 20), min_size=1, max_size=120), window=st.integers(20, 50))
def test_packing_loses_and_doubles_nothing(lengths: list[int], window: int) -> None:
    parts = [
        Segment(record_id=i, ids=(i,) * length, targets=tuple((s, i) for s in range(length - 1)))
        for i, length in enumerate(lengths)
    ]
    rows = list(pack(parts, window=window))
    assert sorted(i for row in rows for i in row.record_ids) == list(range(len(lengths)))
    for row in rows:
        assert len(row.input_ids_S) == sum(row.segment_lengths) <= window
        assert row.segment_lengths == tuple(lengths[i] for i in row.record_ids)
        for s, t in targets_of(row):
            assert row.input_ids_S[s] == row.input_ids_S[s + 1] == t


def test_keys_differ_by_content_and_by_targets() -> None:
    def key(*parts: Segment) -> bytes:
        return make_sequence(parts).key

    one = Segment(record_id=0, ids=(1, 2, 3), targets=((0, 2),))
    assert key(one) == key(Segment(record_id=7, ids=(1, 2, 3), targets=((0, 2),)))
    assert len(key(one)) == 16
    others = {
        key(Segment(record_id=0, ids=(1, 2, 4), targets=((0, 2),))),
        key(Segment(record_id=0, ids=(1, 2, 3), targets=((1, 3),))),
        key(Segment(record_id=0, ids=(1,), targets=()), Segment(record_id=0, ids=(2, 3), targets=((-1, 2),))),
    }
    assert key(one) not in others
    assert len(others) == 3


def test_collate_pads_at_the_right_with_a_segment_of_its_own() -> None:
    short = make_sequence([Segment(record_id=0, ids=(5, 6), targets=((0, 6),))])
    long = make_sequence([Segment(record_id=1, ids=(7, 8, 9), targets=((0, 8), (1, 9)))] * 2)
    input_ids_BS, position_ids_BS, flat_N = collate_inputs([short, long])
    assert input_ids_BS.tolist() == [[5, 6, 0, 0, 0, 0], [7, 8, 9, 7, 8, 9]]
    assert position_ids_BS.tolist() == [[0, 1, 0, 1, 2, 3], [0, 1, 2, 0, 1, 2]]
    assert flat_N.tolist() == [0, 6, 7, 9, 10]


# -------------------------------------------------------------------------------------------- files


def test_every_format_reads_the_same(tmp_path: Path) -> None:
    texts = ["abc", "de", "fgh"]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    with pa.output_stream(str(tmp_path / "c.jsonl.zst"), compression="zstd") as stream:
        stream.write(lines)
    pl.DataFrame({"text": texts}).write_parquet(tmp_path / "d.parquet")
    (tmp_path / "e.txt").write_text("abc\n\nde\nfgh")
    found = {path.name: [r.completion for r in read_records(text_of(path), Letters())] for path in tmp_path.iterdir()}
    assert found == dict.fromkeys(("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet", "e.txt"), texts)
    assert len(read_records(text_of(tmp_path), Letters())) == 15  # a folder
    assert len(read_records(text_of(tmp_path / "*.jsonl*"), Letters())) == 9  # a glob
    assert {sum(1 for _ in all_records([tmp_path / name])) for name in found} == {3}


def test_columns_are_options(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"q": "ab", "a": "c"}])
    text = text_of(path, columns=ColumnsConfig(prompt="q", completion="a"))
    (record,) = read_records(text, Letters())
    assert (record.prompt, record.completion) == ("ab", "c")


BAD = {
    "broken JSON": ('{"text": "ab', r"line 2: expected a JSON object, found it broken"),
    "no object": ("[1, 2]", r"line 2: expected a JSON object, found list"),
    "wrong column": ({"body": "ab"}, r"line 2: expected exactly one of the columns .*, found \['body'\].*columns.text"),
    "two kinds": ({"text": "a", "prompt": "b"}, r"expected exactly one of the columns"),
    "not text": ({"text": 7}, r"column 'text': expected text, found 7"),
    "answer outside": (
        {"prompt": "a", "choices": ["b"], "answer": 1},
        r"column 'answer': expected an index into 1 choices, found 1",
    ),
    "same choices": ({"prompt": "a", "choices": ["b", "b"]}, r"expected different choices"),
    "broken chat": ({"messages": [{"role": "user"}]}, r"expected messages as a list of \{role, content\}"),
}


@pytest.mark.parametrize("name", BAD)
def test_malformed_stops_with_place_and_reason_or_is_counted(name: str, tmp_path: Path) -> None:
    bad, message = BAD[name]
    path = write_lines(tmp_path / "a.jsonl", [{"text": "ab"}, bad, {"text": "cd"}])
    with pytest.raises(InputError, match=message):
        read_records(text_of(path), Letters())
    text = text_of(path, malformed=MalformedPolicy.skip)
    assert [record.record_id for record in read_records(text, Letters())] == [0, 2]  # ids do not shift
    assert sum(1 for _ in all_records(text.files)) == 3


LONG = {"prompt": "abcdefgh", "completion": "ijklmnop"}


@pytest.mark.parametrize(
    ("row", "targets", "message"),
    [
        (LONG, Targets.completion, r"line 1: expected at most 16 tokens \(window\), found 18"),
        ({"prompt": "ab"}, Targets.completion, r"line 1: expected a known target, found no completion"),
        ({"text": "ab"}, Targets.next, r"line 1: expected a prompt, because targets=next, found plain text"),
    ],
)
def test_records_that_cannot_become_a_segment(row: Any, targets: Targets, message: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [row])
    with pytest.raises(InputError, match=message):
        packed(path, targets=targets)
    assert packed(path, targets=targets, malformed=MalformedPolicy.skip) == []


def test_gold_without_targets(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "gold.jsonl", [{"prompt": "ab"}])
    text = text_of(path, "gold", targets=Targets.next)
    with pytest.raises(InputError, match=r"gold.jsonl, line 1: expected a known target, found no completion"):
        load_labeled_sequences(text, Letters(), window=16)


def test_damaged_files_and_strange_names(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "abc"}\n' * 999)[:-20])
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no parquet")
    for name in ("a.jsonl.gz", "b.parquet"):
        with pytest.raises(InputError, match=f"{name}: expected a readable file, found it damaged"):
            read_records(text_of(tmp_path / name), Letters())
    (tmp_path / "c.xml").write_text("{}")
    with pytest.raises(InputError, match=r"expected a file ending in \.jsonl, .*, found .*c\.xml"):
        text_of(tmp_path / "c.xml")


def test_a_file_that_two_patterns_name_is_read_once(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": "ab"}])
    text = open_text(TextConfig(files=[str(path), f"{tmp_path}/*.jsonl", str(tmp_path)]), "corpus")
    assert text.files == (path,)


def test_a_tokenizer_without_an_end_token(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": "ab"}])
    endless = Letters()
    endless.eos_token_id = None
    with pytest.raises(InputError, match="expected a tokenizer with an end token, found none; set end_token=false"):
        load_labeled_sequences(text_of(path), endless, window=16)


def test_an_answer_without_choices_is_not_an_index(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"prompt": "ab", "completion": "c", "answer": "c, of course"}])
    assert read_records(text_of(path), Letters())[0].answer is None


def test_a_chat_template_that_refuses(tmp_path: Path, tokenizer: Any) -> None:
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    path = write_lines(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": "weak"}]}])
    with pytest.raises(InputError, match="expected messages that the chat template accepts, found: roles must"):
        read_records(text_of(path), strict)


def test_missing_and_empty(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"corpus: expected '.*nothing.jsonl' to be a file, a folder or a glob"):
        text_of(tmp_path / "nothing.jsonl")
    (tmp_path / "a.xml").write_text("x")
    with pytest.raises(InputError, match=r"expected files ending in \.jsonl, .*, found none"):
        text_of(tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(InputError, match=r"corpus: expected usable records, found none in .*empty.jsonl"):
        load_labeled_sequences(text_of(tmp_path / "empty.jsonl"), Letters(), window=16)


def test_content_hash_ignores_names_and_sees_content(tmp_path: Path) -> None:
    one = text_hash(text_of(write_lines(tmp_path / "a.jsonl", [{"text": "ab"}])))
    same = text_hash(text_of(write_lines(tmp_path / "b.jsonl", [{"text": "ab"}])))
    other = text_hash(text_of(write_lines(tmp_path / "c.jsonl", [{"text": "ac"}])))
    assert one == same != other


# ------------------------------------------------------------------------- prompts longer than the window

LONG = [{"prompt": "abcdefgh", "completion": "ij"}, {"prompt": "a", "completion": "b"}]


def fitted(path: Path, policy: TooLongPolicy | None, **settings: Any) -> tuple[list, MalformedRecords]:
    text = text_of(write_lines(path, LONG), targets=Targets.completion, too_long=policy, **settings)
    malformed = MalformedRecords(skip=text.skip_malformed)
    rows = list(read_sequences(all_records(text.files), text, Letters(), malformed, window=7))
    return rows, malformed


def test_a_prompt_longer_than_the_window_is_cut_at_the_left_if_asked(tmp_path: Path) -> None:
    """The beginning and the completion stay whole, so a window of 7 has room for 3 letters of the prompt."""
    (first, second), malformed = fitted(tmp_path / "a.jsonl", TooLongPolicy.cut_left)
    assert first.input_ids_S.tolist() == [90, 6, 7, 8, 9, 10, 99]
    assert targets_of(first) == [(3, 9), (4, 10), (5, 99)]
    assert second.input_ids_S.tolist() == [90, 1, 2, 99]
    assert malformed.notes == {"a prompt cut at the left to fit the window": 1}


def test_a_prompt_longer_than_the_window_stops_or_is_skipped(tmp_path: Path) -> None:
    (only,), malformed = fitted(tmp_path / "a.jsonl", TooLongPolicy.skip)
    assert only.record_ids == (1,)
    assert malformed.reasons == {"expected at most 7 tokens (window)": 1}
    with pytest.raises(InputError, match=r"line 1: expected at most 7 tokens \(window\), found 12; widen the window"):
        fitted(tmp_path / "a.jsonl", TooLongPolicy.stop, malformed=MalformedPolicy.skip)
    with pytest.raises(InputError, match=r"line 1: expected at most 7 tokens \(window\), found 12; fix the record"):
        fitted(tmp_path / "a.jsonl", None)
    (only,), malformed = fitted(tmp_path / "a.jsonl", None, malformed=MalformedPolicy.skip)
    assert malformed.count == 1


def test_each_window_begins_with_the_beginning_token_if_asked(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": "abcdefgh"}])
    rows = packed(path, window=5, window_begin_token=True)
    assert [row.input_ids_S.tolist() for row in rows] == [[90, 1, 2, 3, 4], [90, 4, 5, 6, 7], [90, 7, 8, 99]]
    said = sorted(t for row in rows for _, t in targets_of(row))
    assert said == [*range(1, 9), 99]  # each token once, and no window predicts the token that it begins with


def test_choices_are_supervised_by_default_where_there_are_any(tmp_path: Path) -> None:
    rows = [{"prompt": "ab", "choices": ["c", "d"], "answer": 1}]
    assert find_shape(text_of(write_lines(tmp_path / "a.jsonl", rows))).targets == "choices"
    assert find_shape(text_of(write_lines(tmp_path / "b.jsonl", [{"prompt": "ab"}]))).targets == "all"
    assert find_shape(text_of(tmp_path / "b.jsonl", choices=["c", "d"])).targets == "choices"
    assert find_shape(text_of(tmp_path / "a.jsonl", targets=Targets.next)).targets == "next"
