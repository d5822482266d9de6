"""Attention kernels that keep packed segments apart without a mask of [B, 1, S, S], and where those segments are.

transformers' kernels `sdpa` and `eager` compute S * S scores for each row of a batch, and mask those of other segments.
The kernels here take a micro-batch as one row, all of its rows end to end, and compute each segment alone:

- `sdpa_segments`: torch's scaled_dot_product_attention; on GPUs in half precision its FlashAttention for all segments
- `eager_segments`: the model's own eager attention, with whatever it does to scores (soft cap, attention sinks)

FlashAttention and FlexAttention keep the segments of one row apart by themselves.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from pipeline.core.types import InputError

States = tuple[Tensor, Tensor, Tensor]  # query, key and value, [1, heads, tokens, D]

MASKED_ROWS = ("sdpa", "eager")  # kernels that take the rows of a batch and a mask; all others take one row
FLOAT32_TOKENS = 1024  # shorter segments are faster on a CPU in float32 than in bfloat16 (twice as fast at 100 tokens)


def segment_lengths(position_ids_BS: Tensor) -> list[int]:
    """Tokens of each segment, of all rows end to end; a segment ends where the next position is not the next number."""
    begins_BS = torch.ones_like(position_ids_BS, dtype=torch.bool)
    begins_BS[:, 1:] = position_ids_BS.diff(dim=1) != 1
    starts = begins_BS.flatten().nonzero()[:, 0].tolist()
    return [end - start for start, end in zip(starts, [*starts[1:], begins_BS.numel()], strict=True)]


def segment_arguments(lengths: list[int], device: torch.device) -> dict[str, Any]:
    """What a decoder hands to its attention: the lengths for our kernels, `cu_seq_lens_*` for FlashAttention.

    They are known on the host, so no layer waits for the device. Without them transformers reads the position ids in
    each layer, and not all models hand these on.
    """
    borders, longest = torch.tensor([0, *lengths]).cumsum(0).int().to(device, non_blocking=True), max(lengths)
    flash = {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": longest, "max_length_k": longest}
    return {"segment_lengths": lengths, **flash}


# ------------------------------------------------------------------------------- what transformers calls


def segments_mask(*, dense_mask: Callable[..., Tensor | None], **call: Any) -> Tensor | None:
    """For one row of segments an empty tensor [1, 1, 0, W] instead of a mask; W: the layers' sliding window, or 0.

    A model that adds it to scores by itself fails. Anything else, such as tokens after a KV cache, has `dense_mask`.
    """
    window, num_tokens = call.get("local_size"), call["q_length"]
    is_row = call["batch_size"] == 1 and call.get("attention_mask") is None and call["kv_length"] == num_tokens
    is_whole = call.get("allow_is_causal_skip", True) and (window is None or num_tokens <= window)
    if not is_row or is_whole:
        return dense_mask(**call)
    if call.get("use_vmap") or "allow_is_bidirectional_skip" in call:
        raise InputError("attention: expected causal attention, found another mask of the model; use attention=sdpa")
    if window is not None and window != getattr(call["config"], "sliding_window", None):
        raise InputError("attention: expected a sliding window, found attention in chunks; use attention=sdpa")
    return torch.empty(1, 1, 0, window or 0)


def sdpa_segments(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Any]:
    """Query [1, Q, P, D], key and value [1, K, P, D] -> output [1, P, Q, D]; attention within each segment alone."""
    lengths, window = _packing(query, attention_mask, options)
    if lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    if any(options.get(name) is not None for name in ("position_bias", "s_aux", "softcap")):
        raise InputError("attention: expected plain scores, found a bias, sinks or a soft cap; use attention=eager")
    if _has_fused_varlen(query, value, options):
        return _fused_varlen(query, key, value, window=window, **options), None
    outputs = []
    for segment in _segments(lengths, query, key, value):
        if query.device.type == "cpu" and query.dtype.itemsize < 4 and segment[0].shape[2] <= FLOAT32_TOKENS:
            segment = (segment[0].float(), segment[1].float(), segment[2].float())
        for part, mask in _blocks(segment, window):
            output, _ = sdpa_attention_forward(module, *part, attention_mask=mask, **options)  # without one causal
            outputs.append(output.to(query.dtype))
    return torch.cat(outputs, dim=1), None


def eager_segments(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Any]:
    """As `sdpa_segments`, by the function that the model's own code defines; S * S scores for a segment of S tokens."""
    attend = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if attend is None:
        raise InputError(f"attention: expected {type(module).__name__} to have an eager attention; use attention=sdpa")
    lengths, window = _packing(query, attention_mask, options)
    if lengths is None:
        return attend(module, query, key, value, attention_mask, **options)
    if options.get("position_bias") is not None:
        raise InputError("attention: expected no bias by position, found one; use attention=eager")
    outputs = []
    for segment in _segments(lengths, query, key, value):
        for part, mask in _blocks(segment, window):
            length = part[0].shape[2]
            visible = _visible(length, length, 0, query.device) if mask is None else mask
            added = torch.zeros_like(visible, dtype=query.dtype).masked_fill(~visible, torch.finfo(query.dtype).min)
            outputs.append(attend(module, *part, added, **options)[0])
    return torch.cat(outputs, dim=1), None


