"""Shard schema, version 1: sequences with their captured distributions <-> Arrow tables.

Typed flat lists, so that plain polars, DuckDB or `datasets` read a shard with no code of ours. Row r of a
shard holds N positions, K entries each: entry j of position n lies at n * K + j of `topk_ids`. Where the number
kept varies (sampled, hybrid, imported), `kept_counts` holds it, and the entries of all positions follow one another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipeline.core.types import Captured, TokenSequence, TopK

SCHEMA_VERSION = 1


def _list(kind: pa.DataType) -> pa.DataType:
    """A list without holes: levels that say so take no space, and reading is a quarter faster."""
    return pa.list_(pa.field("element", kind, nullable=False))


SEQUENCE_COLUMNS = {
    "key": pa.binary(16),
    "record_ids": _list(pa.int64()),
    "segment_lengths": _list(pa.int32()),
    "input_ids": _list(pa.int32()),
    "target_positions": _list(pa.int32()),
    "target_ids": _list(pa.int32()),
}


# The bytes of a value apart, because the high ones hardly change: a token with K = 64 takes 111 bytes of ids instead of
# 121 with a dictionary, and 75 of relative logits instead of 108, and is read a tenth faster.
ENCODING = {
    f"{name}.list.element": "BYTE_STREAM_SPLIT"
    for name in [
        "input_ids",
        "target_ids",
        "topk_ids",
        "relative_logits",
        "log_tail",
        "next_log_prob",
        "entropy",
        "weak_ids",
    ]
}


def sequence_schema() -> pa.Schema:
    """The columns of sequences that nobody has spoken about yet."""
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in SEQUENCE_COLUMNS.items()])


def arrow_schema(*, varies: bool, completed: bool = False, metadata: dict[str, str]) -> pa.Schema:
    """The columns of a shard."""
    columns = {
        **SEQUENCE_COLUMNS,
        "topk_ids": _list(pa.uint32()),
        "relative_logits": _list(pa.float16()),
        "log_tail": _list(pa.float32()),
        "next_log_prob": _list(pa.float16()),
        "entropy": _list(pa.float16()),
    }
    if varies:
        columns["kept_counts"] = _list(pa.uint16())
    if completed:
        columns["weak_ids"] = _list(pa.int32())
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns.items()], metadata=metadata)


def encode(rows: Sequence[tuple[TokenSequence, Captured]], schema: pa.Schema) -> pa.Table:
    """One row a sequence."""
    varies = "kept_counts" in schema.names
    keeps = [c.top.relative_logits_NK > -torch.inf if varies else c.top.ids_NK >= 0 for _, c in rows]
    columns: dict[str, list[Any]] = {
        "topk_ids": [c.top.ids_NK[kept].numpy() for (_, c), kept in zip(rows, keeps, strict=True)],
        "relative_logits": [c.top.relative_logits_NK[kept].numpy() for (_, c), kept in zip(rows, keeps, strict=True)],
        "log_tail": [c.top.log_tail_NC.flatten().numpy() for _, c in rows],
        "next_log_prob": [c.next_log_prob_N.numpy() for _, c in rows],
        "entropy": [c.entropy_N.numpy() for _, c in rows],
    }
    if varies:
        columns["kept_counts"] = [kept.sum(dim=1).numpy() for kept in keeps]
    if "weak_ids" in schema.names:
        columns["weak_ids"] = [c.weak_ids_N.numpy() for _, c in rows if c.weak_ids_N is not None]
    arrays = _sequence_arrays([s for s, _ in rows])
    arrays += [_list_array(parts, schema.field(name).type.value_type) for name, parts in columns.items()]
    return pa.Table.from_arrays(arrays, schema=schema)


def encode_sequences(rows: Sequence[TokenSequence]) -> pa.Table:
    """One row a sequence."""
    return pa.Table.from_arrays(_sequence_arrays(rows), schema=sequence_schema())


def _sequence_arrays(rows: Sequence[TokenSequence]) -> list[pa.Array]:
    columns: dict[str, list[Any]] = {
        "record_ids": [np.array(s.record_ids) for s in rows],
        "segment_lengths": [np.array(s.segment_lengths) for s in rows],
        "input_ids": [s.input_ids_S.numpy() for s in rows],
        "target_positions": [s.target_positions_N.numpy() for s in rows],
        "target_ids": [s.target_ids_N.numpy() for s in rows],
    }
    arrays = [_list_array(parts, SEQUENCE_COLUMNS[name].value_type) for name, parts in columns.items()]
    return [pa.array([s.key for s in rows], SEQUENCE_COLUMNS["key"]), *arrays]


def _list_array(parts: Sequence[np.ndarray], value_type: pa.DataType) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int32)
    values = np.concatenate(parts).astype(value_type.to_pandas_dtype())
    return pa.ListArray.from_arrays(offsets, pa.array(values, value_type), type=_list(value_type))


def decode(table: pa.Table, *, temperatures: tuple[float, ...]) -> list[tuple[TokenSequence, Captured]]:
    """The rows of a table as values; the large columns stay views of Arrow's memory."""
    rows = []
    for key, part in _parts(table):
        sequence = _sequence(key, part)
        # as int32: half the bytes of int64, which `topk.join` makes of them once, in a batch
        ids, relative = part["topk_ids"].view(torch.int32), part["relative_logits"]
        if "kept_counts" in part:
            ids, relative = pad_entries(ids, relative, part["kept_counts"].long())
        shape = (len(sequence.target_positions_N), -1)
        top = TopK(
            ids_NK=ids.reshape(shape),
            relative_logits_NK=relative.reshape(shape),
            log_tail_NC=part["log_tail"].reshape(shape),
            temperatures=temperatures,
        )
        captured = Captured(
            top=top,
            next_log_prob_N=part["next_log_prob"],
            entropy_N=part["entropy"],
            weak_ids_N=part["weak_ids"].long() if "weak_ids" in part else None,
        )
        rows.append((sequence, captured))
    return rows


