"""How long the records of a new study are, which window fits them, and how many sequences they make."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.core.types import InputError
from pipeline.data.packing import pack
from pipeline.data.record_counts import count_records
from pipeline.data.records import MalformedRecords, find_shape, parse_records
from pipeline.data.shown import NO_LIMIT
from pipeline.data.text_files import Raw, Text, all_records
from pipeline.data.tokenize import segments

MEASURED_RECORDS = 20_000  # of each text; the rest is taken to be like them
STEP, PLAIN_WINDOW = 16, 512  # a window is a multiple of STEP; of plain text it is at most PLAIN_WINDOW
SMALL_WINDOW = 128  # records up to this length always fit: short ones are packed, so it costs little
QUANTILE, MAX_STRETCH = 0.99, 1.5  # a longer record that is further above this quantile is cut


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """The tokens of each measured record: its longest segment, as if the window had no end."""

    what: str
    tokens: tuple[int, ...]
    targets: tuple[int, ...]
    """The supervised positions of each measured record."""
    num_records: int
    """Of the whole text; an estimate where it is large."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A window, and what becomes of records that do not fit it."""

    size: int
    too_long: str | None
    """cut_left where records do not fit, else None."""
    fitting_fraction: float
    """Of the measured records."""


def measure(text: Text, tokenizer: Any) -> Lengths:
    """The lengths of the first records of a text."""
    text, malformed = find_shape(text), MalformedRecords(skip=text.skip_malformed)
    _, num_records = count_records(text)
    records = parse_records(_first(text), text, tokenizer, malformed)
    longest, targets = dict[int, int](), Counter[int]()
    for part in segments(records, text, tokenizer, malformed, window=NO_LIMIT):
        longest[part.record_id] = max(longest.get(part.record_id, 0), len(part.ids))
        targets[part.record_id] += len(part.targets)
    return Lengths(
        what=text.what,
        tokens=tuple(longest.values()),
        targets=tuple(targets[record_id] for record_id in longest),
        num_records=round(num_records),
    )


def _first(text: Text) -> Iterable[Raw]:
    return itertools.islice(all_records(text.files, text.read_columns, take=text.take), MEASURED_RECORDS)


def fit_window(tokens: Sequence[int], *, is_plain: bool, longest: int | None) -> Window:
    """The smallest multiple of 16 that fits records of these lengths, or 99 % of them where a few are far longer.

    Plain text is split, so its window is at most 512. `longest` are the models' positions, None: no limit. InputError
    where not even half of the records fit.
    """
    tokens = sorted(tokens)
    limit = NO_LIMIT if longest is None else longest // STEP * STEP
    if is_plain:
        return Window(size=min(rounded_up(tokens[-1]), PLAIN_WINDOW, limit), too_long=None, fitting_fraction=1.0)
    usual = quantile(tokens)
    wanted = tokens[-1] if tokens[-1] <= max(MAX_STRETCH * usual, SMALL_WINDOW) else usual
    return given_window(min(rounded_up(wanted), limit), tokens)


def quantile(lengths: Sequence[int]) -> int:
    """The length that 99 % of the records do not exceed."""
    return sorted(lengths)[math.ceil(QUANTILE * len(lengths)) - 1]


def given_window(size: int, tokens: Sequence[int]) -> Window:
    """A window of this size for records of these lengths; InputError where it does not fit half of them."""
    fitting = sum(length <= size for length in tokens) / len(tokens)
    if fitting < 0.5:
        raise InputError(
            f"window: expected one that fits at least half of the records, found {size}, which fits {fitting:.0%}; the "
            f"longest has {max(tokens)} tokens: use a wider window, shorter records or models with more positions"
        )
    return Window(size=size, too_long=None if fitting == 1 else "cut_left", fitting_fraction=fitting)


def rounded_up(length: int) -> int:
    """The next multiple of 16."""
    return math.ceil(max(length, 1) / STEP) * STEP


def count_sequences(text: Text, tokenizer: Any, *, window: int) -> int:
    """About how many packed sequences a text makes; InputError where a measured record cannot be used."""
    text, malformed = find_shape(text), MalformedRecords(skip=text.skip_malformed)
    _, num_records = count_records(text)
    records = parse_records(_first(text), text, tokenizer, malformed)
    num_sequences = sum(1 for _ in pack(segments(records, text, tokenizer, malformed, window=window), window=window))
    if not num_sequences:
        raise InputError(f"{text.what}: expected usable records, found none; check the files")
    return max(1, round(num_sequences * num_records / min(num_records, MEASURED_RECORDS)))
