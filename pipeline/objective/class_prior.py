"""The choice setting: a student hardened to one of a few tokens, each as often as the teacher is for it.

Hardened by argmax alone, a student that leans to one class would be pushed all the way there. Burns et al. 2023 (arXiv
2312.09390, appendix A.4) harden by thresholds at which each class is predicted as often as in the weak labels. Here a
threshold moves after every step towards that, and so does not depend on how a batch is split.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.core.types import TopK

RATE = 1.0  # nats that a threshold moves a step where a class is predicted always and the teacher never is for it


def harden(logits_NV: Tensor, class_ids: Sequence[int], thresholds: Sequence[float]) -> Tensor:
    """int64 [N]: the class token whose logit is largest over its threshold."""
    ids_L = torch.tensor(class_ids, device=logits_NV.device)
    return ids_L[(logits_NV.detach()[:, ids_L] - torch.tensor(thresholds, device=logits_NV.device)).argmax(dim=1)]


def class_sums(own_N: Tensor, top: TopK, class_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """[L] positions hardened to each class, and [L] the teacher's probability of each among the classes, summed.

    Where the teacher kept none of them, it is for all alike.
    """
    ids_L = torch.tensor(class_ids, device=own_N.device)
    counts_L = (own_N[:, None] == ids_L).float().sum(dim=0)
    is_class_NKL = top.ids_NK[:, :, None] == ids_L
    mass_NL = (top.relative_logits_NK.float().exp()[:, :, None] * is_class_NKL).sum(dim=1)
    total_N1 = mass_NL.sum(dim=1, keepdim=True)
    return counts_L, torch.where(total_N1 > 0, mass_NL / total_N1.clamp(min=1e-30), 1.0 / len(ids_L)).sum(dim=0)


def class_names(class_ids: Sequence[int]) -> tuple[str, ...]:
    """What `class_sums` are called among the sums of a step."""
    return (*(f"own_{token}" for token in class_ids), *(f"teachers_{token}" for token in class_ids))


def updated_thresholds(
    thresholds: Sequence[float], *, own: Sequence[float], teacher: Sequence[float]
) -> tuple[float, ...]:
    """The thresholds of the next step, from the fractions of positions hardened to each class: found and wanted."""
    return tuple(t + RATE * (mine - theirs) for t, mine, theirs in zip(thresholds, own, teacher, strict=True))
