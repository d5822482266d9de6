"""Shard schema, version 1: sequences with their captured distributions <-> Arrow tables.

Typed flat lists, so that plain polars, DuckDB or `datasets` read a shard without code of this project. Row r of a
shard holds N positions with K entries each: entry j of position n is element n * K + j of `topk_ids`. Where the number
of kept entries differs between positions (sampled, hybrid, imported), `kept_counts` holds it, and the entries of all
positions follow one another without padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from pipeline.core.types import Captured, Manifest, TokenSequence, TopK

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column of a shard: one list of values for each sequence."""

    name: str
    type: pa.DataType
    """Of one value in the shard."""
    field: str = ""
    """Of the TokenSequence or Captured that holds the values in memory, or of its TopK; empty: computed from others."""
    is_in_topk: bool = False
    dtype: torch.dtype = torch.int64
    """Of one value in memory; where it is as wide as `type`, the tensor shares Arrow's memory."""
    splits_bytes: bool = True
    """BYTE_STREAM_SPLIT: first the low bytes of all values, last their high bytes, which hardly change."""
    is_stored: Callable[[Manifest], bool] = lambda manifest: True
    """Whether the shards of a cache have this column."""


def _has_choices(manifest: Manifest) -> bool:
    return manifest.made_of.get("targets") == "choices"


# name and type in the shard, field and type in memory; before the teacher runs, rows have all of them
SEQUENCE_COLUMNS = (
    Column(name="record_ids", type=pa.int64(), field="record_ids", splits_bytes=False),
    Column(name="segment_lengths", type=pa.int32(), field="segment_lengths", splits_bytes=False),
    Column(name="input_ids", type=pa.int32(), field="input_ids_S"),
    Column(name="target_positions", type=pa.int32(), field="target_positions_N", splits_bytes=False),
    Column(name="target_ids", type=pa.int32(), field="target_ids_N"),
    Column(name="depths", type=pa.int32(), field="depths_N", splits_bytes=False, is_stored=_has_choices),
)

# A new column of a shard is a field in `core/types.py`, a row here, and the code that computes its values. With split
# bytes a token with K = 64 takes 111 bytes of ids instead of 121 with a dictionary, and 75 of relative logits instead
# of 108, and is read a tenth faster.
CAPTURED_COLUMNS = (
    # int32 in memory is half the bytes of int64; `TopK.cat` converts once, for a batch
    Column(name="topk_ids", type=pa.uint32(), field="ids_NK", is_in_topk=True, dtype=torch.int32),
    Column(name="relative_logits", type=pa.float16(), field="relative_logits_NK", is_in_topk=True, dtype=torch.float16),
    Column(name="log_tail", type=pa.float32(), field="log_tail_NC", is_in_topk=True, dtype=torch.float32),
    Column(name="next_log_prob", type=pa.float16(), field="next_log_prob_N", dtype=torch.float16),
    Column(name="entropy", type=pa.float16(), field="entropy_N", dtype=torch.float16),
    Column(
        name="kept_counts",
        type=pa.uint16(),
        splits_bytes=False,
        is_stored=lambda manifest: manifest.has_kept_counts,
    ),
    Column(
        name="weak_ids", type=pa.int32(), field="weak_ids_N", is_stored=lambda manifest: "complete" in manifest.made_of
    ),
    Column(name="weights", type=pa.float32(), field="weights_N", dtype=torch.float32, is_stored=_has_choices),
)
ENTRY_COLUMNS = ("topk_ids", "relative_logits")  # one value an entry; with kept_counts the padding is not stored


# ------------------------------------------------------------------------------------------- schemas


def sequence_schema() -> pa.Schema:
    """The columns of tokenized sequences, before the teacher runs."""
    return pa.schema([_key_field(), *(_list_field(column) for column in SEQUENCE_COLUMNS)])


def shard_schema(manifest: Manifest) -> pa.Schema:
    """The columns of a cache's shards, and what each shard repeats of the manifest."""
    stored = [column for column in (*SEQUENCE_COLUMNS, *CAPTURED_COLUMNS) if column.is_stored(manifest)]
    return pa.schema(
        [_key_field(), *map(_list_field, stored)],
        metadata={
            "fingerprint": manifest.fingerprint,
            "schema_version": str(manifest.schema_version),
            # neither the fingerprint nor the rows would reveal that this one was changed
            "vocabulary_size": str(manifest.vocabulary_size),
        },
    )


