"""Weights of a model that only runs forwards, laid out as a CPU multiplies them."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.core.runtime import has_fast_matmul
from pipeline.models.forward import Model


class PrepackedLinear(torch.nn.Module):
    """A linear layer whose weight lies in oneDNN's own layout; the same bits come out, without a gradient.

    Otherwise each product lays the whole weight out anew: 5 % of a forward over 1,024 tokens, and two fifths to
    three quarters of one over a single token (measured on AVX-512 with bfloat16).
    """

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach(), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(input, self.weight, self.bias, "none", [], "")


def prepack(model: Model) -> Model:
    """The model with its bfloat16 linear layers laid out for a CPU, in place; elsewhere there is nothing to do.

    Nothing is held twice but a head that is tied to the embeddings.
    """
    if model.device.type == "cpu" and has_fast_matmul(torch.bfloat16, model.device):
        for name, layer in list(model.named_modules()):
            # no subclass: what else it does, this one would not
            if type(layer) is torch.nn.Linear and layer.weight.dtype == torch.bfloat16:
                model.set_submodule(name, PrepackedLinear(layer))
    return model
