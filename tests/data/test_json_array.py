"""An array is cut into its elements wherever the blocks that are read happen to end."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.types import InputError
from pipeline.data.json_array import array_elements

FILE = Path("a.json")
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.sampled_from(['\\"', "\\", '"[{', "},]", "\\\\"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)


def blocks_of(content: bytes, size: int) -> Iterator[bytes]:
    return (content[start : start + size] for start in range(0, len(content), size))


@settings(deadline=None, max_examples=200)
@given(
    values=st.lists(VALUES, max_size=6), size=st.integers(1, 40), indent=st.sampled_from([None, 1]), ascii=st.booleans()
)
def test_elements_are_those_of_the_json_parser(values: list[Any], size: int, indent: int | None, ascii: bool) -> None:
    content = b" \n" + json.dumps(values, indent=indent, ensure_ascii=ascii).encode() + b"\n "
    assert [json.loads(element) for element in array_elements(blocks_of(content, size), FILE)] == values


@pytest.mark.parametrize("size", [1, 2, 3, 1000])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"a": 1}, {"a": 2}', "found the end of the file after 1 whole elements"),
        (b'[1, "never closed]', "found the end of the file after 1 whole elements"),
        (b'[1, "ends in an escape\\', "found the end of the file after 1 whole elements"),
        (b"[", "found the end of the file after 0 whole elements"),
        (b"[1, 2}", "found } in place of ] after element 2"),
        (b"[1]\n[2]", r"expected one JSON array, found b'\[.* after it"),
        (b"[1] , ", "expected one JSON array, found b',.* after it"),
    ],
)
def test_a_file_that_is_no_whole_array_is_refused(content: bytes, message: str, size: int) -> None:
    with pytest.raises(InputError, match=rf"^a.json: .*{message}"):
        list(array_elements(blocks_of(content, size), FILE))


def test_a_missing_element_is_an_empty_one() -> None:
    """Which no parser takes for a record, so that it is found."""
    assert list(array_elements([b"[1,,2,]"], FILE)) == [b"1", b"", b"2", b""]
    assert list(array_elements([b"[ \n]"], FILE)) == []


def test_elements_come_before_the_file_is_read_to_its_end() -> None:
    endless = itertools.chain([b"["], itertools.repeat(b'{"text": "ab"}, '))
    elements = itertools.islice(array_elements(endless, FILE), 1000)
    assert [element.strip() for element in elements] == [b'{"text": "ab"}'] * 1000
