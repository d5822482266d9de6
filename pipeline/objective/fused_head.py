"""From hidden states to the loss in one pass: no matrix over positions and vocabulary, no second backward.

Chunk by chunk: one matmul to logits, the few numbers that the terms read of them, the gradient written over the logits
in place, two matmuls. It is exact because a term reads the logits only at named tokens and through

    log_rest(T) = log sum over the other tokens of exp(z / T),    d log_rest / d z_j = softmax of the others at j / T

so autograd over a few numbers a position, and one scalar times that softmax, are the whole gradient.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.core.runtime import has_fast_matmul
from pipeline.core.types import Batch
from pipeline.models.forward import Model, linear_head, logits
from pipeline.objective import diagnostics
from pipeline.objective.class_prior import class_names, class_sums
from pipeline.objective.divergences import LOG_ZERO
from pipeline.objective.position_groups import PositionGroup, group_positions, select_logits
from pipeline.objective.terms import TERMS, SelectedLogits, StepInputs, TermOptions, classes_of, temperatures_of

CHUNK_BYTES = 100_000_000  # logits of one matmul: large enough that the weight's gradient is not added to often
LEAST_CHUNK = 256  # positions: with a large vocabulary, memory gives way to speed here
SLICE = 4096  # rows of a weight's gradient made at once in a narrower type than it is added up in
BLOCK = 32  # positions whose logits a CPU's cache holds while they are read and written


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LossInputs:
    """What one micro-batch asks of the head."""

    groups: list[PositionGroup]
    terms: dict[str, TermOptions]
    step: StepInputs
    vocabulary_size: int
    scale: float = 1.0
    softcap: float | None = None

    @property
    def class_ids(self) -> tuple[int, ...]:
        """The tokens among which `confidence` chooses."""
        return classes_of(self.terms)

    def temperatures(self, group: PositionGroup) -> tuple[float, ...]:
        """Where the student is looked at: where the terms read it, and at 1 for diagnostics."""
        found = temperatures_of(self.terms, group.names)
        return tuple(sorted({*found, 1.0})) if self.step.diagnose else found


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
    """The micro-batch's share of the loss and, detached, the sums behind it: see `sum_names`.

    `hidden_NH` belongs to the batch's supervised positions. Without `fused`, the same through full logits and autograd:
    slower and larger, for heads that are not linear.
    """
    groups = group_positions(batch, terms)
    work = LossInputs(groups=groups, terms=terms, step=step, vocabulary_size=vocabulary_size)
    order_N = torch.cat([hidden_NH.new_zeros(0, dtype=torch.int64), *(group.rows_N for group in groups)])
    hidden_NH = hidden_NH.index_select(0, order_N)
    if not fused:
        logits_NV = logits(model, hidden_NH, vocabulary_size)
        return _plain(logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)), work)
    head = linear_head(model, hidden_NH)
    pairs = [tensor for pair in head.maps for tensor in pair]
    work = dataclasses.replace(work, scale=head.scale, softcap=head.softcap)
    return _Fused.apply(work, head.bias_V, *pairs)


def _value(student: SelectedLogits, group: PositionGroup, work: LossInputs) -> tuple[Tensor, Tensor]:
    """The loss of some positions, and the sums of each term and diagnostic, in the order of `sum_names`."""
    values = {name: TERMS[name].value(student, group.top, work.terms[name]) for name in group.names}
    sums = {name: value_N.sum() for name, value_N in values.items()}
    loss = torch.stack([work.step.coefficients[name] * total for name, total in sums.items()]).sum()
    if work.step.diagnose:
        sums |= diagnostics.sums(student, group.ids_NJ, group.top, values)
    if work.class_ids and "own" in group.extras:
        assert group.top is not None
        found = class_sums(group.ids_NJ[:, group.extras.index("own")], group.top, work.class_ids)
        sums |= dict(zip(class_names(work.class_ids), torch.cat(found), strict=True))
    zero = loss.new_zeros(())
    return loss, torch.stack([sums.get(name, zero).detach().double() for name in sum_names(work.terms)])


def sum_names(terms: dict[str, TermOptions]) -> tuple[str, ...]:
    """What the vector of sums beside the loss holds."""
    return (*terms, *diagnostics.NAMES, *class_names(classes_of(terms)))


# ------------------------------------------------------------------------------ through full logits


def _plain(logits_NV: Tensor, work: LossInputs) -> tuple[Tensor, Tensor]:
    # begun like this, a micro-batch with nothing to read still has a gradient for every weight
    losses, first = [0.0 * logits_NV[:0].sum().double()], 0
    sums = [logits_NV.new_zeros(len(sum_names(work.terms)), dtype=torch.float64)]
    for group in work.groups:
        mine_NV = logits_NV[first : first + len(group.rows_N)]
        first += len(group.rows_N)
        group = group.with_own(mine_NV, work.class_ids, work.step.thresholds)
        student = select_logits(mine_NV, group, work.temperatures(group), overlap=work.step.diagnose)
        loss, found = _value(student, group, work)
        losses.append(loss)
        sums.append(found)
    return torch.stack(losses).sum().float(), torch.stack(sums).sum(dim=0)


# --------------------------------------------------------------------------------------- in one pass


class _Fused(torch.autograd.Function):
    """(work, bias, features, weight, ...) -> (loss, sums); logits = bias + sum of features @ weight^T."""

    @staticmethod
    def forward(ctx: Any, work: LossInputs, bias_V: Tensor | None, *maps: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and gradients at once: they would need the same logits."""
        loss, sums, gradients = _one_pass(work, bias_V, maps, ctx.needs_input_grad[1:])
        ctx.gradients, ctx.loss_scale = gradients, work.step.loss_scale
        ctx.mark_non_differentiable(sums)
        return loss, sums

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        """The gradients made above, times that of the loss."""
        gradients, ctx.gradients = ctx.gradients, None
        grad_loss = grad_loss / ctx.loss_scale
        if grad_loss.is_cuda or grad_loss != 1.0:  # a pass over the weight that is not for nothing
            gradients = [None if gradient is None else gradient.mul_(grad_loss) for gradient in gradients]
        return None, *gradients