def column_encoding(schema: pa.Schema) -> dict[str, str]:
    """Parquet's encodings of the columns of a shard that do not have the default one."""
    columns = (*SEQUENCE_COLUMNS, *CAPTURED_COLUMNS)
    split = [column.name for column in columns if column.splits_bytes and column.name in schema.names]
    return {f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in split}


def _key_field() -> pa.Field:
    return pa.field("key", pa.binary(16), nullable=False)


def _list_field(column: Column) -> pa.Field:
    return pa.field(column.name, _list_type(column.type), nullable=False)


def _list_type(value_type: pa.DataType) -> pa.DataType:
    """A list without nulls: Parquet stores no definition levels then, and reading is a quarter faster."""
    return pa.list_(pa.field("element", value_type, nullable=False))


# ------------------------------------------------------------------------------------- values -> table


def encode(rows: Sequence[tuple[TokenSequence, Captured]], schema: pa.Schema) -> pa.Table:
    """A table of one row for each sequence."""
    has_kept_counts = "kept_counts" in schema.names
    arrays = _sequence_arrays([sequence for sequence, _ in rows], schema)
    for column in CAPTURED_COLUMNS:
        if column.name in schema.names:
            drops_padding = has_kept_counts and column.name in ENTRY_COLUMNS
            values = [_captured_values(column, captured, drops_padding=drops_padding) for _, captured in rows]
            arrays.append(_list_array(values, column.type))
    return pa.Table.from_arrays(arrays, schema=schema)


def encode_sequences(rows: Sequence[TokenSequence]) -> pa.Table:
    """A table of one row for each sequence, before the teacher runs."""
    return pa.Table.from_arrays(_sequence_arrays(rows, sequence_schema()), schema=sequence_schema())


def _captured_values(column: Column, captured: Captured, *, drops_padding: bool) -> np.ndarray:
    """The values of one row, flat."""
    top = captured.top
    if column.name == "kept_counts":
        return (top.relative_logits_NK > -torch.inf).sum(dim=1).numpy()
    values: torch.Tensor = getattr(top if column.is_in_topk else captured, column.field)
    if drops_padding:
        values = values[top.relative_logits_NK > -torch.inf]
    return values.flatten().numpy()


def _sequence_arrays(rows: Sequence[TokenSequence], schema: pa.Schema) -> list[pa.Array]:
    keys = pa.array([sequence.key for sequence in rows], pa.binary(16))
    lists = [
        _list_array([_sequence_values(column, sequence) for sequence in rows], column.type)
        for column in SEQUENCE_COLUMNS
        if column.name in schema.names
    ]
    return [keys, *lists]


def _sequence_values(column: Column, sequence: TokenSequence) -> np.ndarray:
    return np.asarray(sequence.depths_or_zeros() if column.name == "depths" else getattr(sequence, column.field))


def _list_array(rows: Sequence[np.ndarray], value_type: pa.DataType) -> pa.ListArray:
    # rows of 3 and 2 values -> offsets [0, 3, 5]: row r is values[offsets[r] : offsets[r + 1]]
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int32)
    values = np.concatenate(rows).astype(value_type.to_pandas_dtype())
    return pa.ListArray.from_arrays(offsets, pa.array(values, value_type), type=_list_type(value_type))


# ------------------------------------------------------------------------------------- table -> values


def decode(table: pa.Table, *, temperatures: tuple[float, ...]) -> list[tuple[TokenSequence, Captured]]:
    """The rows of a table of `encode`; the large columns stay views of Arrow's memory."""
    columns = _columns(table, (*SEQUENCE_COLUMNS, *CAPTURED_COLUMNS))
    captured = [_captured(row, temperatures) for row in _rows(columns, CAPTURED_COLUMNS)]
    return list(zip(_sequences(table, columns), captured, strict=True))


def decode_sequences(table: pa.Table | pa.RecordBatch) -> list[TokenSequence]:
    """The rows of a table of `encode_sequences`."""
    return _sequences(table, _columns(table, SEQUENCE_COLUMNS))


