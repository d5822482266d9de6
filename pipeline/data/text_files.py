"""Text files -> raw records, read once from beginning to end."""

from __future__ import annotations

import dataclasses
import datetime
import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.schema import ChatConfig, TextConfig
from pipeline.config.validate import check_text
from pipeline.core.files import matching_paths
from pipeline.core.folds import Fold
from pipeline.core.types import InputError
from pipeline.data.file_kinds import endings, file_format, files_in, readable
from pipeline.data.messages import ChatRules
from pipeline.data.raw_chunks import RawChunk, file_chunks, row_items

RECORDS_PER_GROUP = 1024

Raw = tuple[str, str, Any]
"""(place, kind, content): "json" and "text" have bytes, "row" a dict, "bad" the reason why it cannot be used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """A text and how it is read; its files exist."""

    what: str
    """corpus, gold, dev or test, for messages."""
    files: tuple[Path, ...]
    columns: Mapping[str, str]
    """The name of the input's column for each of text, prompt, completion, messages, choices and answer."""
    targets: str
    """all, completion, next or choices."""
    end_token: bool
    skip_malformed: bool
    chat: ChatRules
    shape: str = "auto"
    """A key of `shapes.SHAPES`, once `records.find_shape` has found it."""
    read_columns: tuple[str, ...] | None = None
    """The columns of that shape; None before it is found."""
    too_long: str | None = None
    """stop, skip or cut_left: what becomes of a prompt longer than the window; None: it counts as malformed."""
    begins_windows: bool = False
    """The beginning token stands at the beginning of each window of a long text, not of the first alone."""
    completes: bool = False
    """Records with a prompt alone are completed by the teacher."""
    choices: tuple[str, ...] = ()
    """The choices of every record with a prompt that brings none of its own."""
    take: int | None = None
    """Only the first so many records are read; None: all."""
    fold: Fold | None = None
    """A capture keeps only the sequences of this fold; None: all."""


def open_text(config: TextConfig, what: str) -> Text:
    """From options to a value: the files of all paths, folders and globs, sorted within each."""
    check_text(config, what)
    files: list[Path] = []
    for pattern in config.files:
        paths = matching_paths(pattern)
        if not paths:
            raise InputError(f"{what}: expected {pattern!r} to be a file, a folder or a glob, found nothing there")
        for path in paths:
            if path.is_dir():
                files += files_in(path)
            elif path.is_file() and file_format(path):
                files.append(path)
            else:
                raise InputError(f"{what}: expected a file ending in {endings()}, found {path}")
    # patterns may overlap, and a file may have two names (links): it is read once
    files = list({file.resolve(): file for file in reversed(files)}.values())[::-1]
    if not files:
        raise InputError(f"{what}: expected files ending in {endings()}, found none in {config.files}")
    return Text(
        what=what,
        files=tuple(files),
        columns=dataclasses.asdict(config.columns),
        targets=config.targets.name,
        end_token=config.end_token,
        skip_malformed=config.malformed.name == "skip",
        chat=_chat_rules(config.chat, what, end_token=config.end_token),
        shape=config.shape.name,
        too_long=None if config.too_long is None else config.too_long.name,
        begins_windows=bool(config.window_begin_token),
        choices=tuple(config.choices or ()),
        take=config.take,
    )


def _chat_rules(config: ChatConfig, what: str, *, end_token: bool) -> ChatRules:
    try:
        date = datetime.date.fromisoformat(config.date)
    except ValueError:
        raise InputError(f"{what}.chat.date: expected a date as 2024-07-26, found {config.date!r}") from None
    return ChatRules(
        supervise_all=config.supervise.name == "all_turns",
        supervise_thoughts=config.supervise_thoughts,
        template_options=dict(config.template_options),
        date=date,
        role=config.role,
        content=config.content,
        end_token=end_token,
    )


def read_chunks(
    files: Sequence[Path], *, size: int, columns: Collection[str] | None = None, take: int | None = None
) -> Iterator[list[RawChunk]]:
    """The records of some files in groups of `size` (the last may be smaller); blank lines do not count.

    Each file is read once, from its beginning to its end, and none after the first `take` records (None: all). Of
    tables (CSV, Parquet, Arrow) only `columns` are decoded; None: all.
    """
    group: list[RawChunk] = []
    missing = size
    for chunk in _first_chunks(files, columns, take):
        while len(chunk.numbers) >= missing:
            yield [*group, _cut(chunk, 0, missing)]
            chunk, group, missing = _cut(chunk, missing, len(chunk.numbers)), [], size
        if chunk.numbers:
            group.append(chunk)
            missing -= len(chunk.numbers)
    if group:
        yield group


def _first_chunks(files: Sequence[Path], columns: Collection[str] | None, take: int | None) -> Iterator[RawChunk]:
    """The chunks of some files, up to the first `take` records."""
    left = take
    for file in files:
        with readable(file):
            for chunk in file_chunks(file, columns):
                if left is None:
                    yield chunk
                    continue
                yield chunk if len(chunk.numbers) <= left else _cut(chunk, 0, left)
                left -= len(chunk.numbers)
                if left <= 0:
                    return


def _cut(chunk: RawChunk, start: int, stop: int) -> RawChunk:
    rows = None if chunk.rows is None else chunk.rows.slice(start, stop - start)
    return dataclasses.replace(chunk, numbers=chunk.numbers[start:stop], items=chunk.items[start:stop], rows=rows)


def raw_records(group: Iterable[RawChunk]) -> Iterator[Raw]:
    """Place, kind and unparsed content of the records of some chunks."""
    for chunk in group:
        items = chunk.items if chunk.rows is None else row_items(chunk.rows)
        for number, item in zip(chunk.numbers, items, strict=True):
            yield f"{chunk.file}, {chunk.unit} {number}", "bad" if isinstance(item, str) else chunk.kind, item


def all_records(
    files: Sequence[Path], columns: Collection[str] | None = None, *, take: int | None = None
) -> Iterator[Raw]:
    """Every record of some files, in order, or the first `take`."""
    groups = read_chunks(files, size=RECORDS_PER_GROUP, columns=columns, take=take)
    return itertools.chain.from_iterable(map(raw_records, groups))
