"""The teacher's forward: packed sequences -> the captured columns of a shard."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from pipeline.core.runtime import to_device
from pipeline.core.topk import hybrid, keep_also, sampled, top_k_and_entropy, uniform_draws
from pipeline.core.types import UNKNOWN_TARGET, Captured, Manifest, TokenSequence, map_tensors
from pipeline.data.packing import Segment, collate_inputs, make_sequence
from pipeline.models.forward import HEAD_POSITIONS, Model, hidden_states, logits


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PendingBatch:
    """A captured batch that may still be in the copy from device to host memory; `finish_copy` waits for it."""

    sequences: Sequence[TokenSequence]
    captured: Captured
    """All positions of the batch."""
    started: Any
    """The beginning of the forward: `timestamp`."""
    ended: Any
    """The end of the forward: `timestamp`."""
    copied: Any = None
    """CUDA event at the end of the copy; None on a CPU, where nothing is copied."""


def device_of(teacher: Model) -> torch.device:
    """Where the weights are."""
    device: torch.device = next(teacher.parameters()).device
    return device


@torch.inference_mode()
def capture_batch(
    teacher: Model, batch: Sequence[TokenSequence], manifest: Manifest, also_NJ: Tensor | None = None
) -> PendingBatch:
    """Run the teacher over a batch, capture its supervised positions, and start their copy to host memory.

    `also_NJ`: tokens of each position that are kept too, -1 for none.
    """
    started = timestamp(device_of(teacher))
    return start_copy(batch, forward_batch(teacher, batch, manifest, also_NJ), started)


@torch.inference_mode()
def forward_batch(
    teacher: Model, batch: Sequence[TokenSequence], manifest: Manifest, also_NJ: Tensor | None = None
) -> Captured:
    """The captured positions of a batch, on the teacher's device; only supervised ones pass through the head."""
    device = device_of(teacher)
    input_ids_BS, position_ids_BS, flat_N = collate_inputs(batch)
    hidden_BSH = hidden_states(teacher, to_device(input_ids_BS, device), position_ids_BS)
    hidden_PH = hidden_BSH.flatten(0, 1)
    hidden_NH = hidden_PH[to_device(flat_N, device)]
    targets_N = torch.cat([sequence.target_ids_N for sequence in batch])
    draws_ND = torch.cat([position_draws(sequence, manifest) for sequence in batch])
    hidden_parts = hidden_NH.split(HEAD_POSITIONS)
    target_parts = to_device(targets_N, device).split(HEAD_POSITIONS)
    draw_parts = draws_ND.split(HEAD_POSITIONS)
    also_parts = [None] * len(hidden_parts) if also_NJ is None else to_device(also_NJ, device).split(HEAD_POSITIONS)
    parts = []
    for part_NH, part_targets_N, part_draws_ND, part_NJ in zip(
        hidden_parts, target_parts, draw_parts, also_parts, strict=True
    ):
        logits_NV = logits(teacher, part_NH, manifest.vocabulary_size)
        parts.append(capture_positions(logits_NV, part_targets_N, part_draws_ND, manifest, part_NJ))
    captured = Captured.cat(parts)
    if "complete" in manifest.made_of:  # these targets come from the corpus: the teacher did not generate them
        weak_ids_N = torch.full_like(targets_N, UNKNOWN_TARGET)
        captured = dataclasses.replace(captured, weak_ids_N=weak_ids_N)
    if manifest.made_of.get("targets") == "choices":
        depths_N = torch.cat([sequence.depths_or_zeros() for sequence in batch])
        weights_N = reach(teacher, hidden_PH, input_ids_BS.flatten(), flat_N, depths_N, manifest.vocabulary_size)
        captured = dataclasses.replace(captured, weights_N=weights_N)
    return captured


def position_draws(sequence: TokenSequence, manifest: Manifest) -> Tensor:
    """Random numbers for the kept entries of a sequence's N positions: fp64 [N, D] in [0, 1).

    A completion is captured while it is generated, before it is packed, so its numbers follow from its prompt. Its
    targets are unknown, and the first of them is at the end of the prompt.
    """
    draws, seed = manifest.draws, manifest.draw_seed
    draws_ND = uniform_draws(sequence.key, len(sequence.target_ids_N), draws=draws, seed=seed)
    if "complete" not in manifest.made_of or not draws:
        return draws_ND
    start, positions_N = 0, sequence.target_positions_N
    for record_id, length in zip(sequence.record_ids, sequence.segment_lengths, strict=True):
        is_here_N = (positions_N >= start) & (positions_N < start + length)
        generated_N = torch.nonzero(is_here_N & (sequence.target_ids_N == UNKNOWN_TARGET))[:, 0]
        if len(generated_N):
            prompt_ids = sequence.input_ids_S[start : int(positions_N[generated_N[0]]) + 1].tolist()
            prompt = make_sequence([Segment(record_id=record_id, ids=tuple(prompt_ids), targets=())])
            draws_ND[generated_N] = uniform_draws(
                prompt_draw_key(prompt, manifest), len(generated_N), draws=draws, seed=seed
            )
        start += length
    return draws_ND


