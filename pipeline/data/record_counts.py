"""How many records some files hold: exact where that is quick, else estimated from the beginning of each file."""

from __future__ import annotations

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.types import InputError
from pipeline.data.text_files import COMPRESSIONS, SUFFIXES, Text

HEAD_BYTES = 4 << 20  # read of each file, to estimate the bytes per record


def count_records(text: Text) -> tuple[bool, float]:
    """(exact, number of records): from the footer of Parquet files; of other files estimated from their beginning."""
    exact, count = True, 0.0
    for file in text.files:
        if file.suffix.lower() == ".parquet":
            count += pq.read_metadata(file).num_rows
            continue
        size = file.stat().st_size
        with file.open("rb") as stream:
            head = stream.read(HEAD_BYTES)
        lines = sum(bool(line.strip()) for line in _unpacked(file, head).splitlines())
        exact = exact and len(head) == size
        count += lines * size / max(len(head), 1)
    if not count:
        raise InputError(f"corpus: expected records in files ending in {', '.join(SUFFIXES)}, found none")
    return exact, count


def _unpacked(file: Path, head: bytes) -> bytes:
    """The beginning of a file, decompressed as far as it goes."""
    compression = COMPRESSIONS.get(file.suffix.lower())
    if compression is None:
        return head
    found = io.BytesIO()
    with pa.CompressedInputStream(pa.BufferReader(head), compression) as stream:
        try:
            while some := stream.read(1 << 16):
                found.write(some)
        except (OSError, pa.ArrowException):
            pass  # the part that was read ends in the middle of a block
    return found.getvalue()
