"""The teacher's forward: packed sequences -> what stage one stores about them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from pipeline.core.topk import hybrid, sampled, top_k_and_entropy, uniform_draws
from pipeline.core.types import UNKNOWN_TARGET, Captured, Manifest, TokenSequence, map_tensors
from pipeline.data.packing import collate_inputs
from pipeline.models.forward import Model, hidden_states, logits

HEAD_POSITIONS = 512  # positions in one pass through the head: bounds the [N, V] matrix


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PendingBatch:
    """A batch whose columns are still being copied from the device; `finish_copy` waits for them."""

    sequences: Sequence[TokenSequence]
    captured: Captured
    """All positions of the batch."""
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
    captured = Captured.cat(parts)
    if "complete" in manifest.made_of:  # these targets are the corpus's own, not the teacher's completion
        weak_ids_N = torch.full_like(targets_N, UNKNOWN_TARGET)
        captured = dataclasses.replace(captured, weak_ids_N=weak_ids_N)
    return start_copy(batch, captured, started)


def capture_positions(logits_NV: Tensor, targets_N: Tensor, uniforms_ND: Tensor, manifest: Manifest) -> Captured:
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
    return Captured(top=top, next_log_prob_N=log_prob_N.half(), entropy_N=entropy_N.half())


# ------------------------------------------------------------------------------- from device to memory


def start_copy(batch: Sequence[TokenSequence], captured: Captured, started: Any) -> PendingBatch:
    """Start copying a batch to host memory: on a GPU on a side stream into pinned buffers, beside the next forward."""
    device = captured.entropy_N.device
    ended = timestamp(device)
    if device.type == "cuda":
        stream = _side_stream(device)
        stream.wait_event(ended)
        with torch.cuda.stream(stream):
            captured = map_tensors(captured, partial(_copy_to_pinned, stream=stream))
            ended = (ended, stream.record_event())
    return PendingBatch(sequences=batch, captured=captured, started=started, ended=ended)


def _copy_to_pinned(column: Tensor, *, stream: torch.cuda.Stream) -> Tensor:
    if column.device.type == "cpu":
        return column
    host = torch.empty(column.shape, dtype=column.dtype, pin_memory=True)
    host.copy_(column, non_blocking=True)
    column.record_stream(stream)  # the allocator must not reuse its memory before the copy is done
    return host


def finish_copy(pending: PendingBatch) -> tuple[list[Captured], float]:
    """Wait until a batch is in host memory: what is stored about each sequence, and the forward's seconds."""
    if isinstance(pending.ended, tuple):
        forward_ended, copied = pending.ended
        copied.synchronize()
        seconds = pending.started.elapsed_time(forward_ended) / 1000
    else:
        seconds = pending.ended - pending.started
    counts = [len(sequence.target_positions_N) for sequence in pending.sequences]
    return pending.captured.split(counts), seconds


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
