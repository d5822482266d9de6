"""The loss of a block of positions from their logits, and its gradient written over the logits.

It is exact, because a term reads the logits only at selected tokens and through the log-sum-exp of the rest (all other
tokens)

    log_rest(T) = log sum over the rest of exp(z / T),    d log_rest / d z_j = 1/T softmax over the rest of z / T, at j

so autograd computes the gradient on a few numbers for each position; the gradient on the rest is one factor times
exp(z / T).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.objective import diagnostics
from pipeline.objective.class_prior import class_names, class_sums
from pipeline.objective.divergences import LOG_ZERO
from pipeline.objective.position_groups import PositionGroup
from pipeline.objective.terms import TERMS, SelectedLogits, StepInputs, TermOptions, classes_of, temperatures_of


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LossInputs:
    """What the loss of one micro-batch depends on besides hidden states and weights."""

    groups: list[PositionGroup]
    terms: dict[str, TermOptions]
    step: StepInputs
    sum_names: tuple[str, ...]
    """The names of the sums beside the loss, in order."""
    vocabulary_size: int
    scale: float = 1.0
    """The model multiplies its logits by it."""
    softcap: float | None = None
    """The model caps its logits: softcap * tanh(logit / softcap)."""

    @property
    def class_ids(self) -> tuple[int, ...]:
        """The class tokens of `confidence`."""
        return classes_of(self.terms)

    def temperatures(self, group: PositionGroup) -> tuple[float, ...]:
        """The temperatures at which a group needs log_rest, ascending: those of its terms, and 1 for diagnostics."""
        temperatures = temperatures_of(self.terms, group.term_names)
        return tuple(sorted({*temperatures, 1.0})) if self.step.diagnose else temperatures


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RestExp:
    """exp((z - max) / T) of the rest at one temperature T; max is the rest's largest z; selected tokens have 0."""

    temperature: float
    exp_NV: Tensor
    sum_N: Tensor
    """The sum of `exp_NV` over the vocabulary."""


def group_loss(student: SelectedLogits, group: PositionGroup, inputs: LossInputs) -> tuple[Tensor, Tensor]:
    """The loss of a group's positions, and their sums (float64, in the order of `LossInputs.sum_names`)."""
    values = {name: TERMS[name].value(student, group.top, inputs.terms[name]) for name in group.term_names}
    weighted = {name: v_N * group.weights_N if TERMS[name].is_weighted else v_N for name, v_N in values.items()}
    sums = {name: value_N.sum() for name, value_N in weighted.items()}
    loss = torch.stack([inputs.step.coefficients[name] * total for name, total in sums.items()]).sum()
    if inputs.step.diagnose:
        sums |= diagnostics.sums(student, group, values)
    if inputs.class_ids and "student_top" in group.extra_tokens:
        assert group.top is not None
        predicted_N = group.ids_NJ[:, group.extra_tokens.index("student_top")]
        student_L, teacher_L = class_sums(predicted_N, group.top, inputs.class_ids, group.is_root_N)
        sums |= dict(zip(class_names(inputs.class_ids), torch.cat([student_L, teacher_L]), strict=True))
    zero = loss.new_zeros(())
    return loss, torch.stack([sums.get(name, zero).detach().double() for name in inputs.sum_names])


def loss_of_block(logits_NV: Tensor, group: PositionGroup, inputs: LossInputs) -> tuple[Tensor, Tensor]:
    """Loss and sums of some positions; their logits are overwritten with the gradient of loss * loss_scale."""
    z_NV = logits_NV.float()  # the same memory if the logits are float32
    if inputs.scale != 1.0:
        z_NV.mul_(inputs.scale)
    slope_NV = None
    if inputs.softcap is not None:
        z_NV.div_(inputs.softcap).tanh_()
        slope_NV = 1.0 - z_NV.square()
        z_NV.mul_(inputs.softcap)
    group = group.with_student_top(z_NV, inputs.class_ids, inputs.step.thresholds)
    student, others, in_place = _select_logits_in_place(z_NV, group, inputs)
    leaves = [student.logits_NJ, *student.log_rest.values()]
    with torch.enable_grad():
        for leaf in leaves:
            leaf.requires_grad_()
        loss, sums = group_loss(student, group, inputs)
        selected_grad_NJ, *rest_grads = torch.autograd.grad(loss * inputs.step.loss_scale, leaves, allow_unused=True)
    grad_of_log_rest = dict(zip(student.log_rest, rest_grads, strict=True))
    # z_NV holds in_place.exp_NV; from here on it becomes the gradient
    z_NV.mul_(_factor(grad_of_log_rest[in_place.temperature], in_place))
    for rest in reversed(others):
        z_NV.addcmul_(rest.exp_NV, _factor(grad_of_log_rest[rest.temperature], rest))
    z_NV.scatter_add_(1, group.ids_NJ, selected_grad_NJ)
    if slope_NV is not None:
        z_NV.mul_(slope_NV)
    if inputs.scale != 1.0:
        z_NV.mul_(inputs.scale)
    if z_NV is not logits_NV:
        logits_NV.copy_(z_NV)
    return loss.detach(), sums


def _factor(grad_log_rest_N: Tensor | None, rest: RestExp) -> Tensor:
    """[N, 1]: the factor from `exp_NV` to the gradient on the logits; 0 if the loss does not read this log_rest."""
    if grad_log_rest_N is None:
        return torch.zeros_like(rest.sum_N)[:, None]
    return (grad_log_rest_N / (rest.temperature * rest.sum_N))[:, None]


def _select_logits_in_place(
    z_NV: Tensor, group: PositionGroup, inputs: LossInputs
) -> tuple[SelectedLogits, list[RestExp], RestExp]:
    """What the terms read; the exponentials of the rest at every temperature but the largest; those at the largest.

    The exponentials at the largest temperature take over the memory of `z_NV`, which is lost.
    """
    logits_NJ = z_NV.gather(1, group.ids_NJ)
    z_NV.scatter_(1, group.ids_NJ, LOG_ZERO)
    largest_N = z_NV.amax(dim=1)
    z_NV.sub_(largest_N[:, None])
    *other_temperatures, largest_temperature = inputs.temperatures(group)
    others = [_rest_exp(z_NV, T, out_NV=torch.empty_like(z_NV)) for T in other_temperatures]
    in_place = _rest_exp(z_NV, largest_temperature, out_NV=z_NV)  # last, because it overwrites z_NV
    rests = [*others, in_place]
    overlap = {}
    if inputs.step.diagnose:
        for a in rests:
            for b in rests:
                overlap[a.temperature, b.temperature] = (a.exp_NV * b.exp_NV).sum(dim=1) / (a.sum_N * b.sum_N)
    student = SelectedLogits(
        logits_NJ=logits_NJ,
        log_rest={rest.temperature: largest_N / rest.temperature + rest.sum_N.log() for rest in rests},
        is_skipped_NJ=group.is_skipped_NJ,
        extra_tokens=group.extra_tokens,
        largest_rest_N=largest_N,
        overlap=overlap,
    )
    return student, others, in_place


def _rest_exp(z_NV: Tensor, temperature: float, *, out_NV: Tensor) -> RestExp:
    """exp(z / T) and its sum, written into `out_NV`, which may be `z_NV` itself."""
    torch.mul(z_NV, math.log2(math.e) / temperature, out=out_NV)
    torch.exp2(out_NV, out=out_NV)  # 2^(z log2(e) / T): 4 times as fast as `exp` on some CPUs
    return RestExp(temperature=temperature, exp_NV=out_NV, sum_N=out_NV.sum(dim=1))
