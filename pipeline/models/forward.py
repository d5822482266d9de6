"""A model's forward in two parts, input ids to hidden states and hidden states to logits, and its head as a value."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.core.types import InputError
from pipeline.models.attention import MASKED_ROWS, segment_arguments, segment_lengths

Model = Any  # a transformers causal language model

HEAD_POSITIONS = 512  # positions that pass through the head at once: bounds the memory of the [N, V] logits


def logits(model: Model, hidden_NH: Tensor, vocabulary_size: int) -> Tensor:
    """Logits [N, V] over the tokenizer's vocabulary: the head, then the scale and soft cap of the model's config."""
    logits_NV = model.get_output_embeddings()(hidden_NH)[:, :vocabulary_size]
    scale, softcap = logit_rules(model)
    if scale != 1.0:
        logits_NV = logits_NV * scale
    if softcap is not None:
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
    return logits_NV


def logit_rules(model: Model) -> tuple[float, float | None]:
    """The factor by which a model multiplies the head's output, and its soft cap: cap * tanh(logit / cap)."""
    config = model.config
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
    if scaling := getattr(config, "logits_scaling", None):  # Granite
        scale /= scaling
    return scale, getattr(config, "final_logit_softcapping", None) or None  # Gemma


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LinearHead:
    """A head as a sum of matrix products: logits = cap(scale * (bias + sum of features @ weight^T))."""

    maps: list[tuple[Tensor, Tensor]]
    """(features [N, F], weight [V or more, F]); rows beyond the vocabulary are padding."""
    bias_V: Tensor | None
    scale: float
    softcap: float | None


def linear_head(model: Model, hidden_NH: Tensor) -> LinearHead:
    """The parts of a linear head with or without LoRA, for a loss that never holds all logits in one matrix.

    LoRA adds one product with `rank` features: logits += (s * dropout(h) A^T) B^T (Hu et al. 2021, arXiv 2106.09685).
    InputError for any other head.
    """
    layer = model.get_output_embeddings()
    if hasattr(layer, "modules_to_save"):  # peft's copy of a layer whose full weight is trained
        (name,) = layer.active_adapters
        layer = layer.modules_to_save[name]
    maps = []
    if hasattr(layer, "lora_A"):
        adapters = [] if layer.merged or layer.disable_adapters else list(layer.active_adapters)
        for name in adapters:
            lora_a, lora_b = layer.lora_A[name], layer.lora_B[name]
            if name in getattr(layer, "lora_variant", {}) or lora_b.bias is not None:
                raise InputError(f"head: expected plain LoRA, found a variant in {name}; use loss.head=full")
            dropped_NH = layer.lora_dropout[name](hidden_NH).to(lora_a.weight.dtype)
            maps.append((lora_a(dropped_NH) * layer.scaling[name], lora_b.weight))
        layer = layer.base_layer
    if type(layer) is not torch.nn.Linear:
        raise InputError(f"head: expected a linear layer, found {type(layer).__name__}; use loss.head=full")
    scale, softcap = logit_rules(model)
    maps.insert(0, (hidden_NH, layer.weight))
    return LinearHead(maps=maps, bias_V=layer.bias, scale=scale, softcap=softcap)


def hidden_states(model: Model, input_ids_BS: Tensor, position_ids_BS: Tensor) -> Tensor:
    """Last hidden states [B, S, H] of packed segments that cannot attend to each other.

    The position ids restart in each segment. Where they are on the host, nothing waits for the device of the input ids.
    With transformers' `sdpa` and `eager` each row of the batch has its mask [S, S]. All other kernels get one row, and
    know the segments' lengths.
    """
    return _decoded(model, input_ids_BS, position_ids_BS).last_hidden_state.reshape(*input_ids_BS.shape, -1)


def layer_states(model: Model, input_ids_BS: Tensor, position_ids_BS: Tensor, layers: Sequence[int]) -> Tensor:
    """Hidden states [B, S, L * H] after L layers, side by side, of packed segments as in `hidden_states`.

    Layer 1 is the first; the last one's states are those after the model's final norm.
    """
    states = _decoded(model, input_ids_BS, position_ids_BS, output_hidden_states=True).hidden_states
    return torch.cat([states[layer] for layer in layers], dim=-1).reshape(*input_ids_BS.shape, -1)


def _decoded(model: Model, input_ids_BS: Tensor, position_ids_BS: Tensor, **wanted: bool) -> Any:
    """What the decoder returns, with the rows of the batch as they are or end to end, as the kernel wants them."""
    decoder, device = model.get_decoder(), input_ids_BS.device
    if decoder.config._attn_implementation in MASKED_ROWS:
        positions_BS = position_ids_BS.to(device)
        return decoder(input_ids=input_ids_BS, position_ids=positions_BS, use_cache=False, **wanted)
    return decoder(
        input_ids=input_ids_BS.reshape(1, -1),
        position_ids=position_ids_BS.reshape(1, -1).to(device, non_blocking=True),
        use_cache=False,
        **segment_arguments(segment_lengths(position_ids_BS), device),
        **wanted,
    )
