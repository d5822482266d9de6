"""Files as people have them: odd names, odd encodings, columns that nobody reads; each record is read or refused."""

from __future__ import annotations

import gzip
import json
import os
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.schema import MalformedPolicy
from pipeline.core.types import InputError
from pipeline.data.records import read_records
from pipeline.data.text_files import all_records, read_chunks
from support.tiny import text_of, write_lines


def completions(path: Path, **settings: Any) -> list[str | None]:
    return [record.completion for record in read_records(text_of(path, **settings), None)]


# ---------------------------------------------------------------------------------------- which files


def test_a_folder_whose_name_looks_like_a_glob(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "data[v2]" / "a.jsonl", [{"text": "ab"}])
    assert completions(path) == completions(path.parent) == ["ab"]


def test_hidden_files_of_a_folder_are_left_out(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [{"text": "ab"}])
    write_lines(tmp_path / ".ipynb_checkpoints" / "a.jsonl", [{"text": "old"}])
    write_lines(tmp_path / "._a.jsonl", ["\x00\x05\x16\x07"])
    assert completions(tmp_path) == ["ab"]
    assert completions(tmp_path / ".ipynb_checkpoints") == ["old"]  # asked for by name


def test_a_file_with_two_names_is_read_once(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": "ab"}])
    (tmp_path / "b.jsonl").symlink_to(path)
    assert completions(tmp_path) == ["ab"]


@pytest.mark.parametrize("name", ["A.JSONL", "a.ndjson", "a.ndjson.gz", "a.Jsonl.GZ"])
def test_other_spellings_of_a_suffix(name: str, tmp_path: Path) -> None:
    content = b'{"text": "ab"}\n'
    (tmp_path / name).write_bytes(gzip.compress(content) if name.lower().endswith("gz") else content)
    assert completions(tmp_path / name) == ["ab"]


def test_lines_of_text_packed(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"ab\ncd\n"))
    with pa.output_stream(str(tmp_path / "b.txt.zst"), compression="zstd") as stream:
        stream.write(b"ef\n")
    assert completions(tmp_path) == ["ab", "cd", "ef"]


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(InputError, match="expected a file ending in"):
        text_of(tmp_path / "a.jsonl")


# ------------------------------------------------------------------------------------------- encodings


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfab\r\ncd\r\n")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "ef"}\n')
    assert completions(tmp_path) == ["ab", "cd", "ef"]


def test_utf_16_and_lone_cr_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("ab\n".encode("utf-16"))
    with pytest.raises(InputError, match=r"a.txt: expected UTF-8, found UTF-16; convert the file"):
        completions(tmp_path / "a.txt")
    (tmp_path / "b.txt").write_bytes(b"ab\rcd\r")
    with pytest.raises(InputError, match=r"b.txt, line 1: expected lines that end in LF or CRLF, found a lone CR"):
        completions(tmp_path / "b.txt")


SURROGATE = '{"text": "a\\ud83d b"}'
BAD = {
    "surrogate": (SURROGATE, r"column 'text': expected text, found a lone surrogate at character 1"),
    "surrogate in a choice": (
        '{"prompt": "a", "choices": ["b", "\\ud83d"], "answer": 0}',
        r"column 'choices': expected text, found a lone surrogate at character 0",
    ),
    "surrogate in a chat": (
        '{"messages": [{"role": "user", "content": "\\ud83d"}]}',
        r"column 'messages': expected text, found a lone surrogate",
    ),
    "nested without end": ("[" * 100_000, r"expected a JSON object, found it broken"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_record_costs_itself_alone(name: str, tmp_path: Path) -> None:
    line, message = BAD[name]
    path = write_lines(tmp_path / "a.jsonl", [{"text": "ab"}, line, {"text": "cd"}])
    with pytest.raises(InputError, match=rf"a.jsonl, line 2: {message}"):
        read_records(text_of(path), SimpleNamespace(chat_template="x"))
    assert completions(path, malformed=MalformedPolicy.skip) == ["ab", "cd"]


# --------------------------------------------------------------------------------------------- Parquet


def test_columns_that_nobody_reads_are_not_decoded(tmp_path: Path) -> None:
    """One holds nanoseconds that Python's datetime cannot, one a year 14000."""
    times = pa.array([1, 2], pa.timestamp("ns"))
    years = pa.array([380_000_000_000, 0], pa.timestamp("s"))
    pq.write_table(pa.table({"text": ["ab", "cd"], "times": times, "years": years}), tmp_path / "a.parquet")
    assert completions(tmp_path / "a.parquet") == ["ab", "cd"]
    assert datetime.max.year < 14000
    pq.write_table(pa.table({"body": ["ab"]}), tmp_path / "b.parquet")
    with pytest.raises(InputError, match=r"b.parquet: expected one of the columns .*, found \['body'\]; name yours"):
        completions(tmp_path / "b.parquet")


def test_one_large_row_group_is_read_once_from_beginning_to_end(tmp_path: Path) -> None:
    rows = [f"text {number}" for number in range(5000)]
    pq.write_table(pa.table({"text": rows}), tmp_path / "one.parquet", row_group_size=5000)
    pq.write_table(pa.table({"text": rows}), tmp_path / "many.parquet", row_group_size=70)
    for name in ("one", "many"):
        groups = list(read_chunks([tmp_path / f"{name}.parquet"], size=300))
        assert [sum(len(chunk.numbers) for chunk in group) for group in groups] == [300] * 16 + [200]
        raw = list(all_records([tmp_path / f"{name}.parquet"]))
        assert [row["text"] for _, _, row in raw] == rows
        assert raw[4999][0] == f"{tmp_path / name}.parquet, row 5000"


def test_nulls_that_arrow_adds_are_no_fields(tmp_path: Path) -> None:
    """A record is the same from JSON lines, where it lacks a field, and from Parquet, where that is null."""
    seen = []

    class Template:
        chat_template = "x"

        def apply_chat_template(self, messages: list[dict], **_: Any) -> str:
            seen.append(json.dumps(messages))
            return seen[-1]

    first = {"role": "user", "content": "a", "extra": {"city": "Oslo"}}
    second = {"role": "user", "content": "b", "extra": {"city": "Rome", "to": "c"}}
    rows = [{"messages": [first]}, {"messages": [second]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for path in (write_lines(tmp_path / "a.jsonl", rows), tmp_path / "a.parquet"):
        read_records(text_of(path), Template())
    assert seen[:2] == seen[2:]
    assert seen[0] == json.dumps([first])
