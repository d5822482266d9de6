"""Logits in float32 of a model in bfloat16 or float16: likelihoods that are compared must not be rounded to ties."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.models.forward import Model, logits
from pipeline.models.prepack import PrepackedLinear

PART_ELEMENTS = 1 << 24  # of the weight that are in float32 at once: 64 MB


@torch.no_grad()
def logits_float32(model: Model, hidden_NH: Tensor, vocabulary_size: int) -> Tensor:
    """`logits` with the head's products, their sums and what follows them in float32; weights keep their type.

    In bfloat16 the numbers from 16 to 32 are 0.125 apart: logits that differ by less may become equal.
    """
    with _products_in_float32(model.get_output_embeddings()):
        return logits(model, hidden_NH, vocabulary_size).float()


@contextlib.contextmanager
def _products_in_float32(head: nn.Module) -> Iterator[None]:
    """Replace the forward of the head's linear layers, with LoRA those of the adapter too; their hooks stay.

    Only inside a layer's own call, between its hooks, does a weight exist that ZeRO-3 partitions.
    """
    half = (torch.bfloat16, torch.float16)
    # not a subclass: it may store its weight otherwise; its product keeps the type that it has
    linear: Iterator[Any] = (layer for layer in head.modules() if type(layer) in (nn.Linear, PrepackedLinear))
    layers = [layer for layer in linear if layer.weight.dtype in half]
    for layer in layers:
        layer.forward = functools.partial(_linear_float32, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _linear_float32(layer: Any, input_NF: Tensor) -> Tensor:
    """The layer's product in float32, with its weight converted part by part."""
    weight_VF = layer.weight.to_dense() if layer.weight.is_mkldnn else layer.weight
    input_NF = input_NF.float()
    output_NV = input_NF.new_empty(len(input_NF), len(weight_VF))
    rows = max(PART_ELEMENTS // weight_VF.shape[1], 1)
    for part_RF, output_NR in zip(weight_VF.split(rows), output_NV.split(rows, dim=1), strict=True):
        torch.mm(input_NF, part_RF.float().T, out=output_NR)
    return output_NV if layer.bias is None else output_NV + layer.bias.float()
