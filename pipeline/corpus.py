"""Files -> records -> tokens -> packed sequences: the only place where targets are shifted.

A record is rejected, never silently changed: `Rejections` either stops with file, line and reason, or counts.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import io
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.config import TextConfig
from pipeline.runtime import file_hash
from pipeline.types import UNKNOWN_TARGET, InputError, Record, TokenSequence

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".txt")
OPEN_WINDOWS = 32  # windows that may still take a segment: packs tightly, stays a function of a few records
RECORDS_PER_CALL = 1024  # records handed to the tokenizer at once

Raw = tuple[str, str, Any]  # (place, "json" | "text" | "row", unparsed bytes or a Parquet row)


class Rejections:
    """What to do with a record that cannot be used: stop, or count it and go on."""

    def __init__(self, *, skip: bool) -> None:
        self.skip, self.count = skip, 0

    def reject(self, where: str, reason: str) -> None:
        """Stop with the place and the reason, or count."""
        if not self.skip:
            raise InputError(f"{where}: {reason}; mend the record, or set malformed=skip to count such and go on")
        self.count += 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """One record's tokens (or one window's worth of a long text) and its targets, shifted here for good."""

    record_id: int
    ids: tuple[int, ...]
    targets: tuple[tuple[int, int], ...]
    """(position s, token s+1), ascending in s."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """A text as it is to be read; its files exist."""

    what: str
    """corpus, gold, dev or test, for messages."""
    files: tuple[Path, ...]
    columns: Mapping[str, str]
    """The input's name for each of text, prompt, completion, messages, choices and answer."""
    targets: str
    """all, completion or next."""
    end_token: bool
    skip_malformed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What a text is, whatever its files are called."""

    num_records: int
    """Malformed ones included."""
    sha256: str
    """Over the hash of each file, in order."""


# ---------------------------------------------------------------------------------------------- files


def open_text(config: TextConfig, what: str) -> Text:
    """From options to a value: find the files of paths, folders and globs, sorted within each."""
    files: list[Path] = []
    for pattern in config.files:
        found = sorted(Path(name) for name in glob.glob(pattern, recursive=True))
        if not found:
            raise InputError(f"{what}: expected {pattern!r} to be a file, a folder or a glob, found nothing there")
        for path in found:
            inside = sorted(path.rglob("*")) if path.is_dir() else [path]
            files += [file for file in inside if file.is_file() and file.name.endswith(SUFFIXES)]
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


def survey(text: Text, tokenizer: Any) -> Survey:
    """Parse every record once and hash the content, before anything expensive; refuses an empty text."""
    rejections = Rejections(skip=text.skip_malformed)
    num_records = sum(1 for _ in parse_records(raw_records(text.files), text, tokenizer, rejections))
    if num_records == 0:
        raise InputError(f"{text.what}: expected records, found none in {', '.join(map(str, text.files))}")
    joined = "".join(file_hash(file) for file in text.files)
    return Survey(num_records=num_records + rejections.count, sha256=hashlib.sha256(joined.encode()).hexdigest())


def raw_records(files: Sequence[Path]) -> Iterator[Raw]:
    """Place, kind and unparsed content of every record; blank lines are no records."""
    for file in files:
        if file.name.endswith(".parquet"):
            rows = itertools.chain.from_iterable(b.to_pylist() for b in pq.ParquetFile(file).iter_batches(1024))
            yield from ((f"{file}, row {number}", "row", row) for number, row in enumerate(rows, 1))
            continue
        kind = "text" if file.suffix == ".txt" else "json"
        compression = {".gz": "gzip", ".zst": "zstd"}.get(file.suffix)
        with pa.input_stream(str(file), compression=compression) as stream:
            for number, line in enumerate(io.BufferedReader(stream, 1 << 20), 1):
                if line.strip():
                    yield f"{file}, line {number}", kind, line


# -------------------------------------------------------------------------------------------- records


def parse_records(
    raw: Iterable[Raw], text: Text, tokenizer: Any, rejections: Rejections, *, first_id: int = 0
) -> Iterator[Record]:
    """Raw lines -> records, numbered from `first_id`; what is malformed goes to `rejections`."""
    for record_id, (where, kind, content) in enumerate(raw, first_id):
        try:
            row = content if kind == "row" else _row(kind, content, text.columns)
            yield _record(row, where, record_id, text.columns, tokenizer)
        except InputError as error:
            rejections.reject(where, str(error))


def read_records(text: Text, tokenizer: Any) -> list[Record]:
    """All records of a text, in memory; refuses an empty one."""
    rejections = Rejections(skip=text.skip_malformed)
    records = list(parse_records(raw_records(text.files), text, tokenizer, rejections))
    if not records:
        raise InputError(f"{text.what}: expected records, found none in {', '.join(map(str, text.files))}")
    return records


def _row(kind: str, line: bytes, columns: Mapping[str, str]) -> dict[str, Any]:
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


def _record(row: dict[str, Any], where: str, record_id: int, columns: Mapping[str, str], tokenizer: Any) -> Record:
    prompt, completion, templated = _said(row, columns, tokenizer)
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


def _said(row: dict[str, Any], columns: Mapping[str, str], tokenizer: Any) -> tuple[str | None, str | None, bool]:
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
    shaped = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )
    if not shaped or not messages:
        raise InputError("expected messages as a list of {role, content}, found something else")
    if not tokenizer.chat_template:
        raise InputError("expected a tokenizer with a chat template, because records hold messages, found none")

    def render(some: list[dict[str, str]], add_generation_prompt: bool) -> str:
        return tokenizer.apply_chat_template(some, tokenize=False, add_generation_prompt=add_generation_prompt)

    if messages[-1]["role"] != "assistant":
        return render(messages, True), None
    prompt, whole = render(messages[:-1], True), render(messages, False)
    if not whole.startswith(prompt):
        raise InputError("expected the chat template to extend the prompt by the answer, found it rewritten")
    return prompt, whole[len(prompt) :]


def _choices(row: dict[str, Any], columns: Mapping[str, str]) -> tuple[tuple[str, ...], int | None]:
    choices = row.get(columns["choices"]) or []
    answer = row.get(columns["answer"])
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


# --------------------------------------------------------------------------------------------- tokens


def segments(
    records: Iterable[Record],
    text: Text,
    tokenizer: Any,
    rejections: Rejections,
    *,
    window: int,
    require_targets: bool = False,
) -> Iterator[Segment]:
    """Records -> segments no longer than the window, with their targets.

    Plain text longer than the window is split into segments that overlap by
    one token, so that every token is a target once; a record with a prompt must fit. With `require_targets`
    a record whose truth is unknown is rejected.
    """
    records = iter(records)
    while some := list(itertools.islice(records, RECORDS_PER_CALL)):
        for record, (head, tail) in zip(some, _encode(some, tokenizer, text.end_token), strict=True):
            try:
                yield from _segments_of(record.record_id, head, tail, window, text.targets, require_targets)
            except InputError as error:
                rejections.reject(record.where, str(error))


def _encode(records: list[Record], tokenizer: Any, end_token: bool) -> list[tuple[list[int], list[int] | None]]:
    """(prompt ids, completion ids) of each record; plain text is a completion after an empty prompt."""
    end = [tokenizer.eos_token_id] if end_token else []

    def ids(texts: list[str], special: bool) -> list[list[int]]:
        return tokenizer(texts, add_special_tokens=special)["input_ids"] if texts else []

    by_special: dict[bool, list[str]] = {True: [], False: []}
    plan: list[tuple[tuple[bool, int] | None, tuple[bool, int] | None]] = []
    for record in records:
        places: list[tuple[bool, int] | None] = []
        for text, starts in ((record.prompt, True), (record.completion, record.prompt is None)):
            special = starts and not record.templated
            places.append(None if text is None else (special, len(by_special[special])))
            if text is not None:
                by_special[special].append(text)
        plan.append((places[0], places[1]))
    encoded = {special: ids(texts, special) for special, texts in by_special.items()}
    return [
        (
            [] if prompt is None else encoded[prompt[0]][prompt[1]],
            None
            if completion is None
            # a templated completion brings the template's own end of turn
            else encoded[completion[0]][completion[1]] + ([] if record.templated else end),
        )
        for record, (prompt, completion) in zip(records, plan, strict=True)
    ]


def _segments_of(
    record_id: int, head: list[int], tail: list[int] | None, window: int, targets: str, require_targets: bool
) -> Iterator[Segment]:
    is_text = not head
    if tail is None and (require_targets or targets == "completion"):
        raise InputError("expected a known target, found no completion (nor choices with an answer)")
    if is_text and targets != "all":
        raise InputError(f"expected a prompt, because targets={targets}, found plain text or an empty prompt")
    if targets == "next":
        pairs = [(len(head) - 1, tail[0] if tail else UNKNOWN_TARGET)]
        ids = head
    else:
        ids = head + (tail or [])
        first = 0 if targets == "all" else len(head) - 1
        pairs = [(s, ids[s + 1]) for s in range(first, len(ids) - 1)]
    if not pairs:
        raise InputError(f"expected at least two tokens, found {len(ids)}: nothing to predict")
    if is_text:
        for start in range(0, len(ids) - 1, window - 1):
            part = ids[start : start + window]
            shifted = tuple((s, part[s + 1]) for s in range(len(part) - 1))
            yield Segment(record_id=record_id, ids=tuple(part), targets=shifted)
        return
    if len(ids) > window:
        raise InputError(f"expected at most {window} tokens (window), found {len(ids)}")
    yield Segment(record_id=record_id, ids=tuple(ids), targets=tuple(pairs))


def sequences(
    raw: Iterable[Raw],
    text: Text,
    tokenizer: Any,
    rejections: Rejections,
    *,
    window: int,
    first_id: int = 0,
    require_targets: bool = False,
) -> Iterator[TokenSequence]:
    """The whole way from raw records to packed sequences."""
    records = parse_records(raw, text, tokenizer, rejections, first_id=first_id)
    parts = segments(records, text, tokenizer, rejections, window=window, require_targets=require_targets)
    return pack(parts, window=window)


def known_sequences(text: Text, tokenizer: Any, *, window: int) -> list[TokenSequence]:
    """A whole text, packed; refuses records whose target nobody knows."""
    rejections = Rejections(skip=text.skip_malformed)
    raw = raw_records(text.files)
    packed = list(sequences(raw, text, tokenizer, rejections, window=window, require_targets=True))
    if not packed:
        raise InputError(
            f"{text.what}: expected records with known targets, found none in {list(map(str, text.files))}"
        )
    return packed


# -------------------------------------------------------------------------------------------- packing


def pack(parts: Iterable[Segment], *, window: int) -> Iterator[TokenSequence]:
    """First-fit packing: each segment goes into the oldest of a few open windows that has room for it."""
    open_windows: list[list[Segment]] = []
    for segment in parts:
        room = (w for w in open_windows if sum(len(s.ids) for s in w) + len(segment.ids) <= window)
        chosen = next(room, None)
        if chosen is None:
            open_windows.append(chosen := [])
        chosen.append(segment)
        if len(open_windows) > OPEN_WINDOWS:
            yield sequence(open_windows.pop(0))
    yield from map(sequence, open_windows)


def sequence(parts: Sequence[Segment]) -> TokenSequence:
    """Segments laid end to end."""
    lengths = tuple(len(part.ids) for part in parts)
    starts = itertools.accumulate(lengths, initial=0)
    pairs = [(start + s, t) for start, part in zip(starts, parts, strict=False) for s, t in part.targets]
    ids = np.array([i for part in parts for i in part.ids], dtype=np.int64)
    positions = np.array([s for s, _ in pairs], dtype=np.int64)
    return TokenSequence(
        key=sequence_key(ids, np.array(lengths, dtype=np.int64), positions),
        input_ids_S=torch.from_numpy(ids),
        segment_lengths=lengths,
        record_ids=tuple(part.record_id for part in parts),
        target_positions_N=torch.from_numpy(positions),
        target_ids_N=torch.tensor([t for _, t in pairs], dtype=torch.int64),
    )


def sequence_key(*arrays: np.ndarray) -> bytes:
    """16 bytes over int64 arrays; each is preceded by its length, so that none can run into the next."""
    digest = hashlib.blake2b(digest_size=16)
    for array in arrays:
        digest.update(len(array).to_bytes(8, "little") + array.astype("<i8").tobytes())
    return digest.digest()


def position_ids(segment_lengths: Sequence[int]) -> torch.Tensor:
    """0, 1, 2, ... restarting in every segment: [S] int64."""
    return torch.cat([torch.arange(length) for length in segment_lengths])


def collate_inputs(sequences: Sequence[TokenSequence]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pad at the right: input ids [B, S], position ids [B, S], supervised positions in the flattened B * S [N].

    Padding is one more segment: nothing attends to it and it is never supervised, whatever its token id.
    """
    longest = max(len(sequence.input_ids_S) for sequence in sequences)
    input_ids_BS = torch.zeros(len(sequences), longest, dtype=torch.int64)
    position_ids_BS = torch.zeros_like(input_ids_BS)
    for b, sequence in enumerate(sequences):
        length = len(sequence.input_ids_S)
        input_ids_BS[b, :length] = sequence.input_ids_S
        padding = (longest - length,) if length < longest else ()
        position_ids_BS[b] = position_ids((*sequence.segment_lengths, *padding))
    flat = [b * longest + sequence.target_positions_N for b, sequence in enumerate(sequences)]
    return input_ids_BS, position_ids_BS, torch.cat(flat)
