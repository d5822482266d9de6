"""From hidden states to the loss and its gradients in one pass, without a matrix of all positions by the vocabulary.

For each chunk of positions: one matmul gives the logits, `block_loss.py` turns them into the loss and overwrites them
with their gradient, and two matmuls give the gradients of the hidden states and of the weight.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.core.runtime import has_fast_matmul
from pipeline.core.types import Batch
from pipeline.models.forward import Model, linear_head, logits
from pipeline.objective import diagnostics
from pipeline.objective.block_loss import LossInputs, group_loss, loss_of_block
from pipeline.objective.class_prior import class_names
from pipeline.objective.position_groups import PositionGroup, group_positions, select_logits
from pipeline.objective.terms import StepInputs, TermOptions, classes_of

CHUNK_BYTES = 100_000_000  # logits of one matmul; large, so that the weight's gradient is seldom added to
MIN_CHUNK_POSITIONS = 256  # with a large vocabulary a chunk takes more than CHUNK_BYTES, because small ones are slow
WEIGHT_GRAD_ROWS = 4096  # rows of a half-precision product at once, before they are added to the fp32 gradient
CPU_BLOCK_POSITIONS = 32  # on a CPU, positions handled at once: their logits then stay in its cache


def combined_loss(
    model: Model,
    hidden_NH: Tensor,
    batch: Batch,
    terms: dict[str, TermOptions],
    step: StepInputs,
    *,
    vocabulary_size: int,
    fused: bool = True,
) -> tuple[Tensor, Tensor]:
    """The micro-batch's part of the loss, float32 [], and without a gradient the sums behind it: see `sum_names`.

    `hidden_NH` are the hidden states at the batch's supervised positions; a position that no term reads never reaches
    the head. With `fused=False` the same result comes from full logits and autograd: slower and larger, but it works
    for heads that are not linear. InputError if `fused` and the head is not linear.
    """
    groups = group_positions(batch, terms)
    inputs = LossInputs(
        groups=groups, terms=terms, step=step, sum_names=sum_names(terms), vocabulary_size=vocabulary_size
    )
    # the positions of the first group, then those of the second, ...; the empty tensor is for a batch without groups
    order_N = torch.cat([hidden_NH.new_zeros(0, dtype=torch.int64), *(group.rows_N for group in groups)])
    hidden_NH = hidden_NH.index_select(0, order_N)
    if not fused:
        logits_NV = logits(model, hidden_NH, vocabulary_size)
        return _full_logits_loss(logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)), inputs)
    head = linear_head(model, hidden_NH)
    maps = [tensor for pair in head.maps for tensor in pair]
    inputs = dataclasses.replace(inputs, scale=head.scale, softcap=head.softcap)
    return _FusedLoss.apply(inputs, head.bias_V, *maps)


def sum_names(terms: dict[str, TermOptions]) -> tuple[str, ...]:
    """The names of the sums beside the loss, in order: the terms, the diagnostics, the classes of `confidence`."""
    return (*terms, *diagnostics.NAMES, *class_names(classes_of(terms)))


# ------------------------------------------------------------------------------ through full logits


def _full_logits_loss(logits_NV: Tensor, inputs: LossInputs) -> tuple[Tensor, Tensor]:
    # starting from 0 * logits, a micro-batch that no term reads still has a gradient for every weight
    losses = [0.0 * logits_NV[:0].sum().double()]
    sums = [logits_NV.new_zeros(len(inputs.sum_names), dtype=torch.float64)]
    first = 0
    for group in inputs.groups:
        group_NV = logits_NV[first : first + len(group.rows_N)]
        first += len(group.rows_N)
        group = group.with_student_top(group_NV, inputs.class_ids, inputs.step.thresholds)
        student = select_logits(group_NV, group, inputs.temperatures(group), overlap=inputs.step.diagnose)
        value, group_sums = group_loss(student, group, inputs)
        losses.append(value)
        sums.append(group_sums)
    return torch.stack(losses).sum().float(), torch.stack(sums).sum(dim=0)


# --------------------------------------------------------------------------------------- in one pass


class _FusedLoss(torch.autograd.Function):
    """(inputs, bias, features, weight, ...) -> (loss, sums); logits = bias + sum of features @ weight^T."""

    @staticmethod
    def forward(ctx: Any, inputs: LossInputs, bias_V: Tensor | None, *maps: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and its gradients at the same time, because both need the same logits."""
        loss, sums, gradients = _loss_and_gradients(inputs, bias_V, maps, ctx.needs_input_grad[1:])
        ctx.gradients, ctx.loss_scale = gradients, inputs.step.loss_scale
        ctx.mark_non_differentiable(sums)
        return loss, sums

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        """The gradients computed in the forward, times the gradient of the loss."""
        gradients, ctx.gradients = ctx.gradients, None
        grad_loss = grad_loss / ctx.loss_scale  # the gradients contain the loss scale already
        # multiplying by 1 would cost a full pass over the weight; reading the factor from a GPU would wait for it
        if grad_loss.is_cuda or grad_loss != 1.0:
            gradients = [None if gradient is None else gradient.mul_(grad_loss) for gradient in gradients]
        return None, *gradients


