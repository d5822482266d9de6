"""The same records from files of every format and compression; a broken one costs itself, a broken file is named."""

from __future__ import annotations

import csv
import gzip
import json
import lzma
import pickle
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest

from pipeline.config.schema import MalformedPolicy
from pipeline.core.types import InputError
from pipeline.data.file_kinds import COMPRESSIONS
from pipeline.data.raw_chunks import BLOCK_BYTES, ROWS_PER_CHUNK, file_chunks
from pipeline.data.record_counts import count_records
from pipeline.data.records import read_records
from pipeline.data.text_files import all_records
from support.tiny import text_of

ROWS: list[dict[str, str]] = [
    {"text": 'a "quoted", comma; é 你 😀 \\ \\u0041'},
    {"text": "two\nlines,\r\nthree\tand a tab"},
    {"prompt": "[{", "completion": '"]}\n'},
    *({"text": f"text {number}"} for number in range(3000)),
]


def table() -> pa.Table:
    return pa.Table.from_pylist(
        ROWS, schema=pa.schema([(name, pa.string()) for name in ("text", "prompt", "completion")])
    )


def csv_bytes(path: Path, delimiter: str) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "prompt", "completion"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


def write_arrow(path: Path, new: Callable[..., Any]) -> None:
    with new(str(path), table().schema) as writer:
        writer.write_table(table(), max_chunksize=1200)


LINES = "".join(json.dumps(row) + "\r\n" for row in ROWS)
WRITERS: dict[str, Callable[[Path], Any]] = {
    "a.jsonl": lambda path: path.write_text(LINES, newline=""),
    "mark.ndjson": lambda path: path.write_text("\ufeff" + LINES, newline=""),
    "lines.json": lambda path: path.write_text("\n" + LINES, newline=""),
    "array.json": lambda path: path.write_text("\ufeff\n" + json.dumps(ROWS, indent=2, ensure_ascii=False)),
    "one line.json": lambda path: path.write_text(json.dumps(ROWS)),
    "a.csv": lambda path: csv_bytes(path, ","),
    "a.TSV": lambda path: csv_bytes(path, "\t"),
    "a.parquet": lambda path: pq.write_table(table(), path),
    "stream.arrow": lambda path: write_arrow(path, pa.ipc.new_stream),
    "file.Arrow": lambda path: write_arrow(path, pa.ipc.new_file),
    "a.feather": lambda path: feather.write_feather(table(), path, compression="lz4"),
}


def compressed(content: bytes, compression: str) -> bytes:
    match compression:
        case ".gz":
            return gzip.compress(content)
        case ".xz":
            return lzma.compress(content)
    return bytes(pa.compress(content, "zstd", asbytes=True)) if compression == ".zst" else content


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def rows_of(file: Path) -> list[dict[str, Any]]:
    """As records.py reads them: without what is null."""
    rows = [json.loads(content) if kind == "json" else content for _, kind, content in all_records([file])]
    return [{name: value for name, value in row.items() if value is not None} for row in rows]