def decode_sequences(table: pa.Table | pa.RecordBatch) -> list[TokenSequence]:
    """What `encode_sequences` made a table of."""
    return [_sequence(key, part) for key, part in _parts(table)]


def _parts(table: pa.Table | pa.RecordBatch) -> Iterator[tuple[bytes, dict[str, torch.Tensor]]]:
    """Key and columns of each row."""
    flat = {name: _flat(table.column(name)) for name in table.column_names if name != "key"}
    for r, key in enumerate(table.column("key").to_pylist()):
        yield key, {name: values[offsets[r] : offsets[r + 1]] for name, (values, offsets) in flat.items()}


def _sequence(key: bytes, part: dict[str, torch.Tensor]) -> TokenSequence:
    return TokenSequence(
        key=key,
        input_ids_S=part["input_ids"].long(),
        segment_lengths=tuple(part["segment_lengths"].tolist()),
        record_ids=tuple(part["record_ids"].tolist()),
        target_positions_N=part["target_positions"].long(),
        target_ids_N=part["target_ids"].long(),
    )


def pad_entries(ids: torch.Tensor, relative: torch.Tensor, counts_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Entries that follow one another -> [N, K], padded by -inf and each position's first id."""
    is_kept_NK = torch.arange(int(counts_N.max())) < counts_N[:, None]
    first_N = counts_N.cumsum(0) - counts_N
    ids_NK = ids[first_N][:, None].repeat(1, is_kept_NK.shape[1])
    ids_NK[is_kept_NK] = ids
    relative_NK = torch.full(is_kept_NK.shape, -torch.inf, dtype=relative.dtype)
    relative_NK[is_kept_NK] = relative
    return ids_NK, relative_NK


def _flat(column: pa.ChunkedArray | pa.ListArray) -> tuple[torch.Tensor, list[int]]:
    """A column's values end to end, without a copy, and where each row begins."""
    array = column
    if isinstance(column, pa.ChunkedArray):  # combining even a single chunk copies it
        array = column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)
    return torch.from_dlpack(array.values), array.offsets.to_pylist()
