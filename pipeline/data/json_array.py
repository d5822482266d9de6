"""The elements of a JSON array, cut out as bytes and not yet parsed: one that is broken leaves the others readable."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from pipeline.core.types import InputError

AT_ELEMENTS = re.compile(rb'[][{}",]')  # between two elements stands a comma
INSIDE_ELEMENT = re.compile(rb'[][{}"]')
REST_OF_STRING = re.compile(rb'[^"\\]*(?:\\.[^"\\]*)*', re.DOTALL)  # up to its quote, or as far as the bytes go


def array_elements(blocks: Iterable[bytes], file: Path) -> Iterator[bytes]:
    """The elements of the array that the blocks hold, in one pass; in memory are one block and one element.

    The first byte that is not blank is the array's `[`. InputError if the file does not end with the array.
    """
    depth, in_string, num_elements = 0, False, 0
    element, unread = bytearray(), b""
    remaining = iter(blocks)
    for next_block in remaining:
        block, start, at = unread + next_block, 0, 0
        while at < len(block):
            if in_string:
                at = REST_OF_STRING.match(block, at).end()  # type: ignore[union-attr]  # it matches an empty one too
                if block[at : at + 1] != b'"':
                    break  # the block ends in the string, perhaps between a backslash and what it escapes
                in_string, at = False, at + 1
            found = (AT_ELEMENTS if depth == 1 else INSIDE_ELEMENT).search(block, at)
            if found is None:
                at = len(block)
                break
            mark, at = found[0], found.end()
            if mark == b'"':
                in_string = True
            elif mark in b"[{":
                depth += 1
                start = at if depth == 1 else start
            elif mark in b"]}":
                depth -= 1
            if mark == b"," or depth == 0:
                element += block[start : at - 1]
                if mark == b"," or num_elements or element.strip():  # [] has no element
                    yield bytes(element)
                    num_elements += 1
                element.clear()
                start = at
            if depth == 0:
                _check_end(mark, block[at:], remaining, file, num_elements)
                return
        element += block[start:at]
        unread = block[at:]
    raise InputError(
        f"{file}: expected a JSON array that ends with a bracket, found the end of the file after {num_elements} whole "
        "elements; replace it"
    )


def _check_end(mark: bytes, rest: bytes, remaining: Iterator[bytes], file: Path, num_elements: int) -> None:
    """Refuse a wrong bracket at the end of the array, and anything behind it."""
    if mark != b"]":
        raise InputError(f"{file}: expected a JSON array, found }} in place of ] after element {num_elements}")
    while not rest.strip() and (rest := next(remaining, b"")):
        pass
    if rest.strip():
        raise InputError(
            f"{file}: expected one JSON array, found {rest.strip()[:20]!r} after it; a file of one array in each line "
            "is called .jsonl"
        )