def _one_pass(
    work: LossInputs, bias_V: Tensor | None, maps: Sequence[Tensor], wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Loss, sums, and the gradients of (bias, features, weight, ...) where wanted."""
    dtype = maps[0].dtype if has_fast_matmul(maps[0].dtype, maps[0].device) else torch.float32
    features = [x_NH.to(dtype) for x_NH in maps[0::2]]
    weights = [w_VH[: work.vocabulary_size].to(dtype) for w_VH in maps[1::2]]
    num, vocabulary = len(features[0]), len(weights[0])
    in_float32: dict[str, Any] = {"dtype": torch.float32, "device": features[0].device}
    bias_grad = torch.zeros(len(bias_V), **in_float32) if bias_V is not None and wanted[0] else None
    feature_grads = [
        torch.empty_like(x_NH) if need else None for x_NH, need in zip(features, wanted[1::2], strict=True)
    ]
    weight_grads = [
        torch.zeros(w_VH.shape, **in_float32) if need else None
        for w_VH, need in zip(maps[1::2], wanted[2::2], strict=True)
    ]
    chunk = chunk_size(num, vocabulary * features[0].element_size())
    logits_CV = buffer_CV = features[0].new_empty(chunk, vocabulary)
    loss = torch.zeros((), dtype=torch.float64, device=buffer_CV.device)
    sums = torch.zeros(len(sum_names(work.terms)), dtype=torch.float64, device=buffer_CV.device)
    for first in range(0, num, chunk):
        rows = slice(first, min(first + chunk, num))
        logits_CV = buffer_CV[: rows.stop - rows.start]
        torch.mm(features[0][rows], weights[0].T, out=logits_CV)
        for x_NH, w_VH in zip(features[1:], weights[1:], strict=True):
            logits_CV.addmm_(x_NH[rows], w_VH.T)
        if bias_V is not None:
            logits_CV += bias_V[:vocabulary].to(dtype)
        for group, block in _blocks(work.groups, rows):
            part, found = _block(logits_CV[block], group, work)
            loss, sums = loss + part, sums + found
        # here the logits have become their gradient
        if bias_grad is not None:
            bias_grad[:vocabulary] += logits_CV.sum(dim=0, dtype=torch.float32)
        for i, w_VH in enumerate(weights):
            if (feature_grad := feature_grads[i]) is not None:
                feature_grad[rows] = torch.mm(w_VH.T, logits_CV.T).T  # on a CPU faster than logits @ weight
            if (weight_grad := weight_grads[i]) is not None:
                _add_product(weight_grad[:vocabulary], logits_CV.T, features[i][rows])
    del buffer_CV, logits_CV  # before the gradients are copied to the weights' type
    pairs = zip(feature_grads, weight_grads, strict=True)
    gradients = [bias_grad, *(gradient for pair in pairs for gradient in pair)]
    both = zip(gradients, [bias_V, *maps], strict=True)
    return loss.float(), sums, [g if g is None or o is None else g.to(o.dtype) for g, o in both]


def chunk_size(num: int, row_bytes: int) -> int:
    """Positions in one matmul: all chunks alike, because a small last one would cost a whole pass over the weight."""
    most = max(CHUNK_BYTES // row_bytes, LEAST_CHUNK)
    return max(math.ceil(num / max(round(num / most), 1)), 1)


def _add_product(total_VH: Tensor, left_VC: Tensor, right_CH: Tensor) -> None:
    """total += left @ right, added up in float32 whatever the factors are."""
    if left_VC.dtype == total_VH.dtype:
        total_VH.addmm_(left_VC, right_CH)
        return
    for total_SH, left_SC in zip(total_VH.split(SLICE), left_VC.split(SLICE), strict=True):
        total_SH += left_SC @ right_CH


def _blocks(groups: Sequence[PositionGroup], rows: slice) -> Iterator[tuple[PositionGroup, slice]]:
    """The positions of a chunk in blocks of one group each: (their group, their rows in the chunk)."""
    first_of_group = 0
    for group in groups:
        last_of_group = first_of_group + len(group.rows_N)
        first, last = max(first_of_group, rows.start), min(last_of_group, rows.stop)
        step = BLOCK if group.rows_N.device.type == "cpu" else max(last - first, 1)
        for start in range(first, last, step):
            stop = min(start + step, last)
            part = group.part(slice(start - first_of_group, stop - first_of_group))
            yield part, slice(start - rows.start, stop - rows.start)
        first_of_group = last_of_group


def _block(logits_NV: Tensor, group: PositionGroup, work: LossInputs) -> tuple[Tensor, Tensor]:
    """Loss and sums of some positions; their logits are replaced by the gradient of the loss."""
    z_NV = logits_NV.float()  # the same memory where the logits are float32
    if work.scale != 1.0:
        z_NV.mul_(work.scale)
    slope_NV = None
    if work.softcap is not None:
        z_NV.div_(work.softcap).tanh_()
        slope_NV = 1.0 - z_NV.square()
        z_NV.mul_(work.softcap)
    group = group.with_own(z_NV, work.class_ids, work.step.thresholds)
    student, spread = _look(z_NV, group, work)
    leaves = [student.logits_NJ, *student.log_rest.values()]
    with torch.enable_grad():
        for leaf in leaves:
            leaf.requires_grad_()
        loss, sums = _value(student, group, work)
        gradients = torch.autograd.grad(loss * work.step.loss_scale, leaves, allow_unused=True)
    rests = dict(zip(student.log_rest, gradients[1:], strict=True))
    last, *others = reversed(spread)
    z_NV.mul_(_factor(rests[last], last, spread[last][1]))
    for T in others:
        z_NV.addcmul_(spread[T][0], _factor(rests[T], T, spread[T][1]))
    z_NV.scatter_add_(1, group.ids_NJ, gradients[0])
    if slope_NV is not None:
        z_NV.mul_(slope_NV)
    if work.scale != 1.0:
        z_NV.mul_(work.scale)
    if z_NV is not logits_NV:
        logits_NV.copy_(z_NV)
    return loss.detach(), sums


def _factor(gradient_N: Tensor | None, temperature: float, sum_N: Tensor) -> Tensor:
    """What turns exp(z / T) of the unnamed tokens into their gradient: [N, 1]."""
    if gradient_N is None:
        return torch.zeros_like(sum_N)[:, None]
    return (gradient_N / (temperature * sum_N))[:, None]


def _look(
    z_NV: Tensor, group: PositionGroup, work: LossInputs
) -> tuple[SelectedLogits, dict[float, tuple[Tensor, Tensor]]]:
    """What the terms read, and exp((z - max) / T) of the unnamed tokens with its sum, by T; the last lies in `z_NV`."""
    logits_NJ = z_NV.gather(1, group.ids_NJ)
    z_NV.scatter_(1, group.ids_NJ, LOG_ZERO)
    largest_N = z_NV.amax(dim=1)
    z_NV.sub_(largest_N[:, None])
    temperatures = work.temperatures(group)
    spread = {}
    for T in temperatures:
        e_NV = z_NV if temperatures[-1] == T else torch.empty_like(z_NV)
        torch.exp2(torch.mul(z_NV, math.log2(math.e) / T, out=e_NV), out=e_NV)  # 4 times as fast as `exp` on some CPUs
        spread[T] = (e_NV, e_NV.sum(dim=1))
    overlap = {}
    if work.step.diagnose:
        overlap = {(S, T): (a * b).sum(dim=1) / (m * n) for S, (a, m) in spread.items() for T, (b, n) in spread.items()}
    student = SelectedLogits(
        logits_NJ=logits_NJ,
        log_rest={T: largest_N / T + sum_N.log() for T, (_, sum_N) in spread.items()},
        repeats_NJ=group.repeats_NJ,
        extras=group.extras,
        largest_rest_N=largest_N,
        overlap=overlap,
    )
    return student, spread
