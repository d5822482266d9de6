"""Shapes of records: what a row of each public shape says, what is found by itself, and what is refused."""

from __future__ import annotations

import csv
import gzip
import io
import json
import logging
import lzma
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.schema import MalformedPolicy, Targets, TextShape
from pipeline.core.types import InputError, Record
from pipeline.data.records import MalformedRecords, find_shape, parse_records, read_records
from pipeline.data.text_files import all_records
from pipeline.data.tokenize import read_sequences
from support.tiny import make_tokenizer, text_of, write_lines

TOKENIZER = make_tokenizer()
Q = "Question: q?\nAnswer:"
ARC = {"text": ["salt", "sand"], "label": ["1", "2"]}

# name of the shape -> rows of that shape, and of each the prompt and completion that it says
SHAPES: dict[str, list[tuple[dict[str, Any], str | None, str | None]]] = {
    "text": [({"text": "ab"}, None, "ab")],
    "prompt_completion": [
        ({"prompt": "a", "completion": " b"}, "a", " b"),
        ({"prompt": "a", "choices": [" b", " c"], "answer": 1}, "a", " c"),
        ({"prompt": "a"}, "a", None),
    ],
    "chat": [
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            "<user>a</><assistant>",
            "b</>",
        ),
    ],
    "alpaca": [
        ({"instruction": "add", "input": "1 2", "output": "3"}, "<user>add\n1 2</><assistant>", "3</>"),
        ({"instruction": "add", "input": "", "output": "3"}, "<user>add</><assistant>", "3</>"),
        (
            {"instruction": "b", "output": "c", "system": "s", "history": [["q", "a"]]},
            "<system>s</><user>q</><assistant>a</><user>b</><assistant>",
            "c</>",
        ),
    ],
    "sharegpt": [
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            "<user>a</><assistant>",
            "b</>",
        ),
        (
            {"system": "s", "conversations": [{"from": "human", "value": "a"}]},
            "<system>s</><user>a</><assistant>",
            None,
        ),
    ],
    "preference": [
        ({"prompt": "a", "chosen": " b", "rejected": " c"}, "a", " b"),
        (
            {
                "chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
                "rejected": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "c"}],
            },
            "<user>a</><assistant>",
            "b</>",
        ),
        (
            {"prompt": [{"role": "user", "content": "a"}], "chosen": "b", "rejected": "c"},
            "<user>a</><assistant>",
            "b</>",
        ),
        ({"chosen": "Human: a\n\nAssistant: b", "rejected": "x"}, None, "Human: a\n\nAssistant: b"),
    ],
    "multiple_choice": [
        ({"question": "q?", "choices": ARC, "answerKey": "2"}, Q, " sand"),
        ({"question": "q?", "choices": {"text": ["2", "1"], "label": ["1", "2"]}, "answerKey": "1"}, Q, " 2"),
        ({"ctx": "He", "endings": ["runs.", "is."], "label": "1"}, "He", " is."),
        ({"ctx": "He", "endings": ["runs.", "is."], "label": ""}, "He", None),
        ({"question": "q?", "choices": ["salt", "sand"], "answer": "B"}, Q, " sand"),
        ({"question": "q?", "choices": ["salt", "sand"], "answer": 0}, Q, " salt"),
        ({"question": "q?", "choices": ["salt", "sand"], "answer": 1.0}, Q, " sand"),
        ({"question": "q?", "choices": ["salt", "sand"], "answer": "sand"}, Q, " sand"),
    ],
}
FOUND = {name: "own" if name in ("text", "prompt_completion", "chat") else name for name in SHAPES}


def records(path: Path, **settings: Any) -> list[Record]:
    return read_records(text_of(path, **settings), TOKENIZER)


@pytest.mark.parametrize("name", SHAPES)
def test_a_row_says_the_same_named_or_found(name: str, tmp_path: Path) -> None:
    for number, (row, prompt, completion) in enumerate(SHAPES[name]):
        path = write_lines(tmp_path / f"{number}.jsonl", [row])
        assert find_shape(text_of(path)).shape == FOUND[name]
        for settings in ({}, {"shape": TextShape[name]}):
            (record,) = records(path, **settings)
            assert (record.prompt, record.completion) == (prompt, completion)