KeysAndTargets = list[tuple[bytes, int]]
"""Of each row its key and its number of supervised positions."""


def keys_and_targets(table: pa.Table | pa.RecordBatch) -> KeysAndTargets:
    """What the columns `key` and `target_positions` tell of each row, without decoding any other."""
    counts = pc.list_value_length(table.column("target_positions")).to_pylist()
    return list(zip(table.column("key").to_pylist(), counts, strict=True))


Values = tuple[torch.Tensor, ...]
"""Of a column: its values in each row, which are views of one tensor."""


def _columns(table: pa.Table | pa.RecordBatch, columns: Sequence[Column]) -> dict[str, Values]:
    """The columns that a table has, by name."""
    return {column.name: _values(table.column(column.name), column) for column in columns if _has(table, column)}


def _has(table: pa.Table | pa.RecordBatch, column: Column) -> bool:
    return column.name in table.schema.names


def _values(array: pa.ChunkedArray | pa.ListArray, column: Column) -> Values:
    """The values in the type of their field: converted once for all rows, and not copied if as wide as stored."""
    if isinstance(array, pa.ChunkedArray):  # combining even a single chunk copies it
        array = array.chunk(0) if array.num_chunks == 1 else pa.concat_arrays(array.chunks)
    offsets = array.offsets.to_numpy()
    values = torch.from_dlpack(array.values)[offsets[0] : offsets[-1]]
    is_as_wide = values.dtype.itemsize == column.dtype.itemsize  # uint32 -> int32
    values = values.view(column.dtype) if is_as_wide else values.to(column.dtype)
    return values.split(np.diff(offsets).tolist())


def _rows(columns: dict[str, Values], kinds: Sequence[Column]) -> Iterator[dict[str, torch.Tensor]]:
    """The values of each row by the names of their columns."""
    names = [kind.name for kind in kinds if kind.name in columns]
    return (dict(zip(names, row, strict=True)) for row in zip(*(columns[name] for name in names), strict=True))


def _sequences(table: pa.Table | pa.RecordBatch, columns: dict[str, Values]) -> list[TokenSequence]:
    return [
        TokenSequence(
            key=key,
            input_ids_S=row["input_ids"],
            segment_lengths=tuple(row["segment_lengths"].tolist()),
            record_ids=tuple(row["record_ids"].tolist()),
            target_positions_N=row["target_positions"],
            target_ids_N=row["target_ids"],
            depths_N=row.get("depths"),
        )
        for key, row in zip(table.column("key").to_pylist(), _rows(columns, SEQUENCE_COLUMNS), strict=True)
    ]


def _captured(values: dict[str, torch.Tensor], temperatures: tuple[float, ...]) -> Captured:
    counts_N = values.pop("kept_counts", None)
    if counts_N is not None:
        values["topk_ids"], values["relative_logits"] = pad_entries(
            values["topk_ids"], values["relative_logits"], counts_N
        )
    shape = (len(values["entropy"]), -1)
    top_fields: dict[str, Any] = {"temperatures": temperatures}
    fields: dict[str, Any] = {}
    for column in CAPTURED_COLUMNS:
        if column.name in values and column.is_in_topk:
            top_fields[column.field] = values[column.name].reshape(shape)
        elif column.name in values:
            fields[column.field] = values[column.name]
    return Captured(top=TopK(**top_fields), **fields)


def pad_entries(ids: torch.Tensor, relative: torch.Tensor, counts_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Entries that follow one another -> [N, K]; relative logits are padded by -inf, ids by each position's first id.

    ids [5, 9, 3, 7, 8] with counts [3, 2] -> [[5, 9, 3], [7, 8, 7]].
    """
    is_kept_NK = torch.arange(int(counts_N.max())) < counts_N[:, None]
    first_N = counts_N.cumsum(0) - counts_N  # counts [3, 2] -> first entries at [0, 3]
    ids_NK = ids[first_N][:, None].repeat(1, is_kept_NK.shape[1])
    ids_NK[is_kept_NK] = ids  # row by row, which is the order of `ids`
    relative_NK = torch.full(is_kept_NK.shape, -torch.inf, dtype=relative.dtype)
    relative_NK[is_kept_NK] = relative
    return ids_NK, relative_NK