# ------------------------------------------------------------------------------------------ segments


def _packing(query: Tensor, attention_mask: Tensor | None, options: dict[str, Any]) -> tuple[list[int] | None, int]:
    """The lengths of the segments, and the sliding window or 0; no lengths, if this is not one row of segments."""
    if attention_mask is None or attention_mask.numel() > 0:
        return None, 0
    if "segment_lengths" not in options and options.get("position_ids") is not None:  # the model was called directly
        options |= segment_arguments(segment_lengths(options["position_ids"]), query.device)
    lengths = options.get("segment_lengths")
    if lengths is None or sum(lengths) != query.shape[2]:
        raise InputError("attention: expected a model that hands on the lengths of segments; use attention=sdpa")
    return lengths, attention_mask.shape[3]


def _segments(lengths: list[int], query: Tensor, key: Tensor, value: Tensor) -> Iterator[States]:
    return zip(query.split(lengths, dim=2), key.split(lengths, dim=2), value.split(lengths, dim=2), strict=True)


def _blocks(segment: States, window: int) -> Iterator[tuple[States, Tensor | None]]:
    """Query, key, value and mask of parts of a segment: one without a mask, or blocks of queries of a sliding window.

    A block of W queries sees at most 2 W - 1 keys, so memory grows with the segment, not with its square.
    """
    query, key, value = segment
    length = query.shape[2]
    if window == 0 or length <= window:
        yield segment, None
        return
    for first in range(0, length, window):
        end, first_key = min(first + window, length), max(first - window + 1, 0)
        keys = slice(first_key, end)
        mask = _visible(end - first, end - first_key, window, query.device)
        yield (query[:, :, first:end], key[:, :, keys], value[:, :, keys]), mask


def _visible(num_queries: int, num_keys: int, window: int, device: torch.device) -> Tensor:
    """bool [1, 1, queries, keys]: the keys up to a query, at most `window` of them; the last query is the last key."""
    keys = torch.arange(num_keys, device=device)
    places = keys[num_keys - num_queries :, None]
    return ((keys <= places) & (keys > places - (window or num_keys)))[None, None]


def _has_fused_varlen(query: Tensor, value: Tensor, options: dict[str, Any]) -> bool:
    """Whether torch's FlashAttention takes these tensors: NVIDIA from Ampere on, half precision, no dropout."""
    size = query.shape[3]
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and torch.version.hip is None
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
        and torch.__version__ >= "2.13"  # of earlier ones its arguments differ, or it is missing
        and size == value.shape[3] <= 256
        and size % 8 == 0
        and options.get("dropout", 0.0) == 0.0
    )


def _fused_varlen(query: Tensor, key: Tensor, value: Tensor, *, window: int, **options: Any) -> Tensor:
    """All segments in one call, which reads their borders on the device."""
    from torch.nn.attention.varlen import varlen_attn

    query_PQD, key_PKD, value_PKD = (states[0].transpose(0, 1) for states in (query, key, value))
    output_PQD = varlen_attn(
        query_PQD,
        key_PKD,
        value_PKD,
        *(options["cu_seq_lens_q"], options["cu_seq_lens_k"], options["max_length_q"], options["max_length_k"]),
        scale=options.get("scaling"),
        window_size=(window - 1 if window else -1, 0),  # keys before and after a query
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output_PQD, Tensor)
    return output_PQD[None]


AttentionInterface.register("sdpa_segments", sdpa_segments)
AttentionInterface.register("eager_segments", eager_segments)
AttentionMaskInterface.register("sdpa_segments", partial(segments_mask, dense_mask=sdpa_mask))
AttentionMaskInterface.register("eager_segments", partial(segments_mask, dense_mask=eager_mask))
