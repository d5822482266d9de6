"""A record of a text as a model reads it, as lines for a terminal: what is supervised is seen before work begins."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.core.types import UNKNOWN_TARGET, InputError, Record
from pipeline.data.packing import Segment
from pipeline.data.record_counts import count_records
from pipeline.data.records import MalformedRecords, find_shape, parse_records
from pipeline.data.text_files import Text, raw_records, read_chunks
from pipeline.data.text_ids import Encoder, open_encoder
from pipeline.data.tokenize import segments

OPEN, CLOSE, UNKNOWN = "«", "»", "?"  # around what is supervised; what stands there where it is not known
SAMPLED_RECORDS = 100  # read of each text
COLUMNS, INDENT = 80, "    "
MAX_CHARACTERS, KEPT_AT_END = 480, 200  # of a record; a longer one is cut in the middle
LINE_CHARACTERS, MAX_CHOICES = 60, 20  # of a record or choice in a single line; choices that are shown
NO_LIMIT = 1 << 40  # a window that no record fills


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSample:
    """The beginning of a text as a model reads it."""

    what: str
    """corpus, gold, dev, test, ..."""
    num_records: float
    """Of the whole text."""
    is_exact: bool
    """Whether that number was counted; else it is estimated from the beginning of the files."""
    num_sampled: int
    """Records that were tokenized."""
    positions: tuple[int, int]
    """The fewest and the most supervised positions of a record."""
    tokens: tuple[int, int]
    """The fewest and the most tokens of a record's longest segment."""
    place: str
    """File and line of the record that is shown."""
    record: str
    """That record: its tokens as text, special ones included, with OPEN and CLOSE around what is supervised."""
    choices: tuple[str, ...]
    """Its choices as a model reads them."""


def sample_text(text: Text, tokenizer: Any, *, window: int | None) -> TextSample:
    """Tokenize the first records of a text as both stages do; `window` None: no limit, as when a model is scored.

    InputError where a record cannot be used and the text does not skip those, or where no record is left.
    """
    text, malformed = find_shape(text), MalformedRecords(skip=text.skip_malformed)
    is_exact, num_records = count_records(text)
    chunks = next(read_chunks(text.files, size=SAMPLED_RECORDS, columns=text.read_columns, take=text.take))
    records = {record.record_id: record for record in parse_records(raw_records(chunks), text, tokenizer, malformed)}
    parts = segments(records.values(), text, tokenizer, malformed, window=window or NO_LIMIT)
    of_record = [(records[id], list(own)) for id, own in itertools.groupby(parts, key=lambda part: part.record_id)]
    if not of_record:
        raise InputError(
            f"{text.what}: expected usable records, found none among the first {len(records) + malformed.count}; check "
            "the files and the columns' names"
        )
    num_positions = [sum(len(part.targets) for part in own) for _, own in of_record]
    num_tokens = [max(len(part.ids) for part in own) for _, own in of_record]
    first, own = of_record[0]
    return TextSample(
        what=text.what,
        num_records=num_records,
        is_exact=is_exact,
        num_sampled=len(of_record),
        positions=(min(num_positions), max(num_positions)),
        tokens=(min(num_tokens), max(num_tokens)),
        place=first.where,
        record=marked(own[0], first, text, open_encoder(tokenizer)),
        choices=first.choice_turns or first.choices,
    )


def marked(part: Segment, record: Record, text: Text, encoder: Encoder) -> str:
    """The first segment of a record as text, with OPEN and CLOSE around the tokens to predict.

    With targets=choices the prompt alone, and the right choice or UNKNOWN after it; UNKNOWN too where the teacher's
    distribution alone is read, or where the teacher completes the prompt.
    """
    supervised = dict(part.targets)
    if not supervised:
        return f"{encoder.text(part.ids)}{OPEN}{UNKNOWN}{CLOSE}"
    if text.targets == "choices":
        choices = record.choice_turns or record.choices
        right = UNKNOWN if record.answer is None else choices[record.answer]
        return f"{encoder.text(part.ids[: min(supervised) + 1])}{OPEN}{right}{CLOSE}"
    written = ""
    for is_supervised, places in itertools.groupby(range(len(part.ids)), key=lambda place: place - 1 in supervised):
        run = list(places)
        piece = _piece(part.ids, run[0], run[-1] + 1, encoder)
        written += f"{OPEN}{piece}{CLOSE}" if is_supervised else piece
    if (behind := supervised.get(len(part.ids) - 1)) is not None:  # targets=next: the target is not read
        right = UNKNOWN if behind == UNKNOWN_TARGET else _piece([*part.ids, behind], len(part.ids), None, encoder)
        written += f"{OPEN}{right}{CLOSE}"
    return written


