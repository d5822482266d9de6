"""How far a student's distribution is from a teacher's: pure functions over categories.

Categories are the kept entries and, last, the tail as one. Arguments are log-probabilities [N, C] in nats; one
that does not exist (padding, or a tail of no token) is NOTHING in both. Each returns one value a position, [N].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

LOG_ZERO = -1e30  # the log of no mass: finite, so that 0 * log 0 is 0 and gradients stay numbers
MIN_LOG_P = -100.0  # where the student is the one who averages, a teacher's zero would cost infinity


def forward_kl(log_p_NC: Tensor, log_q_NC: Tensor) -> Tensor:
    """KL(p || q) = sum p (log p - log q): the only one that is linear in p, so right in the mean for drawn targets."""
    return (log_p_NC.exp() * (log_p_NC - log_q_NC)).sum(dim=1)


def reverse_kl(log_p_NC: Tensor, log_q_NC: Tensor) -> Tensor:
    """KL(q || p) = sum q (log q - log p), with log p at least LEAST_LOG_P."""
    exists_NC = log_q_NC > LOG_ZERO / 2
    difference_NC = log_q_NC - torch.where(exists_NC, log_p_NC.clamp(min=MIN_LOG_P), log_q_NC)
    return (log_q_NC.exp() * difference_NC).sum(dim=1)


def jsd(log_p_NC: Tensor, log_q_NC: Tensor, *, beta: float) -> Tensor:
    """Generalized Jensen-Shannon: beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q.

    Agarwal et al. 2023 (arXiv 2306.13649), section 2. Divided by beta it tends to KL(p || q) as beta -> 0, divided by
    1 - beta to KL(q || p) as beta -> 1; beta = 0 and 1 mean those two, as they do elsewhere.
    """
    if beta == 0.0:
        return forward_kl(log_p_NC, log_q_NC)
    if beta == 1.0:
        return reverse_kl(log_p_NC, log_q_NC)
    log_m_NC = torch.logaddexp(log_p_NC + math.log(beta), log_q_NC + math.log1p(-beta))
    return beta * forward_kl(log_p_NC, log_m_NC) + (1.0 - beta) * forward_kl(log_q_NC, log_m_NC)


def total_variation(log_p_NC: Tensor, log_q_NC: Tensor) -> Tensor:
    """Half the sum of |p - q|: at most 1."""
    return 0.5 * (log_p_NC.exp() - log_q_NC.exp()).abs().sum(dim=1)


def renormalised(log_p_NC: Tensor, log_q_NC: Tensor) -> Tensor:
    """KL over the kept entries alone, the teacher's made to sum to 1 there, the student's not; as others have it."""
    kept_NK = log_p_NC[:, :-1] - torch.logsumexp(log_p_NC[:, :-1], dim=1, keepdim=True)
    return forward_kl(kept_NK, log_q_NC[:, :-1])


def truncated(log_p_NC: Tensor, log_q_NC: Tensor) -> Tensor:
    """The kept entries' part of KL(p || q), without the tail: may be negative, and is not clamped."""
    return forward_kl(log_p_NC[:, :-1], log_q_NC[:, :-1])


Divergence = Callable[[Tensor, Tensor], Tensor]


def divergence_by_name(name: str, *, beta: float) -> Divergence:
    """A divergence by the name that it has among the options."""
    return partial(jsd, beta=beta) if name == "jsd" else DIVERGENCES[name]


DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "total_variation": total_variation,
    "renormalised": renormalised,
    "truncated": truncated,
}
NEEDS_TAIL = ("reverse_kl", "jsd", "total_variation")
"""Not linear in p, so wrong in the mean for drawn targets, and wrong where the tail was lost."""
