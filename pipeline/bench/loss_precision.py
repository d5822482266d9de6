"""The precision of the loss: the error of its gradients, compared with the same computation in fp64."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.bench.loss_implementations import IMPLEMENTATIONS, Case, Head, cross_entropy, make_case, ours
from pipeline.bench.timing import Results, summarize, table


def measure_precision(dtype: torch.dtype) -> Results:
    """|g - g_fp64| / |g_fp64| of the gradients g of hidden states and head weight, for three implementations."""
    case = make_case(256, dtype=dtype)
    case_in_double = to_double(case)
    rows = [["relative error of the gradient of", "hidden states", "weight"]]
    results: Results = {}
    for name in ("ours", "linear_cross_entropy", "cross entropy"):
        exact_loss = functools.partial(ours, fused=False) if name == "ours" else cross_entropy
        pairs = zip(gradients(IMPLEMENTATIONS[name], case), gradients(exact_loss, case_in_double), strict=True)
        errors = [float((gradient.double() - exact).norm() / exact.norm()) for gradient, exact in pairs]
        rows.append([name, *(f"{error:.1e}" for error in errors)])
        results[f"loss.weight_gradient_error.{name.replace(' ', '_')}"] = summarize([errors[1]])
    print(table(f"precision against fp64, {dtype}, 256 positions", rows))
    return results


def to_double(case: Case) -> Case:
    """The same values in float64."""
    head = Head(len(case.head.lm_head.weight), torch.float64, case.hidden_NH.device)
    head.lm_head.weight.data.copy_(case.head.lm_head.weight.data)
    return dataclasses.replace(case, head=head, hidden_NH=case.hidden_NH.double())


def gradients(loss: Callable[[Case, Tensor], Tensor], case: Case) -> tuple[Tensor, Tensor]:
    """The gradients of the loss on the hidden states [N, H] and on the weight of the head [V, H]."""
    hidden_NH = case.hidden_NH.detach().clone().requires_grad_()
    case.head.zero_grad()
    loss(case, hidden_NH).backward()
    assert hidden_NH.grad is not None
    assert case.head.lm_head.weight.grad is not None
    return hidden_NH.grad, case.head.lm_head.weight.grad.clone()
