"""Files with a teacher's outputs from other projects -> their rows, not yet decoded.

Parquet and Arrow files are read by row group or batch and their values stay Arrow's; JSON lines are parsed one by one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from omegaconf import OmegaConf

from pipeline.config.schema import ImportConfig
from pipeline.core.files import matching_paths
from pipeline.core.types import InputError
from pipeline.data.file_kinds import arrow_batches, endings, file_format, files_in, readable, seekable
from pipeline.data.text_files import all_records
from pipeline.importers.distillkit import Compression, parse_compression

FILE_FORMATS = {
    "distillkit": ("parquet",),
    "axolotl_raw": ("parquet", "arrow", "json"),
    "axolotl_prepared": ("parquet", "arrow", "json"),
}
ROWS_PER_BATCH = 64  # a row holds thousands of positions
COMPRESSION_FILES = ("compression_config.yaml", "compression_config.yml")

Row = Mapping[str, Any]  # column -> an Arrow scalar, or a plain value out of JSON


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignSource:
    """A data set of another project and how to read it; its files exist."""

    files: tuple[Path, ...]
    format: str
    alignment: str | None
    compression: Compression | None
    """How DistillKit compressed the data set; None if it did not."""
    compression_file: Path | None
    columns: Mapping[str, str]
    """The names of the columns logprobs, messages and text in an axolotl_raw data set."""
    tokenizer: Any

    @property
    def tail(self) -> str:
        """What is known of the mass outside the kept entries: a Manifest's `tail`."""
        if self.format == "axolotl_prepared":
            return "renormalised"
        return "remainder" if self.compression is None or self.compression.is_exact else "approximate"


def open_source(config: ImportConfig, tokenizer: Any) -> ForeignSource:
    """Find the files, in the order of the numbers in their names, and DistillKit's compression."""
    files = _files(config.source, FILE_FORMATS[config.format.name])
    compression = compression_file = None
    if config.format.name == "distillkit":
        compression, compression_file = _compression(files[0])
    return ForeignSource(
        files=files,
        format=config.format.name,
        alignment=config.alignment and config.alignment.name,
        compression=compression,
        compression_file=compression_file,
        columns={"logprobs": config.logprobs_column, "messages": config.messages_column, "text": config.text_column},
        tokenizer=tokenizer,
    )


def _files(pattern: str, formats: tuple[str, ...]) -> tuple[Path, ...]:
    candidates = [
        file for path in matching_paths(pattern) for file in (files_in(path, formats) if path.is_dir() else [path])
    ]
    files = [file for file in dict.fromkeys(candidates) if file.is_file() and file_format(file) in formats]
    if not files:
        raise InputError(f"source: expected files ending in {endings(formats)}, found none in {pattern!r}")
    # data_2 before data_10: the parts between the digits are equal, and the shorter number is the smaller one
    return tuple(sorted(files, key=lambda file: [(len(part), part) for part in re.split(r"(\d+)", str(file))]))


def _compression(file: Path) -> tuple[Compression | None, Path | None]:
    """A DistillKit data set's compression and the file that describes it; (None, None) if it is not compressed."""
    with readable(file), seekable(file) as source:
        names = set(pq.read_schema(source).names)
    if {"token_ids", "top_values"} <= names:
        return None, None
    if {"packed_indices", "exact_values", "coeffs"} & names:
        raise InputError(
            f"{file}: expected compressed_logprobs or top_values, found DistillKit's legacy columns, which may hold "
            "log-probabilities or centred logits; sample the teacher again with a newer DistillKit"
        )
    if not {"input_ids", "compressed_logprobs", "bytepacked_indices"} <= names:
        raise InputError(
            f"{file}: expected the columns input_ids, compressed_logprobs and bytepacked_indices (or token_ids and "
            f"top_values), found {sorted(names)}; check source and format"
        )
    path = next((file.parent / name for name in COMPRESSION_FILES if (file.parent / name).exists()), None)
    if path is None:
        raise InputError(
            f"{file.parent}: expected {COMPRESSION_FILES[0]} beside the data, found none; add the file that DistillKit "
            "wrote with the data"
        )
    try:
        plain = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # a YAML reader raises errors of many types
        raise InputError(f"{path}: expected plain YAML, found it broken ({error})") from None
    return parse_compression(plain, str(path)), path


def read_rows(source: ForeignSource, records: range) -> Iterator[tuple[str, Row]]:
    """(file and row for messages, row) of the source rows in a range; row groups outside it are not read."""
    first = 0  # of this file, counted over all files
    for file in source.files:
        # the rows of this file: after 50 rows in earlier files, rows 70 to 99 are its rows 20 to 49
        selected = range(records.start - first, records.stop - first)
        with readable(file):
            match file_format(file):
                case "parquet":
                    num_rows = yield from _parquet_rows(file, selected)
                case "arrow":
                    num_rows = yield from _arrow_rows(file, selected)
                case _:
                    num_rows = yield from _json_rows(file, selected)
        first += num_rows
        if first >= records.stop:
            return


def _parquet_rows(file: Path, selected: range) -> Generator[tuple[str, Row], None, int]:
    """The selected rows of a file; returns the number of all its rows, as the two functions below do."""
    group_start = 0
    with seekable(file) as source, pq.ParquetFile(source) as opened:
        for group in range(opened.num_row_groups):
            group_end = group_start + opened.metadata.row_group(group).num_rows
            if group_start < selected.stop and group_end > selected.start:
                start = group_start
                for batch in opened.iter_batches(ROWS_PER_BATCH, row_groups=[group]):
                    yield from _batch_rows(file, batch, start, selected)
                    start += batch.num_rows
            group_start = group_end
    return group_start


def _arrow_rows(file: Path, selected: range) -> Generator[tuple[str, Row], None, int]:
    start = 0
    for batch, _ in arrow_batches(file):
        yield from _batch_rows(file, batch, start, selected)
        start += batch.num_rows
    return start


def _batch_rows(file: Path, batch: pa.RecordBatch, start: int, selected: range) -> Iterator[tuple[str, Row]]:
    """The selected rows of a batch whose first row is row `start` of the file; without the columns that are null."""
    for r in range(batch.num_rows):
        if start + r in selected:
            row = {name: batch.column(name)[r] for name in batch.schema.names}
            yield f"{file}, row {start + r + 1}", {name: value for name, value in row.items() if value.is_valid}


def _json_rows(file: Path, selected: range) -> Generator[tuple[str, Row], None, int]:
    """The selected lines or elements; reading stops after the last of them, and returns the number of those read."""
    num_read = 0
    for where, _, line in all_records([file]):
        if num_read in selected:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{where}: expected a JSON object, found it broken ({error})") from None
            if not isinstance(row, dict):
                raise InputError(f"{where}: expected a JSON object, found {type(row).__name__}")
            yield where, {name: value for name, value in row.items() if value is not None}
        num_read += 1
        if num_read >= selected.stop:
            break
    return num_read