def _piece(ids: Sequence[int], start: int, stop: int | None, encoder: Encoder) -> str:
    """The text of some tokens after those before them: alone, some tokenizers would drop the space they begin with."""
    before, whole = encoder.text(ids[:start]), encoder.text(ids[:stop])
    return whole[len(before) :] if whole.startswith(before) else encoder.text(ids[start:stop])


# --------------------------------------------------------------------------------------------- lines


def sample_lines(sample: TextSample) -> Iterator[str]:
    """Counts, the record with its supervised tokens marked, and its choices: lines of at most 80 columns."""
    about = "" if sample.is_exact else "about "
    of_first = "" if sample.num_sampled >= sample.num_records else f" (first {sample.num_sampled})"
    head = (
        f"{sample.what}: {about}{sample.num_records:,.0f} records; {_positions(sample)} each, "
        f"{_from_to(sample.tokens)} tokens{of_first}"
    )
    yield from textwrap.wrap(head, COLUMNS, subsequent_indent="  ")
    yield f"  {sample.place}"
    for line in shortened(sample.record).split("\n"):
        yield from _wrapped(visible(line))
    if sample.choices:
        yield from _choice_lines(sample.choices)


def supervised_line(sample: TextSample) -> str:
    """What of a text is supervised in one line: `corpus, supervised: 1 position a record, as ...\\nTopic:«?»`."""
    record = sample.record
    first, last = record.find(OPEN), record.rfind(CLOSE) + 1
    cut = record[max(0, min(first, last - LINE_CHARACTERS)) : last]
    if len(cut) > LINE_CHARACTERS:
        cut = shortened(cut, LINE_CHARACTERS, LINE_CHARACTERS // 2)
    before = "..." if first > 0 and not record.startswith(cut) else ""
    named = f" (or another of {len(sample.choices)} choices)" if sample.choices else ""
    shown = visible(cut).replace("\n", "\\n")
    return f"{sample.what}, supervised: {_positions(sample, short=True)} a record, as {before}{shown}{named}"


def _positions(sample: TextSample, *, short: bool = False) -> str:
    if sample.positions == (0, 0):
        return "what the teacher writes" if short else "the teacher writes what is supervised of"
    plural = "" if sample.positions == (1, 1) else "s"
    return f"{_from_to(sample.positions)} {'' if short else 'supervised '}position{plural}"


def _from_to(ends: tuple[int, int]) -> str:
    return f"{ends[0]:,}" if ends[0] == ends[1] else f"{ends[0]:,} to {ends[1]:,}"


def shortened(text: str, most: int = MAX_CHARACTERS, at_end: int = KEPT_AT_END) -> str:
    """A text without its middle where it has more than `most` characters; what was left out is counted."""
    if len(text) <= most:
        return text
    cut = f" [... {len(text) - most:,} characters ...] "
    return text[: most - at_end] + cut + text[len(text) - at_end :]


def visible(text: str) -> str:
    """Text safe for a terminal: control and format characters are escaped, line breaks too."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _choice_lines(choices: Sequence[str]) -> Iterator[str]:
    """The first choices in quotation marks, so that the space before each is seen; none is broken."""
    shown = [f'"{shortened(visible(choice), LINE_CHARACTERS, LINE_CHARACTERS // 2)}"' for choice in choices]
    left = len(shown) - MAX_CHOICES
    pieces = [f"{piece}," for piece in shown[:MAX_CHOICES]] + ([f"and {left} more"] if left > 0 else [])
    line = f"  {len(choices)} choices:"
    for piece in [*pieces[:-1], pieces[-1].removesuffix(",")]:
        if len(line) + 1 + len(piece) > COLUMNS:
            yield line
            line = "   "
        line += f" {piece}"
    yield line


def _wrapped(line: str) -> Iterable[str]:
    width = COLUMNS - len(INDENT)
    wrapped = textwrap.wrap(line, width, drop_whitespace=False, replace_whitespace=False, expand_tabs=False)
    return (f"{INDENT}{part}" for part in wrapped or [""])
