"""What training says about its terms, from numbers that the loss has at hand: sums over positions, divided at the end.

Gradients are those on the logits. A term's is `u_named` on the named tokens and `u_rest` times the softmax of all
others, so inner products need no vocabulary: sum over named of u v + u_rest v_rest (softmax . softmax) / T^2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from pipeline.core.types import TopK
from pipeline.objective.divergences import forward_kl
from pipeline.objective.gates import top_token
from pipeline.objective.terms import SelectedLogits, log_p_categories

ON_KD = ("kd_at_T1", "agreement", "teacher_tail", "student_tail")
GRADIENTS = ("lm_square", "kd_square")
WITH_TRUTH = ("count", "kd", "lm", "dot", "lm_square", "kd_square")
NAMES = (*ON_KD, *GRADIENTS, *(f"{name}_{side}" for side in ("right", "wrong") for name in WITH_TRUTH))
"""Sums over the positions that kd reads; over each term's; over those of both, by whether the teacher is right."""


def sums(student: SelectedLogits, ids_NJ: Tensor, top: TopK | None, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The sums over some positions that the same terms read; `values` are the terms', [N] each."""
    found: dict[str, Tensor] = {}
    pulls = {name: _pull(student, ids_NJ, values[name]) for name in ("lm", "kd") if name in values}
    squares = {f"{name}_square": _dot(student, pull, pull) for name, pull in pulls.items()}
    found |= {name: square_N.sum() for name, square_N in squares.items()}
    if top is None or "kd" not in values:
        return found
    with torch.no_grad():
        log_p_NC, log_q_NC = log_p_categories(top, temperature=1.0), student.log_q_categories(1.0)
        teacher_N = top_token(top)
        largest_N = torch.maximum(student.logits_NJ.amax(dim=1), student.largest_rest_N)
        is_teachers_NJ = ids_NJ == teacher_N[:, None]
        theirs_N = student.logits_NJ.masked_fill(~is_teachers_NJ, -torch.inf).amax(dim=1)
        found |= {
            "kd_at_T1": forward_kl(log_p_NC, log_q_NC).sum(),
            "agreement": (theirs_N >= largest_N).float().sum(),
            "teacher_tail": log_p_NC[:, -1].exp().sum(),
            "student_tail": log_q_NC[:, -1].exp().sum(),
        }
        if "lm" in values:
            is_right_N = ids_NJ[:, student.extras.index("target")] == teacher_N
            dots = {
                "count": torch.ones_like(largest_N),
                "kd": values["kd"],
                "lm": values["lm"],
                "dot": _dot(student, pulls["lm"], pulls["kd"]),
                **squares,
            }
            for side, mask_N in (("right", is_right_N), ("wrong", ~is_right_N)):
                found |= {f"{name}_{side}": (value_N * mask_N).sum() for name, value_N in dots.items()}
    return found


def _pull(student: SelectedLogits, ids_NJ: Tensor, value_N: Tensor) -> tuple[Tensor, dict[float, Tensor]]:
    """A term's gradient on the logits of the named tokens, each token in one column, and on log_rest."""
    leaves = [student.logits_NJ, *student.log_rest.values()]
    named_NJ, *rests = torch.autograd.grad(value_N.sum(), leaves, retain_graph=True, materialize_grads=True)
    for column in range(len(student.extras)):
        is_same_NJ = (ids_NJ == ids_NJ[:, column : column + 1]) & ~student.repeats_NJ
        moved_N = torch.where(student.repeats_NJ[:, column], named_NJ[:, column], 0.0)
        named_NJ = named_NJ + is_same_NJ * moved_N[:, None]
        named_NJ[:, column] -= moved_N
    return named_NJ, dict(zip(student.log_rest, rests, strict=True))


def _dot(
    student: SelectedLogits, one: tuple[Tensor, dict[float, Tensor]], other: tuple[Tensor, dict[float, Tensor]]
) -> Tensor:
    total_N = (one[0] * other[0]).sum(dim=1)
    for (S, T), overlap_N in student.overlap.items():
        total_N = total_N + one[1][S] / S * other[1][T] / T * overlap_N
    return total_N


def figures(total: Mapping[str, float], counts: Mapping[str, float], weights: Mapping[str, float]) -> dict[str, float]:
    """What is logged, of sums over the global batch; what no position speaks of is left out."""
    shown: dict[str, float] = {}
    kd_count, lm_count = counts.get("kd", 0), counts.get("lm", 0)
    if kd_count:
        shown |= {name: total[name] / kd_count for name in ON_KD}
    if kd_count and lm_count:
        size = {name: weights[name] / counts[name] * math.sqrt(total[f"{name}_square"]) for name in ("lm", "kd")}
        if size["lm"] > 0:
            shown["grad_norm_ratio"] = size["kd"] / size["lm"]
    for side in ("right", "wrong"):
        count, norms = total[f"count_{side}"], total[f"lm_square_{side}"] * total[f"kd_square_{side}"]
        if count:
            shown |= {f"{name}_teacher_{side}": total[f"{name}_{side}"] / count for name in ("lm", "kd")}
            shown[f"teacher_{side}_fraction"] = count / (total["count_right"] + total["count_wrong"])
        if norms > 0:
            shown[f"grad_cosine_teacher_{side}"] = total[f"dot_{side}"] / math.sqrt(norms)
    both = [total[f"{name}_right"] + total[f"{name}_wrong"] for name in ("dot", "lm_square", "kd_square")]
    if both[1] * both[2] > 0:
        shown["grad_cosine"] = both[0] / math.sqrt(both[1] * both[2])
    return shown
