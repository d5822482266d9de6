"""Diagnostics of the terms, from numbers that the loss has computed already: sums over positions, divided at the end.

Gradients are those on the logits. A term's gradient is `u_selected` at the selected tokens and `u_rest` times the
softmax over the rest, so the inner product of two gradients u and v needs no vocabulary:

    u . v = sum over selected tokens of u v  +  u_rest v_rest (softmax . softmax) / T^2

Here u_rest and v_rest are the gradients on log_rest, and softmax . softmax is `SelectedLogits.overlap`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.objective.divergences import forward_kl
from pipeline.objective.gates import top_token
from pipeline.objective.position_groups import PositionGroup
from pipeline.objective.terms import SelectedLogits, log_p_categories

KD_NAMES = ("kd_at_T1", "agreement", "teacher_tail", "student_tail")
"""Sums over the positions that kd reads."""
SQUARE_NAMES = ("lm_square", "kd_square")
"""Sums of squared gradient norms over the positions that each term reads."""
BOTH_NAMES = ("count", "kd", "lm", "dot", "lm_square", "kd_square")
"""Sums over the positions that lm and kd both read, apart by whether the teacher's most likely token is the target."""
NAMES = (*KD_NAMES, *SQUARE_NAMES, *(f"{name}_{side}" for side in ("right", "wrong") for name in BOTH_NAMES))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LogitGradient:
    """A term's gradient on the logits."""

    selected_NJ: Tensor
    """On the selected tokens; a token that stands in two columns has its full gradient in one and 0 in the other."""
    log_rest: dict[float, Tensor]
    """[N] on log_rest at each temperature."""


def sums(student: SelectedLogits, group: PositionGroup, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The sums, some of `NAMES`, over a group's positions; `values` are the terms' values, [N] each, without weights.

    What is divided by the count of kd is weighted as kd is, and so is every gradient of kd. The sums over the positions
    that lm and kd both read (`BOTH_NAMES`) are otherwise plain.
    """
    ids_NJ, top, weights_N = group.ids_NJ, group.top, group.weights_N
    weighted = {"lm": values["lm"]} if "lm" in values else {}
    weighted |= {"kd": values["kd"] * weights_N} if "kd" in values else {}
    gradients = {name: _logit_gradient(student, ids_NJ, value_N) for name, value_N in weighted.items()}
    squares = {f"{name}_square": _inner_product(student, u, u) for name, u in gradients.items()}
    result = {name: square_N.sum() for name, square_N in squares.items()}
    if top is None or "kd" not in values:
        return result
    with torch.no_grad():
        log_p_NC, log_q_NC = log_p_categories(top, temperature=1.0), student.log_q_categories(1.0)
        teacher_top_N = top_token(top)
        largest_N = torch.maximum(student.logits_NJ.amax(dim=1), student.largest_rest_N)
        is_teacher_top_NJ = ids_NJ == teacher_top_N[:, None]
        at_teacher_top_N = student.logits_NJ.masked_fill(~is_teacher_top_NJ, -torch.inf).amax(dim=1)
        result |= {
            "kd_at_T1": (forward_kl(log_p_NC, log_q_NC) * weights_N).sum(),
            "agreement": ((at_teacher_top_N >= largest_N) * weights_N).sum(),
            "teacher_tail": (log_p_NC[:, -1].exp() * weights_N).sum(),
            "student_tail": (log_q_NC[:, -1].exp() * weights_N).sum(),
        }
        if "lm" in values:
            is_right_N = ids_NJ[:, student.extra_tokens.index("target")] == teacher_top_N
            both = {
                "count": torch.ones_like(largest_N),
                "kd": values["kd"],
                "lm": values["lm"],
                "dot": _inner_product(student, gradients["lm"], gradients["kd"]),
                **squares,
            }
            for side, mask_N in (("right", is_right_N), ("wrong", ~is_right_N)):
                result |= {f"{name}_{side}": (value_N * mask_N).sum() for name, value_N in both.items()}
    return result


def _logit_gradient(student: SelectedLogits, ids_NJ: Tensor, value_N: Tensor) -> LogitGradient:
    leaves = [student.logits_NJ, *student.log_rest.values()]
    selected_NJ, *log_rest = torch.autograd.grad(value_N.sum(), leaves, retain_graph=True, materialize_grads=True)
    # `lm` puts its gradient on the column "target" even if the target is among the kept entries, where `kd` puts its
    # own: move it from a skipped column to the column that counts for the same token. For ids 7 | 9 7 with column 0
    # skipped, the gradient 0.5 | 0.1 0.2 becomes 0 | 0.1 0.7.
    for column in range(len(student.extra_tokens)):
        is_same_NJ = (ids_NJ == ids_NJ[:, column : column + 1]) & ~student.is_skipped_NJ
        moved_N = torch.where(student.is_skipped_NJ[:, column], selected_NJ[:, column], 0.0)
        selected_NJ = selected_NJ + is_same_NJ * moved_N[:, None]
        selected_NJ[:, column] -= moved_N
    return LogitGradient(selected_NJ=selected_NJ, log_rest=dict(zip(student.log_rest, log_rest, strict=True)))


def _inner_product(student: SelectedLogits, u: LogitGradient, v: LogitGradient) -> Tensor:
    total_N = (u.selected_NJ * v.selected_NJ).sum(dim=1)
    for (S, T), overlap_N in student.overlap.items():
        total_N = total_N + u.log_rest[S] / S * v.log_rest[T] / T * overlap_N
    return total_N


def figures(total: Mapping[str, float], counts: Mapping[str, float], weights: Mapping[str, float]) -> dict[str, float]:
    """The diagnostics that are logged, from the sums over the global batch; those without any position are left out.

    Gradient norms and cosines are over all logits of the positions together:
    cosine = sum lm . kd / sqrt(sum |lm|^2 sum |kd|^2).
    """
    logged: dict[str, float] = {}
    kd_count, lm_count = counts.get("kd", 0), counts.get("lm", 0)
    if kd_count:
        logged |= {name: total[name] / kd_count for name in KD_NAMES}
    if kd_count and lm_count:
        norms = {name: weights[name] / counts[name] * math.sqrt(total[f"{name}_square"]) for name in ("lm", "kd")}
        if norms["lm"] > 0:
            logged["grad_norm_ratio"] = norms["kd"] / norms["lm"]
    for side in ("right", "wrong"):
        count, squares = total[f"count_{side}"], total[f"lm_square_{side}"] * total[f"kd_square_{side}"]
        if count:
            logged |= {f"{name}_teacher_{side}": total[f"{name}_{side}"] / count for name in ("lm", "kd")}
            logged[f"teacher_{side}_fraction"] = count / (total["count_right"] + total["count_wrong"])
        if squares > 0:
            logged[f"grad_cosine_teacher_{side}"] = total[f"dot_{side}"] / math.sqrt(squares)
    dot, lm_square, kd_square = (
        total[f"{name}_right"] + total[f"{name}_wrong"] for name in ("dot", "lm_square", "kd_square")
    )
    if lm_square * kd_square > 0:
        logged["grad_cosine"] = dot / math.sqrt(lm_square * kd_square)
    return logged