def test_what_nobody_reads_is_said_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    row = {"instruction": "a", "output": "b", "id": 1, "source": "web"}
    with caplog.at_level(logging.INFO):
        records(write_lines(tmp_path / "a.jsonl", [row]))
    assert "corpus: shape=alpaca; columns that are not read: id, source" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        records(write_lines(tmp_path / "b.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}]))
    assert "corpus: shape=preference\n" in caplog.text + "\n"


# ------------------------------------------------------------------------------------- kinds of files


def packed_bytes(data: bytes, compression: str) -> bytes:
    if compression == ".zst":
        return pa.compress(data, "zstd", asbytes=True)
    return {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}[compression](data)


def table_of(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows)


def written(rows: list[dict[str, Any]], kind: str) -> bytes:
    out = io.BytesIO()
    if kind == ".jsonl":
        out.write("".join(json.dumps(row) + "\r\n" for row in rows).encode("utf-8-sig"))
    elif kind == ".json":
        out.write(json.dumps(rows, indent=1, ensure_ascii=False).encode())
    elif kind == ".parquet":
        pq.write_table(table_of(rows), out)
    elif kind == ".arrow":
        table = table_of(rows)
        with pa.ipc.new_stream(out, table.schema) as stream:
            stream.write_table(table)
    else:
        text = io.StringIO()
        names = list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.DictWriter(text, names, delimiter="," if kind == ".csv" else "\t")
        writer.writeheader()
        writer.writerows({k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in rows)
        out.write(text.getvalue().encode())
    return out.getvalue()


KINDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")


@pytest.mark.parametrize("compression", ["", ".gz", ".zst", ".xz"])
@pytest.mark.parametrize("name", SHAPES)
def test_the_same_records_are_the_same_sequences_from_every_kind_of_file(
    name: str, compression: str, tmp_path: Path
) -> None:
    """Arrow adds nulls where a row lacks a field, CSV has only text: neither changes a token."""
    first = [(column, type(value)) for column, value in SHAPES[name][0][0].items()]
    rows = [row for row, _, _ in SHAPES[name] if [(column, type(value)) for column, value in row.items()] == first]
    keys = {}
    for kind in KINDS:
        path = tmp_path / f"a{kind}{compression}"
        path.write_bytes(packed_bytes(written(rows, kind), compression))
        text = find_shape(text_of(path, targets=Targets.all))
        raw, malformed = all_records(text.files, text.read_columns), MalformedRecords(skip=False)
        keys[kind] = [s.key for s in read_sequences(raw, text, TOKENIZER, malformed, window=64)]
    assert len(keys[".jsonl"]) > 0
    assert all(found == keys[".jsonl"] for found in keys.values()), keys


# ---------------------------------------------------------------------------------- what is refused


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "two of ours": ({"text": "a", "prompt": "b"}, r"expected exactly one of the columns .* or set shape"),
    "sharegpt with another role": (
        {"conversations": [{"from": "narrator", "value": "a"}]},
        r"conversations: expected 'from' to be one of .*, found \['narrator'\]",
    ),
    "sharegpt without a value": (
        {"conversations": [{"from": "human", "text": "a"}, {"from": "gpt", "value": "b"}]},
        r"expected messages as a list of \{role, content\}, found one with \['role', 'text'\]",
    ),
    "a preference of strings in lists": (
        {"prompt": "a", "chosen": ["b"], "rejected": ["c"]},
        r"expected messages as a list of \{role, content\}, found something else",
    ),
    "history that is none": (
        {"instruction": "a", "output": "b", "history": [["q"]]},
        r"column 'history': expected \[question, answer\] pairs, found \['q'\]",
    ),
    "a number as text": ({"instruction": 5, "output": "b"}, r"column 'instruction': expected text, found 5"),
    "empty text": ({"instruction": "a", "output": ""}, r"column 'output': expected text, found ''"),
    "NUL": ({"instruction": "a\0", "output": "b"}, r"column 'instruction': expected text, found NUL at character 1"),
    "an answer beyond the choices": (
        {"question": "q", "choices": ["a", "b"], "answer": 2},
        r"answer: expected one of 2 choices, as index, letter or text, found 2",
    ),
    "an answer that is a digit and a choice": (
        {"question": "q", "choices": ["2", "1", "3"], "answer": "1.5"},
        r"answer: expected one of 3 choices, as index, letter or text, found '1.5'",
    ),
    "an answer that means two choices": (
        {"question": "q", "choices": ["1", "2", "3"], "answer": "1"},
        r"answer: expected one of 3 choices, as index, letter or text, found '1'",
    ),
    "an answer that is no label": (
        {"question": "q", "choices": ARC, "answerKey": "A"},
        r"answer: expected one of the labels \['1', '2'\]",
    ),
    "a cell of broken JSON": ({"conversations": '[{"from"'}, r"expected JSON in a cell, found it broken"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_with_its_place_or_counted(name: str, tmp_path: Path) -> None:
    bad, message = REFUSED[name]
    path = write_lines(tmp_path / "a.jsonl", [bad])
    with pytest.raises(InputError, match=rf"a.jsonl, line 1: {message}"):
        records(path)
    malformed, text = MalformedRecords(skip=True), text_of(path, malformed=MalformedPolicy.skip)
    assert list(parse_records(all_records([path]), text, TOKENIZER, malformed)) == []
    assert malformed.count == 1
    assert ", found" not in next(iter(malformed.reasons))


def test_skipped_records_are_counted_by_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"text": "ab"}, {"text": 3}, {"text": 4}, '{"text": "\\ud800"}', "{"]
    text = text_of(write_lines(tmp_path / "a.jsonl", rows), malformed=MalformedPolicy.skip)
    with caplog.at_level(logging.WARNING):
        assert len(read_records(text, TOKENIZER)) == 1
    assert "corpus: 4 malformed records skipped: 3 x column 'text': expected text; 1 x expected a JSON" in caplog.text


def test_choices_of_the_text_reach_every_shape(tmp_path: Path) -> None:
    rows = {
        "alpaca": {"instruction": "a", "output": "two"},
        "sharegpt": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "two"}]},
        "chat": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "two"}]},
        "parts": {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": [{"type": "text", "text": "two"}]},
            ]
        },
        "prompt": {"prompt": "a", "completion": " two"},
    }
    for name, row in rows.items():
        (record,) = records(write_lines(tmp_path / f"{name}.jsonl", [row]), choices=["one", "two"])
        assert (record.choices, record.answer) == (("one", "two"), 1)
        (unlabeled,) = records(write_lines(tmp_path / "b.jsonl", [{"instruction": "a"}]), choices=["one", "two"])
        assert (unlabeled.choices, unlabeled.answer, unlabeled.completion) == (("one", "two"), None, None)
