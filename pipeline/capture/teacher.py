"""The teacher's forward: packed sequences -> what stage one stores about them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from pipeline.core.topk import hybrid, join, sampled, top_k_and_entropy, uniform_draws
from pipeline.core.types import UNKNOWN_TARGET, Captured, Manifest, TokenSequence, TopK
from pipeline.data.packing import collate_inputs
from pipeline.models.forward import Model, hidden_states, logits

HEAD_POSITIONS = 512  # positions in one pass through the head: bounds the [N, V] matrix


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Spoken:
    """What is kept of N positions, one row a position."""

    top: TopK
    next_log_prob_N: Tensor
    """float16, nats: log-probability of the known target; NaN where it is unknown."""
    entropy_N: Tensor
    """float16, nats."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PendingBatch:
    """A batch on its way from the device into memory; `land` waits for it."""

    sequences: Sequence[TokenSequence]
    spoken: Spoken
    weak_ids_N: Tensor | None
    """int64, in memory: what the teacher said, where it completes prompts."""
    started: Any
    """Host seconds, or a CUDA event, at the beginning and at the end of the forward."""
    ended: Any


@torch.inference_mode()
def capture_batch(teacher: Model, batch: Sequence[TokenSequence], manifest: Manifest) -> PendingBatch:
    """One forward, and all that is stored of it. Only supervised positions reach the head."""
    device = next(teacher.parameters()).device
    started = timestamp(device)
    input_ids_BS, position_ids_BS, flat_N = collate_inputs(batch)
    hidden_BSH = hidden_states(teacher, input_ids_BS.to(device), position_ids_BS.to(device))
    hidden_NH = hidden_BSH.flatten(0, 1)[flat_N.to(device)]
    targets_N = torch.cat([sequence.target_ids_N for sequence in batch])
    draws_ND = torch.cat(
        [uniform_draws(s.key, len(s.target_ids_N), draws=manifest.draws, seed=manifest.draw_seed) for s in batch]
    )
    parts = [
        capture_positions(logits(teacher, hidden, manifest.vocabulary_size), targets, drawn, manifest)
        for hidden, targets, drawn in zip(
            *(part.split(HEAD_POSITIONS) for part in (hidden_NH, targets_N.to(device), draws_ND)), strict=True
        )
    ]
    weak_ids_N = torch.full_like(targets_N, UNKNOWN_TARGET) if "complete" in manifest.made_of else None
    return start_copy(batch, joined(parts), weak_ids_N, started)


def capture_positions(logits_NV: Tensor, targets_N: Tensor, uniforms_ND: Tensor, manifest: Manifest) -> Spoken:
    """What is kept of some positions: distribution, log-probability of the known target, entropy."""
    k, temperatures = (manifest.k, manifest.temperatures) if manifest.kind == "topk" else (1, (1.0,))
    top, log_z_N, entropy_N = top_k_and_entropy(logits_NV, k=k, temperatures=temperatures)
    largest_N = logits_NV.gather(1, top.ids_NK[:, :1])[:, 0].float()
    if manifest.kind == "sampled":
        top = sampled(logits_NV, uniforms_ND=uniforms_ND)
    elif manifest.kind == "hybrid":
        top = hybrid(logits_NV, k=manifest.k, uniforms_ND=uniforms_ND)
    target_logits_N = logits_NV.gather(1, targets_N.clamp(min=0)[:, None])[:, 0].float()
    log_prob_N = torch.where(targets_N == UNKNOWN_TARGET, torch.nan, target_logits_N - largest_N - log_z_N)
    return Spoken(top=top, next_log_prob_N=log_prob_N.half(), entropy_N=entropy_N.half())


def joined(parts: Sequence[Spoken]) -> Spoken:
    """The positions of several parts, one after another."""
    return Spoken(
        top=join([part.top for part in parts]),
        next_log_prob_N=torch.cat([part.next_log_prob_N for part in parts]),
        entropy_N=torch.cat([part.entropy_N for part in parts]),
    )


# ------------------------------------------------------------------------------- from device to memory


def start_copy(batch: Sequence[TokenSequence], spoken: Spoken, weak_ids_N: Tensor | None, started: Any) -> PendingBatch:
    """Begin to copy a batch into memory: on a GPU by a side stream into pinned buffers, while the next forward runs."""
    device = spoken.entropy_N.device
    ended = timestamp(device)
    top = spoken.top
    columns = [top.ids_NK, top.relative_logits_NK, top.log_tail_NC, spoken.next_log_prob_N, spoken.entropy_N]
    if device.type == "cuda":
        stream = _side_stream(device)
        stream.wait_event(ended)
        with torch.cuda.stream(stream):
            pinned = [torch.empty(column.shape, dtype=column.dtype, pin_memory=True) for column in columns]
            for host, column in zip(pinned, columns, strict=True):
                host.copy_(column, non_blocking=True)
                column.record_stream(stream)  # the allocator must not hand it out again before it is copied
            columns, ended = pinned, (ended, stream.record_event())
    return PendingBatch(
        sequences=batch,
        spoken=Spoken(
            top=TopK(
                ids_NK=columns[0],
                relative_logits_NK=columns[1],
                log_tail_NC=columns[2],
                temperatures=top.temperatures,
            ),
            next_log_prob_N=columns[3],
            entropy_N=columns[4],
        ),
        weak_ids_N=weak_ids_N,
        started=started,
        ended=ended,
    )


def finish_copy(flight: PendingBatch) -> tuple[list[Captured], float]:
    """Wait until a batch is in memory: what is stored about each sequence, and the forward's seconds."""
    if isinstance(flight.ended, tuple):
        forward_ended, copied = flight.ended
        copied.synchronize()
        seconds = flight.started.elapsed_time(forward_ended) / 1000
    else:
        seconds = flight.ended - flight.started
    counts = [len(sequence.target_positions_N) for sequence in flight.sequences]
    top = flight.spoken.top
    weak = flight.weak_ids_N.split(counts) if flight.weak_ids_N is not None else [None] * len(counts)
    columns = (top.ids_NK, top.relative_logits_NK, top.log_tail_NC, flight.spoken.next_log_prob_N)
    split = [column.split(counts) for column in (*columns, flight.spoken.entropy_N)]
    return [
        Captured(
            top=TopK(ids_NK=ids, relative_logits_NK=relative, log_tail_NC=tail, temperatures=top.temperatures),
            next_log_prob_N=next_log_prob_N,
            entropy_N=entropy_N,
            weak_ids_N=weak_ids_N,
        )
        for ids, relative, tail, next_log_prob_N, entropy_N, weak_ids_N in zip(*split, weak, strict=True)
    ], seconds


def timestamp(device: torch.device) -> Any:
    """A point in time on a device's own clock."""
    if device.type != "cuda":
        return time.monotonic()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


@lru_cache(maxsize=8)
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
