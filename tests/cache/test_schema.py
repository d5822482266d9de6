"""A shard's columns: what is encoded is decoded, and no field of what was captured is left out."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from pipeline.cache.schema import CAPTURED_COLUMNS, decode, encode, pad_entries, shard_schema
from pipeline.core.types import UNKNOWN_TARGET, Captured, Manifest, TokenSequence, TopK


def manifest_of(*, kind: str, completes: bool) -> Manifest:
    return Manifest(
        schema_version=1,
        fingerprint="0" * 64,
        made_of={"complete": {}} if completes else {},
        kind=kind,
        k=3,
        draws=0,
        draw_seed=0,
        temperatures=(1.0, 2.0),
        vocabulary_size=300,
        window=8,
        num_records=2,
        num_shards=1,
        records_per_shard=2,
    )


def row(index: int, counts: list[int], *, completes: bool) -> tuple[TokenSequence, Captured]:
    """A row whose position n keeps counts[n] entries."""
    num_targets, width = len(counts), max(counts)
    generator = torch.Generator().manual_seed(index)
    is_kept_NK = torch.arange(width) < torch.tensor(counts)[:, None]
    ids_NK = torch.randint(0, 300, (num_targets, width), generator=generator)
    relative_NK = -torch.rand(num_targets, width, generator=generator).half()
    sequence = TokenSequence(
        key=bytes([index] * 16),
        input_ids_S=torch.randint(0, 300, (num_targets + 1,), generator=generator),
        segment_lengths=(1, num_targets),
        record_ids=(index, index + 7),
        target_positions_N=torch.arange(num_targets),
        target_ids_N=torch.tensor([*range(num_targets - 1), UNKNOWN_TARGET]),
    )
    captured = Captured(
        top=TopK(
            ids_NK=torch.where(is_kept_NK, ids_NK, ids_NK[:, :1]),
            relative_logits_NK=relative_NK.masked_fill(~is_kept_NK, -torch.inf),
            log_tail_NC=torch.rand(num_targets, 2, generator=generator),
            temperatures=(1.0, 2.0),
        ),
        next_log_prob_N=torch.rand(num_targets, generator=generator).half(),
        entropy_N=torch.rand(num_targets, generator=generator).half(),
        weak_ids_N=torch.arange(num_targets) + 5 if completes else None,
    )
    return sequence, captured


def plain(value: Any) -> Any:
    """Tensors as lists, so that values can be compared."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return value


@pytest.mark.parametrize("kind", ["topk", "sampled"])
@pytest.mark.parametrize("completes", [False, True])
def test_what_is_encoded_is_decoded(kind: str, completes: bool) -> None:
    all_counts = [[3, 3], [3, 3, 3]] if kind == "topk" else [[1, 3], [2, 1, 2]]
    rows = [row(i, counts, completes=completes) for i, counts in enumerate(all_counts)]
    table = encode(rows, shard_schema(manifest_of(kind=kind, completes=completes)))
    assert ("kept_counts" in table.column_names, "weak_ids" in table.column_names) == (kind != "topk", completes)
    decoded = decode(table, temperatures=(1.0, 2.0))
    assert [(plain(sequence), plain(captured)) for sequence, captured in decoded] == [
        (plain(sequence), plain(captured)) for sequence, captured in rows
    ]


def test_every_captured_field_has_a_column() -> None:
    fields = {field.name for owner in (Captured, TopK) for field in dataclasses.fields(owner)}
    assert {column.field for column in CAPTURED_COLUMNS if column.field} == fields - {"top", "temperatures"}


def test_entries_are_padded() -> None:
    ids, relative = torch.tensor([5, 9, 3, 7, 8]), torch.tensor([0.0, -1.0, -2.0, 0.0, -3.0])
    ids_NK, relative_NK = pad_entries(ids, relative, torch.tensor([3, 2]))
    assert ids_NK.tolist() == [[5, 9, 3], [7, 8, 7]]
    assert relative_NK.tolist() == [[0.0, -1.0, -2.0], [0.0, -3.0, -torch.inf]]
