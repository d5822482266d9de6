"""How many records some files hold: exact where that is quick, else estimated from the beginning of each file."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq

from pipeline.core.types import InputError
from pipeline.data.file_kinds import endings, file_format, readable, seekable
from pipeline.data.raw_chunks import file_chunks
from pipeline.data.text_files import Text

HEAD_BYTES = 4 << 20  # read of each file, to estimate the bytes per record


def count_records(text: Text) -> tuple[bool, float]:
    """(exact, number of records that are read): from the footer of Parquet files; of others from their beginning."""
    exact, count = True, 0.0
    for file in text.files:
        with readable(file):
            if file_format(file) == "parquet":
                with seekable(file) as source:
                    count += pq.read_metadata(source).num_rows
                continue
            read_to_end, num_records = _count_from_beginning(file)
            exact, count = exact and read_to_end, count + num_records
    if not count:
        raise InputError(f"corpus: expected records in files ending in {endings()}, found none")
    return exact, count if text.take is None else min(count, text.take)


def _count_from_beginning(file: Path) -> tuple[bool, float]:
    """(whether the whole file was read, number of records)."""
    num_read = 0
    for chunk in file_chunks(file):
        num_read += len(chunk.numbers)
        if chunk.position >= HEAD_BYTES:
            return False, num_read * file.stat().st_size / chunk.position
    return True, num_read
