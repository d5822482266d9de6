"""Files -> records, for both stages and for scoring.

A record that cannot be used is never changed silently: `MalformedRecords` stops with file, line and reason, or counts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import io
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config.schema import TextConfig
from pipeline.core.progress import log
from pipeline.core.types import InputError, Record

LINES_PER_CHUNK = 1024
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".txt")

Raw = tuple[str, str, Any]  # (place, "json" | "text" | "row", unparsed bytes or a Parquet row)


class MalformedRecords:
    """The policy for a record that cannot be used: stop, or skip and count it."""

    def __init__(self, *, skip: bool) -> None:
        self.skip, self.count = skip, 0

    def reject(self, where: str, reason: str) -> None:
        """Stop with the place and the reason, or count the record."""
        if not self.skip:
            raise InputError(f"{where}: {reason}; fix the record, or set malformed=skip to skip and count bad records")
        self.count += 1

    def log_count(self, what: str) -> None:
        """Warn of the number of skipped records."""
        if self.count:
            log.warning("%s: %d malformed records skipped", what, self.count)


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """A text and how it is read; its files exist."""

    what: str
    """corpus, gold, dev or test, for messages."""
    files: tuple[Path, ...]
    columns: Mapping[str, str]
    """The name of the input's column for each of text, prompt, completion, messages, choices and answer."""
    targets: str
    """all, completion or next."""
    end_token: bool
    skip_malformed: bool
    completes: bool = False
    """Records with a prompt alone are completed by the teacher."""


# ---------------------------------------------------------------------------------------------- files


def open_text(config: TextConfig, what: str) -> Text:
    """From options to a value: the files of all paths, folders and globs, sorted within each."""
    files: list[Path] = []
    for pattern in config.files:
        found = sorted(Path(name) for name in glob.glob(pattern, recursive=True))
        if not found:
            raise InputError(f"{what}: expected {pattern!r} to be a file, a folder or a glob, found nothing there")
        for path in found:
            if path.is_dir():
                files += [file for file in sorted(path.rglob("*")) if file.is_file() and file.name.endswith(SUFFIXES)]
            elif path.name.endswith(SUFFIXES):
                files.append(path)
            else:
                raise InputError(f"{what}: expected a file ending in {', '.join(SUFFIXES)}, found {path}")
    files = list(dict.fromkeys(files))  # patterns may overlap; a file is read once
    if not files:
        raise InputError(f"{what}: expected files ending in {', '.join(SUFFIXES)}, found none in {config.files}")
    return Text(
        what=what,
        files=tuple(files),
        columns=dataclasses.asdict(config.columns),
        targets=config.targets.name,
        end_token=config.end_token,
        skip_malformed=config.malformed.name == "skip",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RawChunk:
    """Consecutive records of one file, not yet parsed: small to send to another process."""

    file: Path
    kind: str
    """json or text: `lines` holds them; row: rows of a Parquet file, read when they are needed."""
    numbers: Sequence[int]
    """1-based line or row of each record."""
    lines: tuple[bytes, ...] = ()


def read_chunks(files: Sequence[Path], *, size: int) -> Iterator[list[RawChunk]]:
    """The records of some files in groups of `size` (the last may be smaller); blank lines do not count."""
    group: list[RawChunk] = []
    missing = size
    for file in files:
        with _readable(file):
            chunks = _parquet_chunks(file) if file.name.endswith(".parquet") else _line_chunks(file)
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
        if chunk.kind != "row":
            for number, line in zip(chunk.numbers, chunk.lines, strict=True):
                yield f"{chunk.file}, line {number}", chunk.kind, line
            continue
        with _readable(chunk.file):
            for number, row in zip(chunk.numbers, _read_parquet_rows(chunk.file, chunk.numbers), strict=True):
                yield f"{chunk.file}, row {number}", "row", row


def all_records(files: Sequence[Path]) -> Iterator[Raw]:
    """Every record of some files, in order."""
    return itertools.chain.from_iterable(map(raw_records, read_chunks(files, size=LINES_PER_CHUNK)))


@contextlib.contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, pa.ArrowException) as error:
        raise InputError(f"{file}: expected a readable file, found it damaged ({error}); replace it") from None


def _cut(chunk: RawChunk, start: int, stop: int) -> RawChunk:
    return RawChunk(file=chunk.file, kind=chunk.kind, numbers=chunk.numbers[start:stop], lines=chunk.lines[start:stop])


def _parquet_chunks(file: Path) -> Iterator[RawChunk]:
    yield RawChunk(file=file, kind="row", numbers=range(1, pq.read_metadata(file).num_rows + 1))


def _read_parquet_rows(file: Path, numbers: Sequence[int]) -> Iterator[Any]:
    """Rows of a Parquet file, reading only the row groups that hold them."""
    parquet = pq.ParquetFile(file)
    sizes = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
    starts = list(itertools.accumulate(sizes, initial=0))
    first, stop = numbers[0] - 1, numbers[-1]
    wanted = [g for g, size in enumerate(sizes) if starts[g] < stop and first < starts[g] + size]
    batches = parquet.iter_batches(1024, row_groups=wanted)
    rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
    return itertools.islice(rows, first - starts[wanted[0]], stop - starts[wanted[0]])


