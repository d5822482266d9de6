"""`take`: only the first records of a text are read, whatever its files are, in both stages and in scoring."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.schema import MalformedPolicy, Targets, TextConfig
from pipeline.core.types import InputError
from pipeline.data.record_counts import count_records
from pipeline.data.records import find_shape, read_records
from pipeline.data.text_files import all_records, read_chunks
from pipeline.data.tokenize import load_labeled_sequences
from pipeline.evaluation.requests import held_out_hash
from support.scoring import exam_of
from support.tiny import prompts, text_of, write_lines

ROWS = prompts(2500, labeled=True)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """2,500 records in files of several kinds, one of them empty."""
    folder = tmp_path_factory.mktemp("files")
    write_lines(folder / "a.jsonl", ROWS[:1100])
    write_lines(folder / "b.jsonl", [])
    (folder / "c.json").write_text(json.dumps(ROWS[1100:1200]))
    pq.write_table(pa.Table.from_pylist(ROWS[1200:]), folder / "d.parquet")
    return sorted(folder.iterdir())


@pytest.mark.parametrize("take", [1, 1023, 1024, 1025, 1100, 1101, 1200, 1201, 2499, 2500, 9999])
def test_the_first_records_whatever_the_files(take: int, files: list[Path]) -> None:
    """As a slice of all; and in groups of every size."""
    everything = list(all_records(files))
    assert list(all_records(files, take=take)) == everything[:take]
    for size in (1, 7, 1024, take, take + 1):
        groups = list(itertools.islice(read_chunks(files, size=size, take=take), 3000))
        sizes = [sum(len(chunk.numbers) for chunk in group) for group in groups]
        assert sum(sizes) == min(take, 2500)
        assert all(count == size for count in sizes[:-1])


def test_nothing_after_them_is_read(tmp_path: Path) -> None:
    """Neither the rest of a file nor a next one: 200 MB would take seconds, a broken file would be refused."""
    big = write_lines(tmp_path / "a.jsonl", [json.dumps(ROWS[0]) + "\n" + ("x" * 1000 + "\n") * 200_000])
    (tmp_path / "b.parquet").write_bytes(b"broken")
    started = time.process_time()
    text = text_of(tmp_path, take=1)
    assert [record.prompt for record in read_records(text, None)] == [ROWS[0]["prompt"]]
    assert find_shape(text).read_columns is not None
    assert time.process_time() - started < 0.5
    assert big.stat().st_size > 200_000_000
    with pytest.raises(InputError, match=r"a\.jsonl, line 2: expected a JSON object"):
        read_records(text_of(tmp_path, take=2), None)


def test_counts(files: list[Path], tmp_path: Path) -> None:
    assert count_records(text_of(files[0].parent, take=1150)) == (True, 1150)
    assert count_records(text_of(files[0].parent, take=5000)) == (True, 2500)
    large = write_lines(tmp_path / "a.jsonl", [{"text": "x" * 1000}] * 9000)  # of which only the beginning is read
    exact, count = count_records(text_of(large, take=50))
    assert (exact, count) == (False, 50)


def test_gold_and_held_out_texts(student: Path, files: list[Path], tmp_path: Path, tokenizer: Any) -> None:
    text = text_of(files[0], targets=Targets.completion, take=5)
    shorter = text_of(write_lines(tmp_path / "a.jsonl", ROWS[:5]), targets=Targets.completion)
    keys = [[one.key for one in load_labeled_sequences(t, tokenizer, window=48)] for t in (text, shorter)]
    assert keys[0] == keys[1]
    assert exam_of(student, files[0], take=5).likelihoods == exam_of(student, tmp_path / "a.jsonl").likelihoods
    # scores on another part of the text are scores on another text
    hashes = [held_out_hash(TextConfig(files=[str(files[0])], take=take), "test") for take in (None, 5, 6)]
    assert len(set(hashes)) == 3


def test_malformed_records_count(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [ROWS[0], "{broken", ROWS[1], ROWS[2]])
    found = read_records(text_of(path, take=3, malformed=MalformedPolicy.skip), None)
    assert [record.prompt for record in found] == [ROWS[0]["prompt"], ROWS[1]["prompt"]]
    with pytest.raises(InputError, match=r"corpus\.take: expected at least 1, found 0"):
        text_of(path, take=0)
