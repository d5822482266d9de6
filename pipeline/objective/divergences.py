"""Divergences of a student's distribution q from a teacher's distribution p: pure functions over categories.

The categories are the teacher's kept entries and, as the last one, the tail. Arguments are log-probabilities [N, C] in
nats. A category that does not exist (padding, or a tail without tokens) is LOG_ZERO in both. The result is one value
for each position, [N].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

LOG_ZERO = -1e30  # the log of probability 0: finite, so that 0 * log 0 is 0 and gradients stay finite
MIN_LOG_P = -100.0  # where the mean is taken under the student, a teacher's probability of 0 would cost infinity


def forward_kl(log_p_NC: Tensor, log_q_NC: Tensor) -> Tensor:
    """KL(p || q) = sum p (log p - log q).

    Its gradient is linear in p, so it is unbiased where p was sampled from the teacher.
    """
    return (log_p_NC.exp() * (log_p_NC - log_q_NC)).sum(dim=1)


def weighted_forward_kl(log_p_NC: Tensor, log_q_NC: Tensor, *, tail_weight: float) -> Tensor:
    """w KL((P, 1-P) || (Q, 1-Q)) + P KL(p / P || q / Q), P and Q the masses of the kept entries; KL(p || q) at w = 1.

    The chain rule of KL, whose parts may weigh differently (Zhao et al. 2022, arXiv 2203.08679, of target and other
    classes). Gradient at T = 1 on a kept logit: q - p + (w - 1) (Q - P) q / Q; on one of the tail: w q (P - Q) / (1-Q).
    """
    value_N = forward_kl(log_p_NC, log_q_NC)
    return value_N + (tail_weight - 1.0) * forward_kl(_log_masses(log_p_NC), _log_masses(log_q_NC))


def _log_masses(log_p_NC: Tensor) -> Tensor:
    """[N, 2]: of the kept entries together, and of the tail."""
    return torch.stack([torch.logsumexp(log_p_NC[:, :-1], dim=1), log_p_NC[:, -1]], dim=1)


def reverse_kl(log_p_NC: Tensor, log_q_NC: Tensor) -> Tensor:
    """KL(q || p) = sum q (log q - log p), with log p clamped to MIN_LOG_P or more."""
    exists_NC = log_q_NC > LOG_ZERO / 2
    difference_NC = log_q_NC - torch.where(exists_NC, log_p_NC.clamp(min=MIN_LOG_P), log_q_NC)
    return (log_q_NC.exp() * difference_NC).sum(dim=1)


def jsd(log_p_NC: Tensor, log_q_NC: Tensor, *, beta: float) -> Tensor:
    """Generalized Jensen-Shannon: beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q.

    Agarwal et al. 2023 (arXiv 2306.13649), section 2. Divided by beta it tends to KL(p || q) as beta -> 0, divided by
    1 - beta to KL(q || p) as beta -> 1. beta = 0 and beta = 1 select these two limits, as in other libraries.
    """
    if beta == 0.0:
        return forward_kl(log_p_NC, log_q_NC)
    if beta == 1.0:
        return reverse_kl(log_p_NC, log_q_NC)
    log_m_NC = torch.logaddexp(log_p_NC + math.log(beta), log_q_NC + math.log1p(-beta))
    return beta * forward_kl(log_p_NC, log_m_NC) + (1.0 - beta) * forward_kl(log_q_NC, log_m_NC)


def total_variation(log_p_NC: Tensor, log_q_NC: Tensor) -> Tensor:
    """1/2 sum |p - q|, between 0 and 1."""
    return 0.5 * (log_p_NC.exp() - log_q_NC.exp()).abs().sum(dim=1)


def renormalised(log_p_NC: Tensor, log_q_NC: Tensor) -> Tensor:
    """KL over the kept entries alone: p is renormalised to sum to 1 there, q is not. Other libraries do the same."""
    kept_NK = log_p_NC[:, :-1] - torch.logsumexp(log_p_NC[:, :-1], dim=1, keepdim=True)
    return forward_kl(kept_NK, log_q_NC[:, :-1])


def truncated(log_p_NC: Tensor, log_q_NC: Tensor) -> Tensor:
    """The kept entries' part of KL(p || q), without the tail: it may be negative, and is not clamped."""
    return forward_kl(log_p_NC[:, :-1], log_q_NC[:, :-1])


# by the names of the enum `Divergence` in config/schema.py, which a new one joins
DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "total_variation": total_variation,
    "renormalised": renormalised,
    "truncated": truncated,
}
"""Every divergence, by the name of the option loss.kd.divergence."""
NEEDS_BETA = ("jsd",)
NEEDS_EXACT_TAIL = ("reverse_kl", "jsd", "total_variation")
"""Not linear in p: biased where p was sampled from the teacher, and wrong where the tail was not recorded."""


def divergence_by_name(name: str, *, beta: float, tail_weight: float = 1.0) -> Callable[[Tensor, Tensor], Tensor]:
    """A divergence (log p [N, C], log q [N, C]) -> [N], by its name; `beta` is bound where it has one.

    `tail_weight` is for forward_kl alone: see `weighted_forward_kl`.
    """
    if tail_weight != 1.0:
        assert name == "forward_kl", "checked with the options"
        return partial(weighted_forward_kl, tail_weight=tail_weight)
    divergence = DIVERGENCES[name]
    return partial(divergence, beta=beta) if name in NEEDS_BETA else divergence
