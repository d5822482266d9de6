"""The combined objective: pure terms over supervised positions, each a sum and a count.

    L(step) = sum over terms of  weight_term(step) * S_term / N_term

S is the term's sum over a micro-batch and N its number of positions over the whole global batch: all ranks
and all accumulation steps. (Xiao & Zhu, Foundations of Large Language Models, eq. 4.12 and 4.13.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.topk import log_probabilities, select
from pipeline.types import UNKNOWN_TARGET, Batch, LossTerm, TopK


@dataclass(frozen=True, slots=True, kw_only=True)
class TermOptions:
    """What a term needs to know besides the batch."""

    on: tuple[str, ...]
    """Whose positions it reads: "gold", "corpus" or both."""
    temperature: float = 1.0
    temperature_squared: bool = True
    """Multiply the value, and so the gradient, by T^2 (Hinton et al. 2015, arXiv 1503.02531, section 2)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """One component of the loss."""

    speaks_on: Callable[[Batch], Tensor]
    """bool [N]: the positions where the term has what it needs."""
    value: Callable[[Tensor, Batch, Tensor, TermOptions], Tensor]
    """(logits [N, V], batch, read [N] bool, options) -> the sum over the read positions, nats."""


def lm(logits_NV: Tensor, batch: Batch, read_N: Tensor, options: TermOptions) -> Tensor:
    """Cross entropy with known targets: sum of -log q_y. Gradient on the logits: q - onehot(y)."""
    return functional.cross_entropy(logits_NV[read_N].float(), batch.target_ids_N[read_N], reduction="sum")


def kd(logits_NV: Tensor, batch: Batch, read_N: Tensor, options: TermOptions) -> Tensor:
    """Forward KL from the teacher on the kept entries and, as one more category, the tail.

    sum_K p log(p/q) + (1-P) log((1-P)/(1-Q)) at temperature T, times T^2 if asked; P and Q are the mass of
    the kept entries under teacher and student.
    """
    if batch.teacher is None:
        return logits_NV.sum() * 0.0
    top = select(batch.teacher, read_N[batch.weak_N])
    value = forward_kl(logits_NV[read_N], top, temperature=options.temperature)
    return value * options.temperature**2 if options.temperature_squared else value


TERMS: dict[str, Term] = {
    "lm": Term(speaks_on=lambda batch: batch.target_ids_N != UNKNOWN_TARGET, value=lm),
    "kd": Term(speaks_on=lambda batch: batch.weak_N, value=kd),
}


def forward_kl(logits_MV: Tensor, top: TopK, *, temperature: float) -> Tensor:
    """KL(teacher || student) over K + 1 categories, summed over M positions, fp32 nats.

    The student's tail is a logsumexp with the kept ids masked out, never log(1 - sum); categories in which
    the teacher has no mass contribute 0, so 0 * -inf never happens.
    """
    scaled_MV = logits_MV.float() / temperature
    log_z_M = torch.logsumexp(scaled_MV, dim=1)
    log_q_MK = scaled_MV.gather(1, top.ids_NK) - log_z_M[:, None]
    log_q_tail_M = torch.logsumexp(scaled_MV.scatter(1, top.ids_NK, -torch.inf), dim=1) - log_z_M
    log_p_MK, log_p_tail_M = log_probabilities(top, temperature=temperature)
    return _cross(log_p_MK, log_q_MK) + _cross(log_p_tail_M, log_q_tail_M)


def _cross(log_p: Tensor, log_q: Tensor) -> Tensor:
    has_mass = log_p > -torch.inf
    difference = torch.where(has_mass, log_p, 0.0) - torch.where(has_mass, log_q, 0.0)
    return (log_p.exp() * difference).sum()


def read_positions(batch: Batch, name: str, options: TermOptions) -> Tensor:
    """bool [N]: the positions that a term reads in a batch."""
    from_gold_N = batch.gold_N if "gold" in options.on else torch.zeros_like(batch.gold_N)
    from_corpus_N = ~batch.gold_N if "corpus" in options.on else torch.zeros_like(batch.gold_N)
    return TERMS[name].speaks_on(batch) & (from_gold_N | from_corpus_N)


def count_positions(batch: Batch, terms: dict[str, TermOptions]) -> Tensor:
    """int64, one entry a term: how many positions each reads. Known before any forward."""
    return torch.stack([read_positions(batch, name, options).sum() for name, options in terms.items()])


def evaluate_terms(logits_NV: Tensor, batch: Batch, terms: dict[str, TermOptions]) -> dict[str, LossTerm]:
    """Every term of the objective on one micro-batch."""
    values = {}
    for name, options in terms.items():
        read_N = read_positions(batch, name, options)
        values[name] = LossTerm(total=TERMS[name].value(logits_NV, batch, read_N, options), count=read_N.sum())
    return values


def combine(values: dict[str, LossTerm], *, weights: dict[str, float], divisors: dict[str, float]) -> Tensor:
    """The micro-batch's share of L: sum of weight * S / N, with N (`divisors`) counted over the global batch."""
    parts = [weights[name] * term.total / max(divisors[name], 1.0) for name, term in values.items()]
    return torch.stack(parts).sum()
