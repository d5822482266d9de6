"""The memory of a device in stage two, forecast from sizes alone."""

from __future__ import annotations

from dataclasses import dataclass

FLOAT32_BYTES = 4
MOMENTS = 2  # AdamW keeps two numbers for each parameter
ACTIVATION_BYTES = 34  # of a layer for each token and hidden number, in 16 bits


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSize:
    """What the memory of a device follows from."""

    parameters: int
    zero_stage: int
    ranks: int
    is_half: bool
    """Weights in 16 bits, beside which the optimizer keeps them in float32."""
    accumulates: bool
    """Several micro-batches a step: in 16 bits their gradients are summed in float32."""
    offloads: bool
    """The optimizer's state is in host memory; at ZeRO 3 the weights too."""
    tokens: int
    """Of a micro-batch."""
    hidden: int
    layers: int
    head_bytes: int
    """The loss's own: the logits of a chunk, and the float32 gradient of the head."""


def forecast(size: RunSize) -> int:
    """Bytes of one device: weights, gradients, optimizer, activations and head.

    Rajbhandari et al. 2019 (arXiv 1910.02054, section 3), for P parameters, N ranks and weights of w bytes (2 or 4):

        w P  +  w P  +  (4 + 8) P,  each divided by N from ZeRO stage 3, 2 and 1 on

    The optimizer's part are float32 weights and two moments; DeepSpeed keeps those weights from ZeRO 1 on in float32
    training too. Summing gradients of 16 bits in float32 adds 4 P to the second part. Activations are 34 bytes for each
    token, layer and hidden number in 16 bits (Korthikanti et al. 2022, arXiv 2205.05198, section 4.1, without the
    attention scores, which no fast kernel keeps).
    """
    width = 2 if size.is_half else FLOAT32_BYTES
    sum_width = FLOAT32_BYTES if size.is_half and size.accumulates else 0
    weights = width * size.parameters // (size.ranks if size.zero_stage == 3 else 1)
    gradients = (width + sum_width) * size.parameters // (size.ranks if size.zero_stage >= 2 else 1)
    has_copy = size.is_half or size.zero_stage > 0
    state = FLOAT32_BYTES * (MOMENTS + has_copy) * size.parameters // (size.ranks if size.zero_stage >= 1 else 1)
    if size.offloads:
        state = 0
        weights = 0 if size.zero_stage == 3 else weights
    activations = ACTIVATION_BYTES * width // 2 * size.tokens * size.hidden * size.layers
    return weights + gradients + state + activations + size.head_bytes