def prompt_draw_key(prompt: TokenSequence, manifest: Manifest) -> bytes:
    """What the random numbers of a prompt's completion follow from; of sampled ones, that of equal prompts differs."""
    by_record = manifest.made_of["complete"].get("draws_by_record", False)
    return prompt.key + prompt.record_ids[0].to_bytes(8, "little") if by_record else prompt.key


def reach(
    teacher: Model, hidden_PH: Tensor, input_ids_P: Tensor, flat_N: Tensor, depths_N: Tensor, vocabulary_size: int
) -> Tensor:
    """float32 [N]: the teacher's probability of the tokens of choices that each position has read; 1 at depth 0.

    The position s at depth j has read j of them: the product over i = 1 to j of p(token s-j+i | tokens up to s-j+i-1).
    P are all B * S positions of the batch; `input_ids_P`, `flat_N` and `depths_N` are on the CPU.
    """
    # position 7 at depth 2 was reached by the steps from 5 to 6 and from 6 to 7: the places 5 and 6, of owner 7
    owners_J = torch.arange(len(flat_N)).repeat_interleave(depths_N)
    steps_back_J = torch.cat([torch.zeros(0, dtype=torch.int64), *(torch.arange(d, 0, -1) for d in depths_N.tolist())])
    places_L, inverse_J = (flat_N[owners_J] - steps_back_J).unique(return_inverse=True)
    device = hidden_PH.device
    log_p_parts = [
        logits(teacher, hidden_PH[to_device(part_L, device)], vocabulary_size)
        .float()
        .log_softmax(dim=1)
        .gather(1, to_device(input_ids_P[part_L + 1, None], device))[:, 0]
        for part_L in places_L.split(HEAD_POSITIONS)
    ]
    log_p_J = torch.cat(log_p_parts)[to_device(inverse_J, device)]
    log_reach_N = torch.zeros(len(flat_N), dtype=torch.float64, device=device)
    return log_reach_N.index_add(0, to_device(owners_J, device), log_p_J.double()).exp().float()


def capture_positions(
    logits_NV: Tensor, targets_N: Tensor, uniforms_ND: Tensor, manifest: Manifest, also_NJ: Tensor | None = None
) -> Captured:
    """The captured columns of N positions: top-k, log-probability of the target (NaN if it is unknown), entropy."""
    k, temperatures = (manifest.k, manifest.temperatures) if manifest.kind == "topk" else (1, (1.0,))
    top, log_z_N, entropy_N = top_k_and_entropy(logits_NV, k=k, temperatures=temperatures)
    largest_N = logits_NV.gather(1, top.ids_NK[:, :1])[:, 0].float()
    if manifest.kind == "sampled":
        top = sampled(logits_NV, uniforms_ND=uniforms_ND)
    elif manifest.kind == "hybrid":
        top = hybrid(logits_NV, k=manifest.k, uniforms_ND=uniforms_ND)
    elif also_NJ is not None:
        top = keep_also(top, logits_NV, also_NJ)
    target_logits_N = logits_NV.gather(1, targets_N.clamp(min=0)[:, None])[:, 0].float()
    log_prob_N = torch.where(targets_N == UNKNOWN_TARGET, torch.nan, target_logits_N - largest_N - log_z_N)
    return Captured(top=top, next_log_prob_N=log_prob_N.half(), entropy_N=entropy_N.half())


# ------------------------------------------------------------------------------- from device to memory


def start_copy(batch: Sequence[TokenSequence], captured: Captured, started: Any) -> PendingBatch:
    """Start the copy of a batch to host memory; a GPU copies on a second stream, during the next forward."""
    device = captured.entropy_N.device
    ended = timestamp(device)
    if device.type == "cuda":
        stream = _copy_stream(device)
        stream.wait_event(ended)
        with torch.cuda.stream(stream):
            captured = map_tensors(captured, partial(_copy_to_pinned, stream=stream))
            copied = stream.record_event()
        return PendingBatch(sequences=batch, captured=captured, started=started, ended=ended, copied=copied)
    return PendingBatch(sequences=batch, captured=captured, started=started, ended=ended)


def _copy_to_pinned(column: Tensor, *, stream: torch.cuda.Stream) -> Tensor:
    if column.device.type == "cpu":
        return column
    host = torch.empty(column.shape, dtype=column.dtype, pin_memory=True)
    host.copy_(column, non_blocking=True)
    column.record_stream(stream)  # the allocator must not reuse its memory before the copy is done
    return host


def finish_copy(pending: PendingBatch) -> tuple[list[Captured], float]:
    """Wait until a batch is in host memory; returns each sequence's captured columns, and the forward's seconds."""
    if pending.copied is None:
        seconds = pending.ended - pending.started
    else:
        pending.copied.synchronize()
        seconds = pending.started.elapsed_time(pending.ended) / 1000
    counts = [len(sequence.target_positions_N) for sequence in pending.sequences]
    return pending.captured.split(counts), seconds


def timestamp(device: torch.device) -> Any:
    """The present time on a device's clock: seconds on a CPU, a CUDA event in the stream of the forward on a GPU.

    The stream is named, because that of another device is idle: its event would be reached before the forward ends.
    """
    if device.type != "cuda":
        return time.monotonic()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


@lru_cache(maxsize=8)
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
