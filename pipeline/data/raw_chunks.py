"""One file -> chunks of records that are not yet parsed: lines, elements of an array, rows of CSV, Parquet or Arrow."""

from __future__ import annotations

import csv
import functools
import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.types import InputError
from pipeline.data.file_kinds import Unpacked, arrow_batches, file_format, format_suffix, seekable, unpacked
from pipeline.data.json_array import array_elements

BLOCK_BYTES = 1 << 18  # a chunk holds about this much text, or one record that is longer
ROWS_PER_CHUNK = 1024  # at most, of Parquet and Arrow
RECORD_BYTES = 64  # what Python needs for a record besides its text
CELL_CHARACTERS = 1 << 27  # of the longest cell in CSV: behind a quote that nobody closed lies the rest of the file
UTF8_MARK, UTF16_MARKS = b"\xef\xbb\xbf", (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True, slots=True, kw_only=True)
class RawChunk:
    """Consecutive records of one file, not yet parsed: small to send to another process."""

    file: Path
    kind: str
    """json or text: the items are bytes; row: they are rows."""
    unit: str
    """line, element or row."""
    numbers: Sequence[int]
    """1-based line, element or row of each record."""
    items: tuple[Any, ...] = ()
    """Bytes or rows; a string in place of a row is the reason why it cannot be used."""
    rows: pa.RecordBatch | None = None
    """In place of `items`, of Parquet and Arrow: only the columns that are read."""
    position: int
    """The bytes of the file, as it lies on the disk, that were read up to the end of this chunk."""

    @property
    def num_bytes(self) -> int:
        """About the memory that the records take."""
        return sum(map(_item_bytes, self.items)) if self.rows is None else self.rows.nbytes


def _item_bytes(item: bytes | str | dict[str, str | None]) -> int:
    cells = item.values() if isinstance(item, dict) else (item,)
    return RECORD_BYTES + sum(len(cell) for cell in cells if cell is not None)


def file_chunks(file: Path, columns: Collection[str] | None = None) -> Iterator[RawChunk]:
    """The records of a file in one pass; of CSV, Parquet and Arrow only `columns` (None: all). Blank lines are none."""
    match file_format(file):
        case "parquet":
            return _parquet_chunks(file, columns)
        case "arrow":
            return _arrow_chunks(file, columns)
        case "csv":
            return _csv_chunks(file, columns)
        case "json" if format_suffix(file) == ".json" and _starts_array(file):
            return _array_chunks(file)
        case kind:
            return _line_chunks(file, str(kind))


def _wanted(file: Path, present: Sequence[str], columns: Collection[str] | None) -> list[str]:
    wanted = [name for name in present if columns is None or name in columns]
    if present and not wanted:
        raise InputError(
            f"{file}: expected one of the columns {sorted(columns or [])}, found {list(present)}; "
            "name yours with columns.text, columns.prompt or columns.messages"
        )
    return wanted


def _item_chunks(
    file: Path, kind: str, unit: str, items: Iterable[Any], source: Unpacked, *, first: int = 1
) -> Iterator[RawChunk]:
    """Chunks of about BLOCK_BYTES."""
    block: list[Any] = []
    size = 0
    for item in itertools.chain(items, [None]):  # None: the end
        if item is not None:
            block.append(item)
            size += _item_bytes(item)
        if block and (item is None or size >= BLOCK_BYTES):
            numbers = range(first, first + len(block))
            yield RawChunk(
                file=file, kind=kind, unit=unit, numbers=numbers, items=tuple(block), position=source.position()
            )
            first, block, size = numbers.stop, [], 0


# ----------------------------------------------------------------------------------------- JSON, text


def _line_chunks(file: Path, kind: str) -> Iterator[RawChunk]:
    first = 1
    with unpacked(file) as source:
        while lines := source.stream.readlines(BLOCK_BYTES):
            if first == 1:
                lines[0] = _without_mark(file, lines[0])
            records = [(number, line) for number, line in enumerate(lines, first) if line and not line.isspace()]
            numbers, items = tuple(n for n, _ in records), tuple(line for _, line in records)
            yield RawChunk(file=file, kind=kind, unit="line", numbers=numbers, items=items, position=source.position())
            first += len(lines)


def _array_blocks(file: Path, source: Unpacked) -> Iterator[bytes]:
    blocks = iter(functools.partial(source.stream.read, BLOCK_BYTES), b"")
    for block in itertools.islice(blocks, 1):
        yield _without_mark(file, block)
    yield from blocks


def _starts_array(file: Path) -> bool:
    with unpacked(file) as source:
        texts = (block.lstrip() for block in _array_blocks(file, source))
        return next(filter(None, texts), b"").startswith(b"[")


def _array_chunks(file: Path) -> Iterator[RawChunk]:
    with unpacked(file) as source:
        elements = array_elements(_array_blocks(file, source), file)
        yield from _item_chunks(file, "json", "element", elements, source)


def _without_mark(file: Path, start: bytes) -> bytes:
    """The start of a file without a UTF-8 byte order mark; a file in UTF-16 is refused."""
    if start.startswith(UTF16_MARKS):
        raise InputError(f"{file}: expected UTF-8, found UTF-16; convert the file")
    return start.removeprefix(UTF8_MARK)


