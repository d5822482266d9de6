"""Shard schema, version 1: sequences with their captured distributions <-> Arrow tables.

Typed flat lists, so that plain polars, DuckDB or `datasets` read a shard with no code of ours. Row r of a
shard holds N positions, K entries each: entry j of position n lies at n * K + j of `topk_ids`. Where the number
kept varies (sampled and hybrid), `kept_counts` holds it, and the entries of all positions follow one another.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.files import file_hash
from pipeline.types import Captured, ShardInfo, TokenSequence, TopK

SCHEMA_VERSION = 1


def arrow_schema(*, vocabulary_size: int, varies: bool, metadata: dict[str, str]) -> pa.Schema:
    """The columns of a shard; token ids of the kept entries take two bytes where the vocabulary allows."""
    id_type = pa.uint16() if vocabulary_size <= 65_536 else pa.uint32()
    columns = {
        "key": pa.binary(16),
        "record_ids": pa.list_(pa.int64()),
        "segment_lengths": pa.list_(pa.int32()),
        "input_ids": pa.list_(pa.int32()),
        "target_positions": pa.list_(pa.int32()),
        "target_ids": pa.list_(pa.int32()),
        "topk_ids": pa.list_(id_type),
        "relative_logits": pa.list_(pa.float16()),
        "log_tail": pa.list_(pa.float32()),
        "next_log_prob": pa.list_(pa.float16()),
        "entropy": pa.list_(pa.float16()),
    }
    if varies:
        columns["kept_counts"] = pa.list_(pa.uint16())
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns.items()], metadata=metadata)


def encode(rows: Sequence[tuple[TokenSequence, Captured]], schema: pa.Schema) -> pa.Table:
    """One row a sequence."""
    varies = "kept_counts" in schema.names
    keeps = [c.top.relative_logits_NK > -torch.inf if varies else c.top.ids_NK >= 0 for _, c in rows]
    columns: dict[str, list[Any]] = {
        "record_ids": [np.array(s.record_ids) for s, _ in rows],
        "segment_lengths": [np.array(s.segment_lengths) for s, _ in rows],
        "input_ids": [s.input_ids_S.numpy() for s, _ in rows],
        "target_positions": [s.target_positions_N.numpy() for s, _ in rows],
        "target_ids": [s.target_ids_N.numpy() for s, _ in rows],
        "topk_ids": [c.top.ids_NK[kept].numpy() for (_, c), kept in zip(rows, keeps, strict=True)],
        "relative_logits": [c.top.relative_logits_NK[kept].numpy() for (_, c), kept in zip(rows, keeps, strict=True)],
        "log_tail": [c.top.log_tail_NC.flatten().numpy() for _, c in rows],
        "next_log_prob": [c.next_log_prob_N.numpy() for _, c in rows],
        "entropy": [c.entropy_N.numpy() for _, c in rows],
    }
    if varies:
        columns["kept_counts"] = [kept.sum(dim=1).numpy() for kept in keeps]
    arrays = [pa.array([s.key for s, _ in rows], schema.field("key").type)]
    arrays += [_list_array(parts, schema.field(name).type.value_type) for name, parts in columns.items()]
    return pa.Table.from_arrays(arrays, schema=schema)


def _list_array(parts: Sequence[np.ndarray], value_type: pa.DataType) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int32)
    values = np.concatenate(parts).astype(value_type.to_pandas_dtype())
    return pa.ListArray.from_arrays(offsets, pa.array(values, value_type))


def totals(*, targets: int, num_skipped: int, histogram: Sequence[int]) -> dict[str, str]:
    """What a writer adds to a shard's own metadata, so that the file can vouch for itself."""
    return {"totals": json.dumps({"targets": targets, "num_skipped": num_skipped, "histogram": list(histogram)})}


def describe(path: Path, index: int) -> ShardInfo:
    """The ShardInfo of a whole file, under the name that it has in a local cache; ValueError if it is not whole."""
    metadata = pq.read_metadata(path)
    written = json.loads((metadata.metadata or {}).get(b"totals", b"null"))
    if written is None:
        raise ValueError("no totals in its footer")
    groups = tuple(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
    return ShardInfo(
        index=index,
        file=f"{index:05d}.parquet",
        rows=metadata.num_rows,
        row_groups=groups,
        targets=written["targets"],
        bytes=path.stat().st_size,
        sha256=file_hash(path),
        num_skipped=written["num_skipped"],
        retained_mass_histogram=tuple(written["histogram"]),
    )


def decode(table: pa.Table, *, temperatures: tuple[float, ...]) -> list[tuple[TokenSequence, TopK]]:
    """The rows of a table as values; the large columns stay views of Arrow's memory."""
    flat = {name: _flat(table.column(name)) for name in table.column_names if name != "key"}
    keys = table.column("key").to_pylist()
    rows = []
    for r, key in enumerate(keys):
        part = {name: values[offsets[r] : offsets[r + 1]] for name, (values, offsets) in flat.items()}
        positions = _int64(part["target_positions"])
        shape = (len(positions), -1)
        sequence = TokenSequence(
            key=key,
            input_ids_S=_int64(part["input_ids"]),
            segment_lengths=tuple(part["segment_lengths"].tolist()),
            record_ids=tuple(part["record_ids"].tolist()),
            target_positions_N=positions,
            target_ids_N=_int64(part["target_ids"]),
        )
        ids, relative = _int64(part["topk_ids"]), torch.from_numpy(part["relative_logits"].copy())
        if "kept_counts" in part:
            ids, relative = _padded(ids, relative, _int64(part["kept_counts"]))
        top = TopK(
            ids_NK=ids.reshape(shape),
            relative_logits_NK=relative.reshape(shape),
            log_tail_NC=torch.from_numpy(part["log_tail"].copy()).reshape(shape),
            temperatures=temperatures,
        )
        rows.append((sequence, top))
    return rows


def _padded(ids: torch.Tensor, relative: torch.Tensor, counts_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Entries that follow one another -> [N, K], padded by -inf and each position's first id."""
    is_kept_NK = torch.arange(int(counts_N.max())) < counts_N[:, None]
    first_N = counts_N.cumsum(0) - counts_N
    ids_NK = ids[first_N][:, None].repeat(1, is_kept_NK.shape[1])
    ids_NK[is_kept_NK] = ids
    relative_NK = torch.full(is_kept_NK.shape, -torch.inf, dtype=relative.dtype)
    relative_NK[is_kept_NK] = relative
    return ids_NK, relative_NK


def _flat(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    array = column.combine_chunks()
    array = array.chunk(0) if isinstance(array, pa.ChunkedArray) else array
    return array.values.to_numpy(zero_copy_only=False), array.offsets.to_numpy()


def _int64(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.int64))
