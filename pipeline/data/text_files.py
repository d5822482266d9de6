"""Text files -> raw records: lines of JSON or text and rows of Parquet, read once from beginning to end."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config.schema import TextConfig
from pipeline.config.validate import check_choices
from pipeline.core.files import matching_paths
from pipeline.core.types import InputError

LINES_PER_CHUNK = 1024
SUFFIXES = (
    *(".jsonl", ".jsonl.gz", ".jsonl.zst", ".ndjson", ".ndjson.gz", ".ndjson.zst"),
    *(".txt", ".txt.gz", ".txt.zst", ".parquet"),
)
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
UTF8_MARK, UTF16_MARKS = b"\xef\xbb\xbf", (b"\xff\xfe", b"\xfe\xff")


Raw = tuple[str, str, Any]  # (place, "json" | "text" | "row", unparsed bytes or the row of a Parquet file)


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
    completes: bool = False
    """Records with a prompt alone are completed by the teacher."""
    choices: tuple[str, ...] = ()
    """The choices of every record with a prompt that brings none of its own."""


def open_text(config: TextConfig, what: str) -> Text:
    """From options to a value: the files of all paths, folders and globs, sorted within each."""
    check_choices(config, what)
    files: list[Path] = []
    for pattern in config.files:
        paths = matching_paths(pattern)
        if not paths:
            raise InputError(f"{what}: expected {pattern!r} to be a file, a folder or a glob, found nothing there")
        for path in paths:
            if path.is_dir():
                files += _files_in(path)
            elif path.is_file() and path.name.lower().endswith(SUFFIXES):
                files.append(path)
            else:
                raise InputError(f"{what}: expected a file ending in {', '.join(SUFFIXES)}, found {path}")
    # patterns may overlap, and a file may have two names (links): it is read once
    files = list({file.resolve(): file for file in reversed(files)}.values())[::-1]
    if not files:
        raise InputError(f"{what}: expected files ending in {', '.join(SUFFIXES)}, found none in {config.files}")
    return Text(
        what=what,
        files=tuple(files),
        columns=dataclasses.asdict(config.columns),
        targets=config.targets.name,
        end_token=config.end_token,
        skip_malformed=config.malformed.name == "skip",
        choices=tuple(config.choices or ()),
    )


def _files_in(folder: Path) -> list[Path]:
    """The files of a folder and its subfolders that can be read; hidden ones (.ipynb_checkpoints, ._name) are not."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name.lower().endswith(SUFFIXES))
    return [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


@dataclass(frozen=True, slots=True, kw_only=True)
class RawChunk:
    """Consecutive records of one file, not yet parsed: small to send to another process."""

    file: Path
    kind: str
    """json or text: `lines` holds them; row: `rows` does."""
    numbers: Sequence[int]
    """1-based line or row of each record."""
    lines: tuple[bytes, ...] = ()
    rows: pa.RecordBatch | None = None
    """Of a Parquet file, only the columns that are read."""


def read_chunks(
    files: Sequence[Path], *, size: int, columns: Mapping[str, str] | None = None
) -> Iterator[list[RawChunk]]:
    """The records of some files in groups of `size` (the last may be smaller); blank lines do not count.

    Each file is read once, from its beginning to its end. Of a Parquet file only `columns` are decoded, if given.
    """
    group: list[RawChunk] = []
    missing = size
    for file in files:
        with _readable(file):
            is_parquet = file.name.lower().endswith(".parquet")
            chunks = _parquet_chunks(file, columns) if is_parquet else _line_chunks(file)
            for chunk in chunks:
                while len(chunk.numbers) >= missing:
                    yield [*group, _cut(chunk, 0, missing)]
                    chunk, group, missing = _cut(chunk, missing, len(chunk.numbers)), [], size
                if chunk.numbers:
                    group.append(chunk)
                    missing -= len(chunk.numbers)
    if group:
        yield group


def raw_records(group: Iterable[RawChunk]) -> Iterator[Raw]:
    """Place, kind and unparsed content of the records of some chunks."""
    for chunk in group:
        if chunk.rows is None:
            for number, line in zip(chunk.numbers, chunk.lines, strict=True):
                yield f"{chunk.file}, line {number}", chunk.kind, line
            continue
        for number, row in zip(chunk.numbers, chunk.rows.to_pylist(), strict=True):
            yield f"{chunk.file}, row {number}", "row", row


def all_records(files: Sequence[Path], columns: Mapping[str, str] | None = None) -> Iterator[Raw]:
    """Every record of some files, in order."""
    return itertools.chain.from_iterable(map(raw_records, read_chunks(files, size=LINES_PER_CHUNK, columns=columns)))


@contextlib.contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, pa.ArrowException) as error:
        raise InputError(f"{file}: expected a readable file, found it damaged ({error}); replace it") from None


def _cut(chunk: RawChunk, start: int, stop: int) -> RawChunk:
    rows = None if chunk.rows is None else chunk.rows.slice(start, stop - start)
    return dataclasses.replace(chunk, numbers=chunk.numbers[start:stop], lines=chunk.lines[start:stop], rows=rows)


def _parquet_chunks(file: Path, columns: Mapping[str, str] | None) -> Iterator[RawChunk]:
    first = 1
    with pq.ParquetFile(file) as parquet:
        present = parquet.schema_arrow.names
        wanted = present if columns is None else [name for name in present if name in columns.values()]
        if present and not wanted:
            raise InputError(
                f"{file}: expected one of the columns {sorted(columns.values() if columns else [])}, found {present}; "
                "name yours with columns.text, columns.prompt or columns.messages"
            )
        for rows in parquet.iter_batches(LINES_PER_CHUNK, columns=wanted):
            yield RawChunk(file=file, kind="row", numbers=range(first, first + rows.num_rows), rows=rows)
            first += rows.num_rows


def _line_chunks(file: Path) -> Iterator[RawChunk]:
    kind = "text" if ".txt" in file.name.lower()[-len(".txt.zst") :] else "json"
    compression = COMPRESSIONS.get(file.suffix.lower())
    with pa.input_stream(str(file), compression=compression) as stream:
        numbered = enumerate(io.BufferedReader(stream, 1 << 20), 1)
        while block := list(itertools.islice(numbered, LINES_PER_CHUNK)):
            if block[0][0] == 1:
                block[0] = (1, _without_mark(file, block[0][1]))
            records = [(number, line) for number, line in block if line.strip()]
            numbers, lines = tuple(n for n, _ in records), tuple(line for _, line in records)
            yield RawChunk(file=file, kind=kind, numbers=numbers, lines=lines)


def _without_mark(file: Path, line: bytes) -> bytes:
    """The first line without a UTF-8 byte order mark; a file in UTF-16 is refused."""
    if line.startswith(UTF16_MARKS):
        raise InputError(f"{file}: expected UTF-8, found UTF-16; convert the file")
    return line.removeprefix(UTF8_MARK)
