"""Gold on the disk: the rows of a mapped file are those that were written, damage is named, memory stays flat."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.cache import sequence_files
from pipeline.cache.sequence_files import (
    MappedSequences,
    open_sequence_file,
    write_mapped_sequences,
    write_sequence_file,
)
from pipeline.core.types import InputError, TokenSequence
from pipeline.data.packing import Segment, make_sequence


def sequences(number: int) -> list[TokenSequence]:
    """Of one segment or two, with depths in some, and with one to six targets."""
    made = []
    for n in range(number):
        ids = tuple(range(n % 5, n % 5 + 8))
        targets = tuple((s, ids[s + 1]) for s in range(1 + n % 6))
        depths = (1,) * len(targets) if n % 3 == 0 else ()
        parts = [Segment(record_id=2 * n + i, ids=ids, targets=targets, depths=depths) for i in range(1 + n % 2)]
        made.append(make_sequence(parts))
    return made


def test_rows_are_those_of_the_parquet_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequence_files, "ROWS_PER_GROUP", 7)
    written = sequences(40)
    write_mapped_sequences(tmp_path / "gold.arrow", written)
    write_sequence_file(tmp_path / "gold.parquet", written)
    mapped, expected = MappedSequences(tmp_path / "gold.arrow"), list(open_sequence_file(tmp_path / "gold.parquet"))
    assert len(mapped) == len(expected) == 40
    assert mapped.num_targets == sum(len(sequence.target_ids_N) for sequence in written)
    for row in torch.randperm(40, generator=torch.Generator().manual_seed(0)).tolist():
        for field in dataclasses.fields(TokenSequence):
            found, right = getattr(mapped.row(row), field.name), getattr(expected[row], field.name)
            if isinstance(right, torch.Tensor):
                assert found.dtype == right.dtype
                assert torch.equal(found, right)
            else:
                assert found == right


def test_damage_is_named_before_a_row_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequence_files, "ROWS_PER_GROUP", 7)
    path = tmp_path / "gold.arrow"
    write_mapped_sequences(path, sequences(40))
    intact = path.read_bytes()
    at = intact.rindex(bytes(sequences(40)[-1].key))
    path.write_bytes(intact[:at] + bytes([intact[at] ^ 1]) + intact[at + 1 :])
    mapped = MappedSequences(path)
    assert mapped.row(0).key == sequences(1)[0].key  # of another part of the file
    for _ in range(2):
        with pytest.raises(InputError, match=r"gold.arrow: expected the tokenized text, found it damaged .*checksum"):
            mapped.row(39)
    path.write_bytes(intact[:-100])
    with pytest.raises(InputError, match=r"gold.arrow: expected the tokenized text, found it damaged"):
        MappedSequences(path)


MEASURE = """
import dataclasses, gc, sys
from pathlib import Path
from pipeline.cache.sequence_files import MappedSequences, write_mapped_sequences
from pipeline.core.runtime import keep_allocator_memory
from pipeline.data.packing import Segment, make_sequence

def anonymous_bytes():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) << 10

def rows(number):
    ids = tuple(range(128))
    one = make_sequence([Segment(record_id=0, ids=ids, targets=tuple((s, s + 1) for s in range(127)))])
    for n in range(number):
        yield dataclasses.replace(one, key=n.to_bytes(16, "little"), input_ids_S=one.input_ids_S.clone(),
                                  target_ids_N=one.target_ids_N.clone())

folder = Path(sys.argv[1])
for number in map(int, sys.argv[2:]):
    before = anonymous_bytes()
    write_mapped_sequences(folder / str(number), rows(number))
    mapped = MappedSequences(folder / str(number))
    for row in range(0, number, 3):
        mapped.row(row)
    gc.collect()
    print(number, (folder / str(number)).stat().st_size, anonymous_bytes() - before)
"""


def test_memory_does_not_grow_with_the_gold_set(tmp_path: Path) -> None:
    """Written, mapped and read: 40,000 sequences take no more of it than 4,000 did before in the same process."""
    command = [sys.executable, "-c", MEASURE, str(tmp_path), "4000", "40000"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (_, small_bytes, _), (_, large_bytes, growth_bytes) = [map(int, line.split()) for line in done.stdout.splitlines()]
    assert large_bytes > 9 * small_bytes
    assert large_bytes > 80_000_000
    assert growth_bytes < 10_000_000, done.stdout
