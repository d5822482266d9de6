"""The combined objective: terms as pure functions of supervised positions, counted before any is evaluated.

    L(step) = sum over terms of  weight_term(step) * S_term / N_term

S is the term's sum and N its number of positions over the whole global batch: all ranks and all accumulation steps.
(Xiao & Zhu, Foundations of Large Language Models, eq. 4.12 and 4.13.)

A term never sees a vocabulary. It reads the student's logits at a few named tokens (the target, the kept entries, ...)
and the log-sum-exp of all the others: `head.py` makes these, and carries the gradient back to all logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.core.topk import log_probabilities
from pipeline.core.types import UNKNOWN_TARGET, Batch, TopK
from pipeline.objective.divergences import LOG_ZERO, divergence_by_name
from pipeline.objective.gates import Gate, gate_mask, top_token


@dataclass(frozen=True, slots=True, kw_only=True)
class TermOptions:
    """What a term needs to know besides the batch."""

    on: tuple[str, ...]
    """Whose positions it reads: "gold", "corpus" or both."""
    temperature: float = 1.0
    temperature_squared: bool = True
    """Multiply the value, and so the gradient, by T^2 (Hinton et al. 2015, arXiv 1503.02531, section 2)."""
    divergence: str = "forward_kl"
    beta: float = 0.5
    gate: Gate = field(default_factory=Gate)
    class_ids: tuple[int, ...] = ()
    """The tokens among which the student's own prediction is hardened; none: the whole vocabulary."""
    take: str = "generated"
    """Hard weak labels: what the teacher "said" when it completed the record, or its "likeliest" token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInputs:
    """What the loss of a micro-batch depends on besides the batch: alike for all micro-batches of a step."""

    coefficients: dict[str, float]
    """weight / count of each term over the global batch: what its sum is multiplied by."""
    diagnose: bool = False
    """Also compute the sums of `diagnostics`."""
    thresholds: tuple[float, ...] = ()
    """Of the classes of `confidence`, in nats; empty without classes."""
    loss_scale: float = 1.0
    """What the engine multiplies the loss by before the backward, so that float16 gradients do not vanish."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SelectedLogits:
    """A student at N positions: its logits at J named tokens and, exactly, the mass of all the others.

    With it    log z(T) = log( sum over named of exp(logit / T) + exp(log_rest(T)) ).
    """

    logits_NJ: Tensor
    """float32, at `Names.ids_NJ`."""
    log_rest: dict[float, Tensor]
    """[N] for every temperature T in use: log of the sum of exp(logit / T) over the tokens that are not named."""
    repeats_NJ: Tensor
    """bool: padding, or a token that stands in another column already; not counted twice."""
    extras: tuple[str, ...]
    """Names of the first columns; the rest are the teacher's kept entries."""
    largest_rest_N: Tensor
    """The largest logit that is not named."""
    overlap: dict[tuple[float, float], Tensor]
    """[N] for pairs of temperatures: inner product of the softmaxes over the unnamed; only for diagnostics."""

    def log_q_of(self, name: str) -> Tensor:
        """[N] log-probability, at T = 1, of the token that goes by a name."""
        return self.logits_NJ[:, self.extras.index(name)] - self._log_z(1.0)

    def log_q_categories(self, temperature: float) -> Tensor:
        """[N, K + 1] log-probabilities of the teacher's kept entries and of the tail as one."""
        counted_NJ = self._counted(temperature)
        first_kept = len(self.extras)
        others_N1 = self.log_rest[temperature][:, None].double()
        tail_N = torch.logsumexp(torch.cat([counted_NJ[:, :first_kept], others_N1], dim=1), dim=1)
        return torch.cat([counted_NJ[:, first_kept:], tail_N[:, None]], dim=1) - self._log_z(temperature)[:, None]

    # a few numbers a position: float64 costs nothing here, and where student and teacher are 60 nats apart it is needed
    def _counted(self, temperature: float) -> Tensor:
        return (self.logits_NJ.double() / temperature).masked_fill(self.repeats_NJ, LOG_ZERO)

    def _log_z(self, temperature: float) -> Tensor:
        return torch.logsumexp(torch.cat([self._counted(temperature), self.log_rest[temperature][:, None]], 1), dim=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """One component of the loss."""

    speaks_on: Callable[[Batch, TermOptions], Tensor]
    """bool [N]: the positions where it has what it needs and wants to be heard."""
    value: Callable[[SelectedLogits, TopK | None, TermOptions], Tensor]
    """(student, teacher at the same positions, options) -> nats a position, float64 [N]."""
    reads: tuple[str, ...]
    """The tokens it names: "target", "weak" (the teacher's hard label), "own" (the student's likeliest), "kept"."""


def lm(student: SelectedLogits, top: TopK | None, options: TermOptions) -> Tensor:
    """Cross entropy with known targets: -log q_y. Gradient on the logits: q - onehot(y)."""
    return -student.log_q_of("target")


def kd(student: SelectedLogits, top: TopK | None, options: TermOptions) -> Tensor:
    """A divergence from the teacher on the kept entries and, as one more category, the tail; times T^2 if asked.

    By default sum_K p log(p/q) + (1-P) log((1-P)/(1-Q)) at temperature T; P and Q are the mass of the kept entries
    under teacher and student. Gradient at T = 1 on a kept logit: q - p; on one of the tail: q (P - Q) / (1 - Q).
    """
    assert top is not None
    T = options.temperature
    divergence = divergence_by_name(options.divergence, beta=options.beta)
    value_N = divergence(log_p_categories(top, temperature=T), student.log_q_categories(T))
    return value_N * T**2 if options.temperature_squared else value_N


def hard(student: SelectedLogits, top: TopK | None, options: TermOptions) -> Tensor:
    """Cross entropy with the teacher's hard labels: sequence-level distillation (Kim & Rush 2016, arXiv 1606.07947)."""
    return -student.log_q_of("weak")


def confidence(student: SelectedLogits, top: TopK | None, options: TermOptions) -> Tensor:
    """Cross entropy with the student's own hardened prediction: -log q at argmax q, no gradient through the argmax.

    Beside `kd`, at weights 1 - a and a, this is the auxiliary confidence loss of Burns et al. 2023 (arXiv 2312.09390,
    section 4.3 and appendix A.4), up to the teacher's entropy, which no gradient sees.
    """
    return -student.log_q_of("own")


TERMS: dict[str, Term] = {
    "lm": Term(speaks_on=lambda batch, _: batch.target_ids_N != UNKNOWN_TARGET, value=lm, reads=("target",)),
    "kd": Term(speaks_on=lambda batch, options: teacher_positions(batch, options.gate), value=kd, reads=("kept",)),
    "hard": Term(
        speaks_on=lambda batch, options: weak_labels(batch, options.take) != UNKNOWN_TARGET,
        value=hard,
        reads=("weak",),
    ),
    "confidence": Term(
        speaks_on=lambda batch, options: teacher_positions(batch, options.gate), value=confidence, reads=("own", "kept")
    ),
}


def log_p_categories(top: TopK, *, temperature: float) -> Tensor:
    """float64 [N, K + 1]: the teacher's log-probabilities of its kept entries and of the tail as one."""
    log_p_NK, log_p_tail_N = log_probabilities(top, temperature=temperature, dtype=torch.float64)
    return torch.cat([log_p_NK, log_p_tail_N[:, None]], dim=1).clamp(min=LOG_ZERO)


def teacher_positions(batch: Batch, gate: Gate) -> Tensor:
    """bool [N]: the positions with a captured distribution that pass a gate."""
    if batch.teacher is None or gate.is_open:
        return batch.weak_N
    return batch.weak_N.masked_scatter(batch.weak_N, gate_mask(batch, gate))


def weak_labels(batch: Batch, take: str) -> Tensor:
    """int64 [N]: the teacher's hard labels, UNKNOWN_TARGET where there is none."""
    if take == "generated":
        return batch.weak_ids_N
    unknown_N = torch.full_like(batch.target_ids_N, UNKNOWN_TARGET)
    return unknown_N if batch.teacher is None else unknown_N.masked_scatter(batch.weak_N, top_token(batch.teacher))


def term_positions(batch: Batch, name: str, options: TermOptions) -> Tensor:
    """bool [N]: the positions that a term reads in a batch."""
    from_gold_N = batch.gold_N if "gold" in options.on else torch.zeros_like(batch.gold_N)
    from_corpus_N = ~batch.gold_N if "corpus" in options.on else torch.zeros_like(batch.gold_N)
    return TERMS[name].speaks_on(batch, options) & (from_gold_N | from_corpus_N)


def count_positions(batch: Batch, terms: dict[str, TermOptions]) -> Tensor:
    """int64, one entry a term: how many positions each reads. Known before any forward."""
    return torch.stack([term_positions(batch, name, options).sum() for name, options in terms.items()])


def temperatures_of(terms: dict[str, TermOptions], names: Sequence[str]) -> tuple[float, ...]:
    """The temperatures at which some terms read the student, ascending."""
    return tuple(sorted({terms[name].temperature for name in names}))


def classes_of(terms: dict[str, TermOptions]) -> tuple[int, ...]:
    """The tokens that `confidence` chooses among, if it has some."""
    return terms["confidence"].class_ids if "confidence" in terms else ()