# ------------------------------------------------------------------------------------------------ CSV


def _csv_chunks(file: Path, columns: Collection[str] | None) -> Iterator[RawChunk]:
    with unpacked(file) as source:
        yield from _item_chunks(file, "row", "row", _csv_rows(file, source, columns), source)


def _csv_rows(file: Path, source: Unpacked, columns: Collection[str] | None) -> Iterator[dict[str, str | None] | str]:
    """Column -> cell, of the columns that are read; or why the row cannot be used."""
    csv.field_size_limit(CELL_CHARACTERS)
    delimiter = "\t" if format_suffix(file) == ".tsv" else ","
    reader = csv.reader(_csv_lines(file, source), delimiter=delimiter, strict=True)
    rows = filter(None, reader)  # without blank lines
    try:
        header = next(rows, [])
        if not header or "" in header or len(set(header)) < len(header):
            raise InputError(
                f"{file}: expected a first row with different names of columns, found {header}; name each column once"
            )
        wanted = _wanted(file, header, columns)
        for cells in rows:
            yield _csv_row(header, cells, wanted)
    except csv.Error as error:  # where the next row begins is unknown: reading on could make records of its pieces
        raise InputError(
            f"{file}, line {reader.line_num}: expected quotes only around whole cells and doubled inside, found "
            f"them broken ({error}); correct the file"
        ) from None


def _csv_row(header: list[str], cells: list[str], wanted: Collection[str]) -> dict[str, str | None] | str:
    if len(cells) != len(header):
        return f"expected {len(header)} cells, as many as in the header, found {len(cells)}"
    row = {name: cell or None for name, cell in zip(header, cells, strict=True) if name in wanted}
    try:
        "".join(filter(None, row.values())).encode()
    except UnicodeEncodeError:  # bytes that were no UTF-8 have become surrogates
        return "expected UTF-8, found it broken"
    return row


def _csv_lines(file: Path, source: Unpacked) -> Iterator[str]:
    for number, line in enumerate(source.stream, 1):
        text = _without_mark(file, line) if number == 1 else line
        if b"\0" in text:
            raise InputError(f"{file}, line {number}: expected text in UTF-8, found a NUL; convert the file")
        yield text.decode(errors="surrogateescape")


# ------------------------------------------------------------------------------------ Parquet, Arrow


def _parquet_chunks(file: Path, columns: Collection[str] | None) -> Iterator[RawChunk]:
    # with a buffer size, a column of a row group is read piece by piece, and not whole into memory
    with seekable(file) as source, pq.ParquetFile(source, buffer_size=BLOCK_BYTES) as parquet:
        wanted = _wanted(file, parquet.schema_arrow.names, columns)
        num_rows, first = parquet.metadata.num_rows, 1
        for rows in parquet.iter_batches(_rows_at_once(parquet.metadata, wanted), columns=wanted):
            numbers = range(first, first + rows.num_rows)
            position = file.stat().st_size * (numbers.stop - 1) // num_rows
            yield RawChunk(file=file, kind="row", unit="row", numbers=numbers, rows=rows, position=position)
            first = numbers.stop


def _rows_at_once(metadata: pq.FileMetaData, wanted: Collection[str]) -> int:
    """By the size of the wanted columns in the first row group."""
    if not metadata.num_row_groups:
        return ROWS_PER_CHUNK
    group = metadata.row_group(0)
    columns = map(group.column, range(group.num_columns))
    sizes = (column.total_uncompressed_size for column in columns if column.path_in_schema.split(".")[0] in wanted)
    return _rows_per_chunk(group.num_rows, sum(sizes))


def _arrow_chunks(file: Path, columns: Collection[str] | None) -> Iterator[RawChunk]:
    first = 1
    for batch, position in arrow_batches(file):
        read = batch.select(_wanted(file, batch.schema.names, columns))
        size = _rows_per_chunk(read.num_rows, read.nbytes)
        for start in range(0, read.num_rows, size):
            rows = _copy(read.slice(start, size))
            numbers = range(first, first + rows.num_rows)
            yield RawChunk(file=file, kind="row", unit="row", numbers=numbers, rows=rows, position=position)
            first = numbers.stop


def _rows_per_chunk(num_rows: int, num_bytes: int) -> int:
    return max(1, min(ROWS_PER_CHUNK, BLOCK_BYTES * num_rows // max(num_bytes, 1)))


def _copy(rows: pa.RecordBatch) -> pa.RecordBatch:
    """The rows in memory of their own: a slice keeps its whole batch, and takes it along to another process."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema) as stream:
        stream.write_batch(rows)
    return pa.ipc.open_stream(sink.getvalue()).read_next_batch()


def row_items(rows: pa.RecordBatch) -> list[Any]:
    """The rows as dicts; in place of one with a value that Python cannot hold, the reason."""
    try:
        return list(rows.to_pylist())
    except (ValueError, OverflowError) as error:  # broken UTF-8, or a date beyond the year 9999
        if rows.num_rows == 1:
            return [f"expected a value that can be read, found {error}"]
        return [item for row in range(rows.num_rows) for item in row_items(rows.slice(row, 1))]