def _loss_and_gradients(
    inputs: LossInputs, bias_V: Tensor | None, maps: Sequence[Tensor], needs_grad: Sequence[bool]
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Loss, sums, and the gradients of (bias, features, weight, ...), None where none is needed.

    `maps` and `needs_grad` hold features and weights in turn: features at 0, 2, ... of `maps` and, behind the bias, at
    1, 3, ... of `needs_grad`.
    """
    dtype = maps[0].dtype if has_fast_matmul(maps[0].dtype, maps[0].device) else torch.float32
    features = [x_NH.to(dtype) for x_NH in maps[0::2]]
    weights = [w_VH[: inputs.vocabulary_size].to(dtype) for w_VH in maps[1::2]]
    device = features[0].device
    bias_grad = None
    if bias_V is not None and needs_grad[0]:
        bias_grad = torch.zeros(len(bias_V), dtype=torch.float32, device=device)
    feature_grads = [
        torch.empty_like(x_NH) if need else None for x_NH, need in zip(features, needs_grad[1::2], strict=True)
    ]
    weight_grads = [
        torch.zeros(w_VH.shape, dtype=torch.float32, device=device) if need else None
        for w_VH, need in zip(maps[1::2], needs_grad[2::2], strict=True)
    ]
    # a function of its own, so that the logits are freed before the gradients are copied to the types of their tensors
    loss, sums = _add_chunks(inputs, features, weights, bias_V, feature_grads, weight_grads, bias_grad)
    pairs = zip(feature_grads, weight_grads, strict=True)
    gradients = [bias_grad, *(gradient for pair in pairs for gradient in pair)]
    with_tensors = zip(gradients, [bias_V, *maps], strict=True)
    return loss.float(), sums, [g if g is None or x is None else g.to(x.dtype) for g, x in with_tensors]


def _add_chunks(
    inputs: LossInputs,
    features: Sequence[Tensor],
    weights: Sequence[Tensor],
    bias_V: Tensor | None,
    feature_grads: Sequence[Tensor | None],
    weight_grads: Sequence[Tensor | None],
    bias_grad: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Loss and sums, chunk by chunk; the gradients of features are written, those of weights and bias are added to."""
    num, vocabulary, device = len(features[0]), len(weights[0]), features[0].device
    chunk = chunk_size(num, vocabulary * features[0].element_size())
    buffer_CV = features[0].new_empty(chunk, vocabulary)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    sums = torch.zeros(len(inputs.sum_names), dtype=torch.float64, device=device)
    for first in range(0, num, chunk):
        rows = slice(first, min(first + chunk, num))
        logits_CV = buffer_CV[: rows.stop - rows.start]
        torch.mm(features[0][rows], weights[0].T, out=logits_CV)
        for x_NH, w_VH in zip(features[1:], weights[1:], strict=True):
            logits_CV.addmm_(x_NH[rows], w_VH.T)
        if bias_V is not None:
            logits_CV += bias_V[:vocabulary].to(logits_CV.dtype)
        for group, block in _blocks(inputs.groups, rows):
            block_loss, block_sums = loss_of_block(logits_CV[block], group, inputs)
            loss, sums = loss + block_loss, sums + block_sums
        grad_CV = logits_CV  # `loss_of_block` has overwritten the logits with their gradient
        if bias_grad is not None:
            bias_grad[:vocabulary] += grad_CV.sum(dim=0, dtype=torch.float32)
        for x_NH, w_VH, x_grad_NH, w_grad_VH in zip(features, weights, feature_grads, weight_grads, strict=True):
            if x_grad_NH is not None:
                x_grad_NH[rows] = torch.mm(w_VH.T, grad_CV.T).T  # on a CPU faster than gradient @ weight
            if w_grad_VH is not None:
                _add_product(w_grad_VH[:vocabulary], grad_CV.T, x_NH[rows])
    return loss, sums


def chunk_size(num: int, row_bytes: int) -> int:
    """Positions in one matmul: chunks of equal size, because a small last one too costs a full pass over the weight."""
    max_positions = max(CHUNK_BYTES // row_bytes, MIN_CHUNK_POSITIONS)
    return max(math.ceil(num / max(round(num / max_positions), 1)), 1)


def _add_product(total_VH: Tensor, left_VC: Tensor, right_CH: Tensor) -> None:
    """total += left @ right, added in float32 whatever the type of the factors."""
    if left_VC.dtype == total_VH.dtype:
        total_VH.addmm_(left_VC, right_CH)
        return
    for total_RH, left_RC in zip(total_VH.split(WEIGHT_GRAD_ROWS), left_VC.split(WEIGHT_GRAD_ROWS), strict=True):
        total_RH += left_RC @ right_CH


def _blocks(groups: Sequence[PositionGroup], rows: slice) -> Iterator[tuple[PositionGroup, slice]]:
    """The positions of a chunk in blocks of one group each: (the group at these positions, their rows in the chunk).

    With groups of 5 and 4 positions, the chunk of rows 3 to 6 has two blocks: positions 3 and 4 of the first group at
    chunk rows 0 and 1, and positions 0 and 1 of the second group at chunk rows 2 and 3.
    """
    group_start = 0
    for group in groups:
        group_stop = group_start + len(group.rows_N)
        first, last = max(group_start, rows.start), min(group_stop, rows.stop)
        size = CPU_BLOCK_POSITIONS if group.rows_N.device.type == "cpu" else max(last - first, 1)
        for start in range(first, last, size):
            stop = min(start + size, last)
            part = group.select(slice(start - group_start, stop - group_start))
            yield part, slice(start - rows.start, stop - rows.start)
        group_start = group_stop
