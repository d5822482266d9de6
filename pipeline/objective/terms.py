"""The training loss as a sum of terms; a term is a pure function of the supervised positions.

    L(step) = sum over terms of  weight_term(step) * S_term / N_term

S_term is the sum of the term's values and N_term the number of its positions, both over the global batch: all ranks and
all accumulation steps. N_term is counted before any forward. (Xiao & Zhu, Foundations of Large Language Models,
eq. 4.12 and 4.13.) The terms that read the teacher weight each position in S and N by `Batch.weights_N`: by 1, or with
`targets=choices` by the teacher's probability of the choice's tokens that the position has read; times trust in the
teacher at the position, where a run weights by it (`trust.py`).

A term never sees the full vocabulary. It reads the student's logits at a few selected tokens (the target, the teacher's
kept entries, ...) and the log-sum-exp of all other logits, the rest. `fused_head.py` computes both, and the gradient on
all logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.core.topk import log_probabilities
from pipeline.core.types import UNKNOWN_TARGET, Batch, TopK
from pipeline.objective.divergences import LOG_ZERO, divergence_by_name
from pipeline.objective.gates import Gate, gate_mask, is_known, top_token


@dataclass(frozen=True, slots=True, kw_only=True)
class TermOptions:
    """The options of a term; a term ignores those that it does not use."""

    on: tuple[str, ...]
    """The sources whose positions the term reads: "gold", "corpus" or both."""
    temperature: float = 1.0
    temperature_squared: bool = True
    """Multiply the value, and so the gradient, by T^2 (Hinton et al. 2015, arXiv 1503.02531, section 2)."""
    divergence: str = "forward_kl"
    """A key of `DIVERGENCES`."""
    beta: float = 0.5
    """For the divergence jsd only."""
    tail_weight: float = 1.0
    """For the divergence forward_kl only: the weight of its part between the masses of kept entries and tail."""
    gate: Gate = field(default_factory=Gate)
    class_ids: tuple[int, ...] = ()
    """The tokens among which `confidence` takes the student's prediction; empty: the full vocabulary."""
    take: str = "generated"
    """A key of `HARD_LABELS`: where `hard` takes the teacher's label from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInputs:
    """What the loss of a micro-batch depends on besides the batch; the same for all micro-batches of a step."""

    coefficients: dict[str, float]
    """weight / count of each term over the global batch: the factor on its sum."""
    diagnose: bool = False
    """Also compute the sums of `diagnostics`."""
    thresholds: tuple[float, ...] = ()
    """Thresholds of the classes of `confidence`, in nats; empty if there are no classes."""
    loss_scale: float = 1.0
    """The factor that the engine puts on the loss before the backward, so that float16 gradients do not vanish."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SelectedLogits:
    """The student at N positions: its logits at J selected tokens and, exactly, the log-sum-exp of the rest.

    The rest is every token that is not selected. Then

        log z(T) = log( sum over selected tokens of exp(logit / T) + exp(log_rest(T)) ).
    """

    logits_NJ: Tensor
    """float32, at the tokens `PositionGroup.ids_NJ`."""
    log_rest: dict[float, Tensor]
    """[N] for every temperature T in use: log of the sum of exp(logit / T) over the rest."""
    is_skipped_NJ: Tensor
    """bool: padding, or a token that another column already has; it is not counted again."""
    extra_tokens: tuple[str, ...]
    """The names of the first columns (see `Term.tokens`); the other columns are the teacher's kept entries."""
    largest_rest_N: Tensor
    """The largest logit of the rest."""
    overlap: dict[tuple[float, float], Tensor]
    """[N] for each pair of temperatures: the inner product of the two softmaxes over the rest; for diagnostics only."""

    def log_q_of(self, token: str) -> Tensor:
        """float64 [N]: log-probability, at T = 1, of one of the `extra_tokens`."""
        return self.logits_NJ[:, self.extra_tokens.index(token)] - self._log_z(1.0)

    def log_q_categories(self, temperature: float) -> Tensor:
        """float64 [N, K + 1]: log-probabilities of the teacher's kept entries and, in the last column, of the tail."""
        scaled_NJ = self._scaled(temperature)
        first_kept = len(self.extra_tokens)
        log_rest_N1 = self.log_rest[temperature][:, None].double()
        tail_N = torch.logsumexp(torch.cat([scaled_NJ[:, :first_kept], log_rest_N1], dim=1), dim=1)
        return torch.cat([scaled_NJ[:, first_kept:], tail_N[:, None]], dim=1) - self._log_z(temperature)[:, None]

    # float64 costs nothing for a few numbers a position, and it is needed where student and teacher are 60 nats apart
    def _scaled(self, temperature: float) -> Tensor:
        return (self.logits_NJ.double() / temperature).masked_fill(self.is_skipped_NJ, LOG_ZERO)

    def _log_z(self, temperature: float) -> Tensor:
        return torch.logsumexp(torch.cat([self._scaled(temperature), self.log_rest[temperature][:, None]], 1), dim=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """One component of the loss."""

    positions: Callable[[Batch, TermOptions], Tensor]
    """bool [N]: where the term is defined and its gate passes."""
    value: Callable[[SelectedLogits, TopK | None, TermOptions], Tensor]
    """(student, teacher at the same positions, options) -> float64 [N], nats for each position."""
    tokens: tuple[str, ...]
    """The tokens whose logits it reads: "target"; "teacher_label", the teacher's hard label; "student_top", the
    student's most likely token; "kept", the teacher's kept entries."""
    is_weighted: bool = True
    """Whether `Batch.weights_N` weights its positions: where it reads the teacher."""


# ------------------------------------------------------------------------------------ values


def lm(student: SelectedLogits, top: TopK | None, options: TermOptions) -> Tensor:
    """Cross entropy with known targets y: -log q_y. Gradient on the logits: q - onehot(y)."""
    return -student.log_q_of("target")


def kd(student: SelectedLogits, top: TopK | None, options: TermOptions) -> Tensor:
    """A divergence from the teacher over its kept entries and the tail; times T^2 with `temperature_squared`.

    By default sum_K p log(p/q) + (1-P) log((1-P)/(1-Q)) at temperature T; P and Q are the mass of the kept entries
    under teacher and student. Gradient at T = 1 on a kept logit: q - p; on a logit of the tail: q (P - Q) / (1 - Q).
    """
    assert top is not None
    T = options.temperature
    divergence = divergence_by_name(options.divergence, beta=options.beta, tail_weight=options.tail_weight)
    value_N = divergence(log_p_categories(top, temperature=T), student.log_q_categories(T))
    return value_N * T**2 if options.temperature_squared else value_N


def hard(student: SelectedLogits, top: TopK | None, options: TermOptions) -> Tensor:
    """Cross entropy with the teacher's hard labels: sequence-level distillation (Kim & Rush 2016, arXiv 1606.07947)."""
    return -student.log_q_of("teacher_label")


def confidence(student: SelectedLogits, top: TopK | None, options: TermOptions) -> Tensor:
    """Cross entropy with the student's own prediction: -log q at argmax q, without a gradient through the argmax.

    Together with `kd`, at weights 1 - a and a, this is the auxiliary confidence loss of Burns et al. 2023 (arXiv
    2312.09390, section 4.3 and appendix A.4), up to the teacher's entropy, which has no gradient.
    """
    return -student.log_q_of("student_top")


def log_p_categories(top: TopK, *, temperature: float) -> Tensor:
    """float64 [N, K + 1]: the teacher's log-probabilities of its kept entries and, in the last column, of the tail."""
    log_p_NK, log_p_tail_N = log_probabilities(top, temperature=temperature, dtype=torch.float64)
    return torch.cat([log_p_NK, log_p_tail_N[:, None]], dim=1).clamp(min=LOG_ZERO)


# ------------------------------------------------------------------------------------ positions


def target_positions(batch: Batch, options: TermOptions) -> Tensor:
    """bool [N]: the true target is known."""
    return is_known(batch)


def teacher_positions(batch: Batch, options: TermOptions) -> Tensor:
    """bool [N]: the position has a captured distribution and passes the gate."""
    if batch.teacher is None or options.gate.is_open:
        return batch.weak_N
    return batch.weak_N.masked_scatter(batch.weak_N, gate_mask(batch, options.gate))


def label_positions(batch: Batch, options: TermOptions) -> Tensor:
    """bool [N]: the position has a hard label of the teacher."""
    return HARD_LABELS[options.take](batch) != UNKNOWN_TARGET


def generated_labels(batch: Batch) -> Tensor:
    """int64 [N]: the token that the teacher generated when it completed the record, or UNKNOWN_TARGET."""
    return batch.weak_ids_N


def likeliest_labels(batch: Batch) -> Tensor:
    """int64 [N]: the teacher's most likely token, or UNKNOWN_TARGET where no distribution was captured."""
    unknown_N = torch.full_like(batch.target_ids_N, UNKNOWN_TARGET)
    return unknown_N if batch.teacher is None else unknown_N.masked_scatter(batch.weak_N, top_token(batch.teacher))


HARD_LABELS: dict[str, Callable[[Batch], Tensor]] = {"generated": generated_labels, "likeliest": likeliest_labels}
"""The teacher's hard labels, by the name of the option loss.hard.take."""

TERMS: dict[str, Term] = {
    "lm": Term(positions=target_positions, value=lm, tokens=("target",), is_weighted=False),
    "kd": Term(positions=teacher_positions, value=kd, tokens=("kept",)),
    "hard": Term(positions=label_positions, value=hard, tokens=("teacher_label",)),
    # with classes, `class_sums` compares its predictions with the teacher's kept entries
    "confidence": Term(positions=teacher_positions, value=confidence, tokens=("student_top", "kept")),
}
"""Every term, by its name among the options loss.*."""


def term_positions(batch: Batch, name: str, options: TermOptions) -> Tensor:
    """bool [N]: the positions of a batch that a term reads."""
    from_gold_N = batch.gold_N if "gold" in options.on else torch.zeros_like(batch.gold_N)
    from_corpus_N = ~batch.gold_N if "corpus" in options.on else torch.zeros_like(batch.gold_N)
    return TERMS[name].positions(batch, options) & (from_gold_N | from_corpus_N)


def count_positions(batch: Batch, terms: dict[str, TermOptions]) -> Tensor:
    """float64, one entry for each term: the number of positions that it reads, by weight. It needs no forward."""
    counts = []
    for name, options in terms.items():
        is_read_N = term_positions(batch, name, options)
        counts.append((is_read_N * batch.weights_N if TERMS[name].is_weighted else is_read_N).sum(dtype=torch.float64))
    return torch.stack(counts)


def temperatures_of(terms: dict[str, TermOptions], names: Sequence[str]) -> tuple[float, ...]:
    """The temperatures at which these terms read the student, ascending."""
    return tuple(sorted({terms[name].temperature for name in names}))


def classes_of(terms: dict[str, TermOptions]) -> tuple[int, ...]:
    """The class tokens of `confidence`; empty if there are none."""
    return terms["confidence"].class_ids if "confidence" in terms else ()