def _line_chunks(file: Path) -> Iterator[RawChunk]:
    kind = "text" if file.suffix == ".txt" else "json"
    compression = {".gz": "gzip", ".zst": "zstd"}.get(file.suffix)
    with pa.input_stream(str(file), compression=compression) as stream:
        numbered = enumerate(io.BufferedReader(stream, 1 << 20), 1)
        while some := list(itertools.islice(numbered, LINES_PER_CHUNK)):
            records = [(number, line) for number, line in some if line.strip()]
            numbers, lines = tuple(n for n, _ in records), tuple(line for _, line in records)
            yield RawChunk(file=file, kind=kind, numbers=numbers, lines=lines)


# -------------------------------------------------------------------------------------------- records


def parse_records(
    raw: Iterable[Raw], text: Text, tokenizer: Any, malformed: MalformedRecords, *, first_id: int = 0
) -> Iterator[Record]:
    """Raw lines -> records, numbered from `first_id`; bad ones go to `malformed`."""
    for record_id, (where, kind, content) in enumerate(raw, first_id):
        try:
            row = content if kind == "row" else _parse_line(kind, content, text.columns)
            yield _record_from_row(row, where, record_id, text.columns, tokenizer)
        except InputError as error:
            malformed.reject(where, str(error))


def read_records(text: Text, tokenizer: Any) -> list[Record]:
    """All records of a text, in memory; refuses an empty one."""
    malformed = MalformedRecords(skip=text.skip_malformed)
    records = list(parse_records(all_records(text.files), text, tokenizer, malformed))
    if not records:
        raise InputError(f"{text.what}: expected records, found none in {', '.join(map(str, text.files))}")
    malformed.log_count(text.what)
    return records


def _parse_line(kind: str, line: bytes, columns: Mapping[str, str]) -> dict[str, Any]:
    try:
        if kind == "text":
            return {columns["text"]: line.decode().rstrip("\r\n")}
        row = json.loads(line)
    except ValueError as error:
        raise InputError(
            f"expected {'UTF-8' if kind == 'text' else 'a JSON object'}, found it broken ({error})"
        ) from None
    if not isinstance(row, dict):
        raise InputError(f"expected a JSON object, found {type(row).__name__}")
    return row


def _record_from_row(
    row: dict[str, Any], where: str, record_id: int, columns: Mapping[str, str], tokenizer: Any
) -> Record:
    prompt, completion, templated = _prompt_and_completion(row, columns, tokenizer)
    choices, answer = _choices(row, columns)
    if prompt is not None and completion is None and answer is not None:
        completion = choices[answer]
    return Record(
        record_id=record_id,
        prompt=prompt,
        completion=completion,
        choices=choices,
        answer=answer,
        where=where,
        templated=templated,
    )


def _prompt_and_completion(
    row: dict[str, Any], columns: Mapping[str, str], tokenizer: Any
) -> tuple[str | None, str | None, bool]:
    kinds = {kind: columns[kind] for kind in ("text", "prompt", "messages")}
    present = [kind for kind, column in kinds.items() if row.get(column) is not None]
    if len(present) != 1:
        raise InputError(
            f"expected exactly one of the columns {list(kinds.values())}, found {sorted(row)}; "
            "name yours with columns.text, columns.prompt or columns.messages"
        )
    if present == ["messages"]:
        return *_chat(row[columns["messages"]], tokenizer), True
    if present == ["text"]:
        return None, _string(row, columns["text"]), False
    completion = _string(row, columns["completion"]) if row.get(columns["completion"]) is not None else None
    return _string(row, columns["prompt"]), completion, False


def _chat(messages: Any, tokenizer: Any) -> tuple[str, str | None]:
    is_chat = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )
    if not is_chat or not messages:
        raise InputError("expected messages as a list of {role, content}, found something else")
    if not tokenizer.chat_template:
        raise InputError("expected a tokenizer with a chat template, because records hold messages, found none")

    def render(part: list[dict[str, str]], add_generation_prompt: bool) -> str:
        try:
            return tokenizer.apply_chat_template(part, tokenize=False, add_generation_prompt=add_generation_prompt)
        except Exception as error:  # a template is a program, which may raise anything
            raise InputError(f"expected messages that the chat template accepts, found: {error}") from None

    if messages[-1]["role"] != "assistant":
        return render(messages, True), None
    prompt, chat = render(messages[:-1], True), render(messages, False)
    if not chat.startswith(prompt):
        raise InputError("expected the chat template to extend the prompt by the answer, found it rewritten")
    return prompt, chat[len(prompt) :]


def _choices(row: dict[str, Any], columns: Mapping[str, str]) -> tuple[tuple[str, ...], int | None]:
    choices = row.get(columns["choices"]) or []
    answer = row.get(columns["answer"]) if choices else None
    if not isinstance(choices, list) or not all(isinstance(choice, str) and choice for choice in choices):
        raise InputError(f"column {columns['choices']!r}: expected a list of strings, found {choices!r}")
    if len(set(choices)) != len(choices):
        raise InputError(f"column {columns['choices']!r}: expected different choices, found {choices!r}")
    if answer is not None and (type(answer) is not int or not 0 <= answer < len(choices)):
        raise InputError(
            f"column {columns['answer']!r}: expected an index into {len(choices)} choices, found {answer!r}"
        )
    return tuple(choices), answer


def _string(row: dict[str, Any], column: str) -> str:
    if not isinstance(row[column], str) or not row[column]:
        raise InputError(f"column {column!r}: expected text, found {row[column]!r}")
    return row[column]
