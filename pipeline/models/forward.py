"""From hidden states to logits: what a model does there, whole or taken apart."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from pipeline.core.types import InputError

Model = Any  # a transformers causal language model


def logits(model: Model, hidden_NH: Tensor, vocabulary_size: int) -> Tensor:
    """Logits [N, V] over the real vocabulary: the head, then the scale or soft cap that the model declares."""
    logits_NV = model.get_output_embeddings()(hidden_NH)[:, :vocabulary_size]
    scale, softcap = logit_rules(model)
    if scale != 1.0:
        logits_NV = logits_NV * scale
    if softcap is not None:
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
    return logits_NV


def logit_rules(model: Model) -> tuple[float, float | None]:
    """What a model multiplies the head's output by, and where it caps it softly: cap * tanh(logit / cap)."""
    config = model.config
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
    if scaling := getattr(config, "logits_scaling", None):  # Granite
        scale /= scaling
    return scale, getattr(config, "final_logit_softcapping", None) or None  # Gemma


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LinearHead:
    """A head as sums of products: logits = cap(scale * (bias + sum of features @ weight^T))."""

    maps: list[tuple[Tensor, Tensor]]
    """(features [N, F], weight [V or more, F]); rows beyond the vocabulary are padding."""
    bias_V: Tensor | None
    scale: float
    softcap: float | None


def linear_head(model: Model, hidden_NH: Tensor) -> LinearHead:
    """The head taken apart, for whom its logits should not be one matrix: a linear layer, LoRA beside it or not.

    LoRA adds one product of few features: logits += (s * dropout(h) A^T) B^T (Hu et al. 2021, arXiv 2106.09685).
    """
    layer = model.get_output_embeddings()
    if hasattr(layer, "modules_to_save"):  # peft's copy of a layer that is trained whole
        (name,) = layer.active_adapters
        layer = layer.modules_to_save[name]
    maps, adapters = [], []
    if hasattr(layer, "lora_A"):
        adapters = [] if layer.merged or layer.disable_adapters else list(layer.active_adapters)
        for name in adapters:
            a, b = layer.lora_A[name], layer.lora_B[name]
            is_plain = name not in getattr(layer, "lora_variant", {}) and b.bias is None
            if not is_plain:
                raise InputError(f"head: expected plain LoRA, found a variant in {name}; use loss.head=full")
            dropped_NH = layer.lora_dropout[name](hidden_NH).to(a.weight.dtype)
            maps.append((a(dropped_NH) * layer.scaling[name], b.weight))
        layer = layer.base_layer
    if type(layer) is not torch.nn.Linear:
        raise InputError(f"head: expected a linear layer, found {type(layer).__name__}; use loss.head=full")
    scale, softcap = logit_rules(model)
    maps.insert(0, (hidden_NH, layer.weight))
    return LinearHead(maps=maps, bias_V=layer.bias, scale=scale, softcap=softcap)


def hidden_states(model: Model, input_ids_BS: Tensor, position_ids_BS: Tensor) -> Tensor:
    """Last hidden states [B, S, H] of packed segments that cannot see each other.

    Positions that restart, no attention mask and no cache: transformers then masks across segments.
    """
    decoder = model.get_decoder()
    return decoder(input_ids=input_ids_BS, position_ids=position_ids_BS, use_cache=False).last_hidden_state
