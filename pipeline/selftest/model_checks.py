"""Checks of a model on a device: its attention kernels keep packed segments apart, and the fused head is exact."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from pipeline.cache.shards import ShardReader
from pipeline.config.schema import Dtype
from pipeline.core.runtime import compute_device
from pipeline.core.types import Batch
from pipeline.data.mixture import collate
from pipeline.models.compatibility import check_packing
from pipeline.models.forward import Model, hidden_states
from pipeline.objective.fused_head import combined_loss
from pipeline.objective.terms import StepInputs, TermOptions
from pipeline.selftest.outcomes import Finding, judged, skipped
from pipeline.selftest.place import Place, captured, missing_gpus, open_place_model

EAGER, SDPA, SDPA_SEGMENTS = "eager", "sdpa", "sdpa_segments"
FLEX, FLASH = "flex_attention", "flash_attention_2"
HEAD_ROWS = 16  # sequences whose loss is compared
SEGMENT_LENGTHS = (7, 20, 5)
LIMITS = {Dtype.float32: 1e-4, Dtype.bfloat16: 0.05}  # of a relative difference


def packing(place: Place, kernel: str | None) -> Finding:
    """Packed segments under an attention kernel: changing one changes no other, and each is what it is alone.

    None: the kernel with which a model is loaded where no option names one.
    """
    if reason := why_not(kernel):
        return skipped(reason)
    device = compute_device()
    # on a GPU these take another way in half precision: torch's FlashAttention
    is_half = kernel == FLASH or (device.type == "cuda" and kernel in (None, SDPA_SEGMENTS))
    dtype = Dtype.bfloat16 if is_half else Dtype.float32
    model = open_place_model(place, device, dtype, attention=kernel)
    check_packing(model)  # InputError if one segment reads another
    off, gradient_off = packed_against_alone(model)
    limit = LIMITS[dtype]
    used = model.config._attn_implementation
    figures = (
        f"{used} on {device} in {dtype.name}: packed against alone {off:.2g} of a hidden state, {gradient_off:.2g} "
    )
    return judged(max(off, gradient_off) <= limit, f"{figures}of the gradient ({limit:g})")


def why_not(kernel: str | None) -> str | None:
    """Why this machine cannot run an attention kernel, or not in the time of a self-test; None if it can."""
    no_gpu = missing_gpus(1)
    if kernel == FLEX and no_gpu:
        return f"{no_gpu} (a CPU compiles this kernel for a minute)"
    if kernel == FLASH and no_gpu is None and importlib.util.find_spec("flash_attn") is None:
        return "package flash_attn is not installed"
    return no_gpu if kernel == FLASH else None


def packed_against_alone(model: Model) -> tuple[float, float]:
    """Packed segments against each of them alone: the largest difference of a hidden state, as a fraction.

    And that of the gradient on the embeddings, in norm.
    """
    positions_S = torch.cat([torch.arange(length) for length in SEGMENT_LENGTHS]).to(model.device)
    ids_S = (torch.arange(len(positions_S), device=model.device) * 7 + 3) % 250
    packed_SH = hidden_states(model, ids_S[None], positions_S[None])[0].float()
    parts = zip(ids_S.split(SEGMENT_LENGTHS), positions_S.split(SEGMENT_LENGTHS), strict=True)
    alone_SH = torch.cat([hidden_states(model, ids[None], positions[None])[0].float() for ids, positions in parts])
    direction_SH = torch.randn(packed_SH.shape, generator=torch.Generator().manual_seed(0)).to(packed_SH)
    weight = model.get_input_embeddings().weight
    gradients = [torch.autograd.grad((one * direction_SH).sum(), weight)[0] for one in (packed_SH, alone_SH)]
    off = float(((packed_SH - alone_SH).abs().max() / packed_SH.abs().max()).detach())
    return off, relative(*gradients)


def fused_head(place: Place, dtype: Dtype) -> Finding:
    """Loss and gradients of the fused head, against full logits and autograd on the same device."""
    device = compute_device()
    if dtype is Dtype.bfloat16 and (reason := missing_gpus(1)):
        return skipped(reason)
    reader = ShardReader(captured(place))
    rows = [reader.row(0, row) for row in range(min(HEAD_ROWS, reader.blocks[0]))]
    batch, model = collate(rows, [False] * len(rows)).to(device), open_place_model(place, device, dtype)
    with torch.no_grad():
        hidden_BSH = hidden_states(model, batch.input_ids_BS, batch.position_ids_BS)
    hidden_NH = hidden_BSH.flatten(0, 1)[batch.flat_positions_N]
    size = place.manifest.vocabulary_size
    found, expected = (loss_and_gradients(model, hidden_NH, batch, size, fused=fused) for fused in (True, False))
    off = [relative(one, other) for one, other in zip(found, expected, strict=True)]
    figures = "loss off by {:.1e}, gradients by {:.1e} (hidden) and {:.1e} (weight)".format(*off)
    return judged(max(off) <= LIMITS[dtype], f"{device} {dtype.name}: {figures}, at most {LIMITS[dtype]:g}")


def loss_and_gradients(
    model: Model, hidden_NH: Tensor, batch: Batch, vocabulary_size: int, *, fused: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The combined loss, and its gradients on the hidden states and on the head's weight."""
    terms = {"lm": TermOptions(on=("corpus",)), "kd": TermOptions(on=("corpus",))}
    step = StepInputs(coefficients=dict.fromkeys(terms, 1.0 / len(hidden_NH)))
    hidden_NH = hidden_NH.detach().clone().requires_grad_()
    loss, _ = combined_loss(model, hidden_NH, batch, terms, step, vocabulary_size=vocabulary_size, fused=fused)
    on_hidden_NH, on_weight_VH = torch.autograd.grad(loss, [hidden_NH, model.get_output_embeddings().weight])
    return loss.detach(), on_hidden_NH, on_weight_VH


def relative(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference over the norm of what is expected."""
    return float((found.float() - expected.float()).norm() / expected.float().norm())