@pytest.mark.parametrize("compression", ["", *COMPRESSIONS])
@pytest.mark.parametrize("name", WRITERS)
def test_every_file_has_the_same_rows(name: str, compression: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    content = (tmp_path / name).read_bytes()
    file = write(tmp_path / f"packed {name}{compression.upper()}", compressed(content, compression))
    assert rows_of(file) == ROWS
    chunks = list(file_chunks(file, ["text", "no such"]))
    assert [number for chunk in chunks for number in chunk.numbers][-1] == len(ROWS) + (name == "lines.json")
    positions = [chunk.position for chunk in chunks]
    assert positions == sorted(positions)
    assert file.stat().st_size - 8 <= positions[-1] <= file.stat().st_size  # an Arrow stream ends with an empty message
    assert count_records(text_of(file)) == (True, len(ROWS))


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_file_of_several_packed_parts(compression: str, tmp_path: Path) -> None:
    """As `cat a.gz b.gz` makes one."""
    parts = [compressed(b'{"text": "%d"}\n' % number, compression) for number in range(3)]
    assert rows_of(write(tmp_path / f"a.jsonl{compression}", b"".join(parts))) == [{"text": str(n)} for n in range(3)]


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("name", ["a.jsonl", "array.json", "a.csv", "a.parquet", "stream.arrow", "file.Arrow"])
def test_a_truncated_file_is_refused_by_name(name: str, compression: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    content = compressed((tmp_path / name).read_bytes(), compression)
    for length in (0, 5, len(content) // 2, len(content) - 5):
        file = write(tmp_path / f"cut {name}{compression}", content[:length])
        with pytest.raises(InputError, match=rf"cut {name}{compression}: expected a readable file, found it damaged"):
            list(all_records([file]))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv.gz", "a.txt.xz"])
def test_utf_16_is_refused_by_name(name: str, tmp_path: Path) -> None:
    content = "text\nab\n".encode("utf-16")
    file = write(tmp_path / name, compressed(content, Path(name).suffix))
    with pytest.raises(InputError, match=f"{name}: expected UTF-8, found UTF-16; convert the file"):
        list(all_records([file]))


def test_no_room_to_unpack_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    WRITERS["a.parquet"](tmp_path / "a.parquet")
    file = write(tmp_path / "a.parquet.gz", gzip.compress((tmp_path / "a.parquet").read_bytes()))
    monkeypatch.setattr(tempfile, "TemporaryFile", partial(Path("/dev/full").open, "wb"))
    with pytest.raises(
        InputError, match="a.parquet.gz: expected room to unpack it in .*, found No space left on device"
    ):
        list(all_records([file]))


def test_what_datasets_writes_beside_its_data_is_no_text(tmp_path: Path) -> None:
    WRITERS["stream.arrow"](tmp_path / "data-00000-of-00001.arrow")
    for name in ("state.json", "dataset_info.json", "dataset_dict.json"):
        (tmp_path / name).write_text('{"splits": ["train"]}')
    assert [file.name for file in text_of(tmp_path).files] == ["data-00000-of-00001.arrow"]


# ------------------------------------------------------------------------------------------------ JSON


@pytest.mark.parametrize("bad", ['{"text": "\\ud83d"}', '{"text": "a"} {"text": "b"}', "[" * 5000 + "]" * 5000, ""])
def test_a_bad_element_costs_itself_alone(bad: str, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(f'[{{"text": "ab"}}, {bad}, {{"text": "cd"}}]')
    with pytest.raises(InputError, match=r"a.json, element 2: (expected a JSON object|column 'text': expected text)"):
        read_records(text_of(file), None)
    records = read_records(text_of(file, malformed=MalformedPolicy.skip), None)
    assert [(record.record_id, record.completion) for record in records] == [(0, "ab"), (2, "cd")]


# ------------------------------------------------------------------------------------------------- CSV


def completions(content: bytes, folder: Path, **settings: Any) -> list[str | None]:
    file = write(folder / "a.csv", content)
    return [record.completion for record in read_records(text_of(file, **settings), None)]


BAD_ROWS = {
    "too few": (b"1", "expected 2 cells, as many as in the header, found 1"),
    "too many": (b"1,cd,ef", "expected 2 cells, as many as in the header, found 3"),
    "no UTF-8": (b"1,a\xff", "expected UTF-8, found it broken"),
    "no text": (b"1,", "expected exactly one of the columns"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_costs_itself_alone(name: str, tmp_path: Path) -> None:
    bad, message = BAD_ROWS[name]
    content = b'id,text\r\n0,"a\r\nb"\r\n\r\n' + bad + b"\r\n2,cd\r\n"  # with a line break in a cell, and a blank line
    with pytest.raises(InputError, match=f"a.csv, row 2: {message}"):
        completions(content, tmp_path)
    assert completions(content, tmp_path, malformed=MalformedPolicy.skip) == ["a\r\nb", "cd"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"a.csv: expected a first row with different names of columns, found \[\]"),
        (b"text,text\na,b\n", r"found \['text', 'text'\]; name each column once"),
        (b",text\n0,ab\n", r"found \['', 'text'\]"),
        (b"body\nab\n", r"a.csv: expected one of the columns .*, found \['body'\]; name yours with columns.text"),
        (b'text\nab\n"c"d\n', r"a.csv, line 3: expected quotes only around whole cells"),
        (b'text\nab\n"cd\nef\n', r"a.csv, line 4: expected quotes only around whole cells .*unexpected end of data"),
        (b"text\nab\nc\0d\n", r"a.csv, line 3: expected text in UTF-8, found a NUL"),
    ],
)
def test_a_broken_table_is_refused_also_where_bad_records_are_skipped(
    content: bytes, message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        completions(content, tmp_path, malformed=MalformedPolicy.skip)


def test_cells_are_text_as_it_stands(tmp_path: Path) -> None:
    long = "x" * 500_000  # longer than the csv module reads without being asked
    content = f'\ufefftext,number\n" a ",1\n007,\n{long},"2"\n'.encode()
    rows = [row for _, _, row in all_records([write(tmp_path / "a.csv", content)])]
    assert rows == [{"text": " a ", "number": "1"}, {"text": "007", "number": None}, {"text": long, "number": "2"}]


# -------------------------------------------------------------------------------------- Parquet, Arrow


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_value_that_python_cannot_hold_costs_its_row_alone(name: str, tmp_path: Path) -> None:
    texts = pa.array([b"ab", b"\xff", b"cd"], pa.binary()).view(pa.string())
    if name == "a.parquet":
        pq.write_table(pa.table({"text": texts}), tmp_path / name)
    else:
        with pa.ipc.new_file(str(tmp_path / name), pa.schema({"text": pa.string()})) as writer:
            writer.write_table(pa.table({"text": texts}))
    with pytest.raises(InputError, match=f"{name}, row 2: expected a value that can be read, found .*utf-8"):
        read_records(text_of(tmp_path / name), None)
    records = read_records(text_of(tmp_path / name, malformed=MalformedPolicy.skip), None)
    assert [record.completion for record in records] == ["ab", "cd"]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_columns_that_nobody_reads_do_no_harm(name: str, tmp_path: Path) -> None:
    years = pa.array([380_000_000_000, 0], pa.timestamp("s"))  # the first is in the year 14000
    found = pa.table({"text": ["ab", "cd"], "years": years})
    if name == "a.parquet":
        pq.write_table(found, tmp_path / name)
    else:
        with pa.ipc.new_stream(str(tmp_path / name), found.schema) as writer:
            writer.write_table(found)
    records = read_records(text_of(tmp_path / name), None)
    assert [record.completion for record in records] == ["ab", "cd"]
    with pytest.raises(InputError, match=r"expected one of the columns \['body'\], found \['text', 'years'\]"):
        list(all_records([tmp_path / name], ["body"]))


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_chunks_of_one_large_batch_are_small(name: str, tmp_path: Path) -> None:
    """Also where they go to another process; long rows make chunks of fewer rows."""
    found = pa.table({"text": ["x" * 1000] * 5000 + ["y" * 100_000] * 50})
    if name == "a.parquet":
        pq.write_table(found, tmp_path / name, row_group_size=5000)
    else:
        with pa.ipc.new_file(str(tmp_path / name), found.schema) as writer:
            writer.write_table(found)
    chunks = list(file_chunks(tmp_path / name))
    assert sum(len(chunk.numbers) for chunk in chunks) == 5050
    assert max(len(chunk.numbers) for chunk in chunks) <= ROWS_PER_CHUNK
    if name == "a.arrow":  # every chunk holds the same number of rows, chosen by the average
        assert all(len(pickle.dumps(chunk.rows)) < 1.1 * chunk.num_bytes + 2000 for chunk in chunks)
        assert sorted(chunk.num_bytes for chunk in chunks)[len(chunks) // 2] < BLOCK_BYTES
