"""The files that other projects keep of a teacher -> their rows, as they stand there.

Parquet and Arrow are streamed by row group or batch and stay arrays; JSON lines are parsed one at a time.
"""

from __future__ import annotations

import glob
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
from pipeline.core.types import InputError
from pipeline.data.records import all_records
from pipeline.importers.distillkit import Packing, packing_of

SUFFIXES = (".parquet", ".arrow", ".jsonl", ".jsonl.gz", ".jsonl.zst")
SUFFIXES_OF = {"distillkit": (".parquet",), "axolotl_raw": SUFFIXES, "axolotl_prepared": SUFFIXES}
ROWS_PER_BATCH = 64  # a row holds thousands of positions
PACKINGS = ("compression_config.yaml", "compression_config.yml")

Row = Mapping[str, Any]  # column -> an Arrow scalar, or a plain value out of JSON


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A foreign data set as it is to be read; its files exist."""

    files: tuple[Path, ...]
    format: str
    alignment: str | None
    packing: Packing | None
    """DistillKit's bytes; None where its data set was never packed."""
    packing_file: Path | None
    columns: Mapping[str, str]
    """axolotl_raw's name for each of logprobs, messages and text."""
    tokenizer: Any

    @property
    def tail(self) -> str:
        """What is known of the mass outside the kept entries: a Manifest's `tail`."""
        if self.format == "axolotl_prepared":
            return "renormalised"
        return "remainder" if self.packing is None or self.packing.is_exact else "approximate"


def open_source(config: ImportConfig, tokenizer: Any) -> Source:
    """From options to a value: find the files, in the order in which their numbers count, and how they are packed."""
    files = _files(config.source, SUFFIXES_OF[config.format.name])
    packing = packing_file = None
    if config.format.name == "distillkit":
        packing, packing_file = _packing(files[0])
    return Source(
        files=files,
        format=config.format.name,
        alignment=config.alignment and config.alignment.name,
        packing=packing,
        packing_file=packing_file,
        columns={"logprobs": config.logprobs_column, "messages": config.messages_column, "text": config.text_column},
        tokenizer=tokenizer,
    )


def _files(pattern: str, suffixes: tuple[str, ...]) -> tuple[Path, ...]:
    found = [Path(name) for name in glob.glob(pattern, recursive=True)]
    inside = [file for path in found for file in (path.rglob("*") if path.is_dir() else [path])]
    files = [file for file in dict.fromkeys(inside) if file.is_file() and file.name.endswith(suffixes)]
    if not files:
        raise InputError(f"source: expected files ending in {', '.join(suffixes)}, found none in {pattern!r}")
    return tuple(sorted(files, key=lambda file: [(len(part), part) for part in re.split(r"(\d+)", str(file))]))


def _packing(file: Path) -> tuple[Packing | None, Path | None]:
    """How a DistillKit data set is packed; (None, None) if it is not."""
    try:
        names = set(pq.read_schema(file).names)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{file}: expected a readable file, found it damaged ({error}); replace it") from None
    if {"token_ids", "top_values"} <= names:
        return None, None
    if {"packed_indices", "exact_values", "coeffs"} & names:
        raise InputError(
            f"{file}: expected compressed_logprobs or top_values, found DistillKit's legacy columns, which do not say "
            "whether they hold log-probabilities or centred logits; sample the teacher again with a newer DistillKit"
        )
    if not {"input_ids", "compressed_logprobs", "bytepacked_indices"} <= names:
        raise InputError(
            f"{file}: expected the columns input_ids, compressed_logprobs and bytepacked_indices (or token_ids and "
            f"top_values), found {sorted(names)}; check source and format"
        )
    path = next((file.parent / name for name in PACKINGS if (file.parent / name).exists()), None)
    if path is None:
        raise InputError(f"{file.parent}: expected {PACKINGS[0]} beside the data, found none; nothing else unpacks it")
    try:
        plain = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # whatever a YAML reader raises for what is no YAML
        raise InputError(f"{path}: expected plain YAML, found it broken ({error})") from None
    return packing_of(plain, str(path)), path


def rows(source: Source, records: range) -> Iterator[tuple[str, Row]]:
    """(place, row) of the source rows in a range; row groups and batches outside it are not read."""
    first = 0
    for file in source.files:
        try:
            if file.name.endswith(".parquet"):
                count = yield from _parquet_rows(file, records, first)
            elif file.name.endswith(".arrow"):
                count = yield from _arrow_rows(file, records, first)
            else:
                count = yield from _json_rows(file, records, first)
        except (OSError, EOFError, pa.ArrowException) as error:
            raise InputError(f"{file}: expected a readable file, found it damaged ({error}); replace it") from None
        first += count
        if first >= records.stop:
            return


def _parquet_rows(file: Path, records: range, first: int) -> Generator[tuple[str, Row], None, int]:
    opened, at = pq.ParquetFile(file), 0
    for group in range(opened.num_row_groups):
        count = opened.metadata.row_group(group).num_rows
        if first + at < records.stop and first + at + count > records.start:
            begin = at
            for batch in opened.iter_batches(ROWS_PER_BATCH, row_groups=[group]):
                yield from _batch_rows(file, batch, records, first, begin)
                begin += batch.num_rows
        at += count
    return at


def _arrow_rows(file: Path, records: range, first: int) -> Generator[tuple[str, Row], None, int]:
    at = 0
    with pa.memory_map(str(file)) as mapped:
        is_file = mapped.read(6) == b"ARROW1"
        mapped.seek(0)
        opened = pa.ipc.open_file(mapped) if is_file else pa.ipc.open_stream(mapped)
        batches = map(opened.get_batch, range(opened.num_record_batches)) if is_file else opened
        for batch in batches:
            yield from _batch_rows(file, batch, records, first, at)
            at += batch.num_rows
    return at


def _batch_rows(file: Path, batch: pa.RecordBatch, records: range, first: int, begin: int) -> Iterator[tuple[str, Row]]:
    for r in range(batch.num_rows):
        if first + begin + r in records:
            row = {name: batch.column(name)[r] for name in batch.schema.names}
            yield f"{file}, row {begin + r + 1}", {name: value for name, value in row.items() if value.is_valid}


def _json_rows(file: Path, records: range, first: int) -> Generator[tuple[str, Row], None, int]:
    at = 0
    for where, _, line in all_records([file]):
        if first + at in records:
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InputError(f"{where}: expected a JSON object, found it broken ({error})") from None
            if not isinstance(row, dict):
                raise InputError(f"{where}: expected a JSON object, found {type(row).__name__}")
            yield where, {name: value for name, value in row.items() if value is not None}
        at += 1
        if first + at >= records.stop:
            break
    return at
