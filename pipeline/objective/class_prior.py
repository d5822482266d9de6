"""Thresholds for a student that chooses among a few class tokens: each class is predicted as often as the teacher does.

With argmax alone, a student that prefers one class would be trained to predict that class everywhere. Burns et al. 2023
(arXiv 2312.09390, appendix A.4) choose thresholds at which each class is predicted as often as in the weak labels. Here
the thresholds move towards that point after every step, so they do not depend on how a batch is split.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.core.types import TopK

RATE = 1.0  # nats that a threshold moves in one step if the student always predicts a class and the teacher never does


def harden(logits_NV: Tensor, class_ids: Sequence[int], thresholds: Sequence[float]) -> Tensor:
    """int64 [N]: the class token with the largest value of logit - threshold."""
    ids_L = torch.tensor(class_ids, device=logits_NV.device)
    return ids_L[(logits_NV.detach()[:, ids_L] - torch.tensor(thresholds, device=logits_NV.device)).argmax(dim=1)]


def class_sums(predicted_N: Tensor, top: TopK, class_ids: Sequence[int], is_root_N: Tensor) -> tuple[Tensor, Tensor]:
    """Two float32 [L]: positions where each class was predicted, and the teacher's probability of each class, summed.

    Only the positions right after the prompt count (`is_root_N`): there the first token of a class is chosen. The
    teacher's probabilities are normalised over the L classes; they are 1 / L where it kept no class token.
    """
    ids_L = torch.tensor(class_ids, device=predicted_N.device)
    counts_L = ((predicted_N[:, None] == ids_L) & is_root_N[:, None]).float().sum(dim=0)
    is_class_NKL = top.ids_NK[:, :, None] == ids_L
    mass_NL = (top.relative_logits_NK.float().exp()[:, :, None] * is_class_NKL).sum(dim=1)
    total_N1 = mass_NL.sum(dim=1, keepdim=True)
    p_NL = torch.where(total_N1 > 0, mass_NL / total_N1.clamp(min=1e-30), 1.0 / len(ids_L))
    return counts_L, (p_NL * is_root_N[:, None]).sum(dim=0)


def class_names(class_ids: Sequence[int]) -> tuple[str, ...]:
    """The names of `class_sums` in the sums of a step: the student's L counts, then the teacher's L sums."""
    return (*(f"student_class_{token}" for token in class_ids), *(f"teacher_class_{token}" for token in class_ids))


def updated_thresholds(
    thresholds: Sequence[float], *, own: Sequence[float], teacher: Sequence[float]
) -> tuple[float, ...]:
    """The thresholds of the next step: threshold + RATE * (own - teacher) for each class.

    `own` is the fraction of positions at which the student predicted the class, `teacher` the teacher's mean
    probability of it.
    """
    return tuple(
        threshold + RATE * (student_fraction - teacher_fraction)
        for threshold, student_fraction, teacher_fraction in zip(thresholds, own, teacher, strict=True)
    )
