"""Caches of made-up members, written without a model."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.bench.read import make_manifest
from pipeline.cache import manifest as manifests
from pipeline.cache.shards import ShardReader, shard_writer
from pipeline.core.topk import top_k_and_entropy
from pipeline.core.types import UNKNOWN_TARGET, Captured, TokenSequence

Rows = list[tuple[TokenSequence, Captured]]


def captured_of(sequence: TokenSequence, logits_NV: Tensor, *, k: int, reach_N: Tensor | None = None) -> Captured:
    """What a teacher with these logits leaves, which float16 stores exactly."""
    top, log_z_N, entropy_N = top_k_and_entropy(logits_NV.float(), k=k, temperatures=(1.0,))
    relative_NV = logits_NV.float() - logits_NV.float().amax(dim=1, keepdim=True)
    target_N = relative_NV.gather(1, sequence.target_ids_N.clamp(min=0)[:, None])[:, 0] - log_z_N
    return Captured(
        top=top,
        next_log_prob_N=torch.where(sequence.target_ids_N == UNKNOWN_TARGET, torch.nan, target_N).half(),
        entropy_N=entropy_N.half(),
        weights_N=None if reach_N is None else reach_N.float(),
    )


def write_rows(cache: Path, rows: Rows, *, vocabulary_size: int, k: int, num_records: int, **made_of: Any) -> Path:
    """A finished cache of one shard."""
    manifest = make_manifest(1, num_records, k=k, window=64, vocabulary=vocabulary_size)
    content = [sequence.key + captured.top.relative_logits_NK.numpy().tobytes() for sequence, captured in rows]
    made_of = {"tokenizer": "made up", **made_of, "rows": hashlib.sha256(b"".join(content)).hexdigest()}
    manifest = dataclasses.replace(manifest, made_of=made_of, fingerprint=manifests.fingerprint(made_of))
    manifests.create_cache(cache, manifest)
    with shard_writer(cache, manifest, 0) as writer:
        for sequence, captured in rows:
            writer.write(sequence, captured)
        writer.commit(num_skipped=0)
    manifests.finalize_cache(cache, manifest, stale_seconds=60)
    return cache


def read_rows(cache: Path) -> Rows:
    reader = ShardReader(cache)
    return [reader.row(block, row) for block, size in enumerate(reader.blocks) for row in range(size)]
