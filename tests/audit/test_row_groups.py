"""Row groups as arrays: what is computed for all rows at once equals what is computed row by row."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.audit.row_groups import RowGroup, sequence_keys
from pipeline.data.packing import sequence_key


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(*[st.lists(st.integers(0, 60_000), max_size=9)] * 3), min_size=1, max_size=6))
def test_keys_of_all_rows_at_once_are_those_of_each_row(rows: list[tuple[list[int], ...]]) -> None:
    columns = []
    for lists in zip(*rows, strict=True):
        values = [value for row in lists for value in row]
        columns.append((np.array(values, dtype=np.int32), np.array([len(row) for row in lists])))
    expected = [sequence_key(*(np.array(values, dtype=np.int64) for values in row)) for row in rows]
    assert sequence_keys(columns) == expected


@given(st.lists(st.lists(st.integers(0, 100), max_size=4), min_size=1, max_size=6))
def test_starts_indices_and_sums_of_rows(rows: list[list[int]]) -> None:
    values = np.array([value for row in rows for value in row], dtype=np.int32)
    lengths = np.array([len(row) for row in rows])
    group = RowGroup(keys=[b""] * len(rows), values={"column": values}, lengths={"column": lengths})
    starts = group.row_starts("column")
    assert [values[start : start + len(row)].tolist() for start, row in zip(starts, rows, strict=True)] == rows
    assert group.row_indices("column").tolist() == [index for index, row in enumerate(rows) for _ in row]
    assert group.row_sums("column").tolist() == [sum(row) for row in rows]
