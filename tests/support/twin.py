"""A slow twin of the loss: dense fp64 probabilities, one position after another, by the textbook formulas."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from pipeline.core.topk import top_k_and_entropy
from pipeline.core.types import UNKNOWN_TARGET, Batch, TopK
from pipeline.objective.terms import TermOptions


def teacher_at(top: TopK, n: int, temperature: float) -> tuple[dict[int, float], float]:
    """The teacher at one position: {token: p} of its kept entries, and the p of the tail."""
    tail = math.exp(float(top.log_tail_NC[n, top.temperatures.index(temperature)]))
    pairs = zip(top.ids_NK[n].tolist(), top.relative_logits_NK[n].double().tolist(), strict=True)
    exps = {token: math.exp(z / temperature) for token, z in pairs if z > -math.inf}
    total = sum(exps.values()) + tail
    return {token: value / total for token, value in exps.items()}, tail / total


def divergence_at(z_V: Tensor, kept: dict[int, float], tail: float, options: TermOptions) -> Tensor:
    """The divergence at one position, fp64; autograd differentiates it."""
    q_V = torch.softmax(z_V / options.temperature, 0)
    rest_V = torch.tensor([token not in kept for token in range(len(z_V))])
    q = [*(q_V[token] for token in kept), q_V[rest_V].sum()]
    p = [torch.tensor(value, dtype=torch.float64) for value in (*kept.values(), tail)]
    if options.divergence in ("renormalised", "truncated"):
        q, p = q[:-1], p[:-1]
    if options.divergence == "renormalised":
        p = [value / sum(kept.values()) for value in p]
    value = torch.zeros((), dtype=torch.float64)
    if options.tail_weight != 1.0:  # the masses, and the shape of the kept entries
        p_kept, q_kept = sum(p[:-1]), sum(q[:-1])
        masses = x_log_y(p_kept, p_kept / q_kept) + x_log_y(p[-1], p[-1] / q[-1])
        shape = [x_log_y(p_i, (p_i / p_kept) / (q_i / q_kept)) for p_i, q_i in zip(p[:-1], q[:-1], strict=True)]
        value = options.tail_weight * masses + sum(shape)
        return value * (options.temperature**2 if options.temperature_squared else 1.0)
    for p_i, q_i in zip(p, q, strict=True):
        if options.divergence == "total_variation":
            value = value + 0.5 * (p_i - q_i).abs()
        elif options.divergence == "jsd" and 0 < options.beta < 1:
            m_i = options.beta * p_i + (1 - options.beta) * q_i
            value = value + options.beta * x_log_y(p_i, p_i / m_i) + (1 - options.beta) * x_log_y(q_i, q_i / m_i)
        elif options.divergence == "reverse_kl" or (options.divergence == "jsd" and options.beta == 1):
            value = value + x_log_y(q_i, q_i / p_i.clamp(min=math.exp(-100)))
        else:
            value = value + x_log_y(p_i, p_i / q_i)
    return value * (options.temperature**2 if options.temperature_squared else 1.0)


def x_log_y(x: Tensor, y: Tensor) -> Tensor:
    """x log y, 0 where x is 0."""
    return x * y.log() if x > 0 else torch.zeros_like(x)


def value_at(name: str, z_V: Tensor, batch: Batch, n: int, options: TermOptions) -> Tensor:
    """The value of a term at one position."""
    log_q_V = torch.log_softmax(z_V, 0)
    if name == "lm":
        return -log_q_V[batch.target_ids_N[n]]
    if name == "confidence":
        return -log_q_V[int(z_V.argmax())]
    assert batch.teacher is not None
    m = int(batch.weak_N[:n].sum())
    if name == "hard":
        likeliest = batch.teacher.ids_NK[m, batch.teacher.relative_logits_NK[m].argmax()]
        return -log_q_V[batch.weak_ids_N[n] if options.take == "generated" else likeliest]
    return divergence_at(z_V, *teacher_at(batch.teacher, m, options.temperature), options)


def twin(
    logits_NV: Tensor,
    batch: Batch,
    positions: dict[str, list[int]],
    terms: dict[str, TermOptions],
    factors: dict[str, float],
) -> Tensor:
    """The loss: the sum over terms of factor * (the sum over the term's positions)."""
    total = logits_NV.sum() * 0.0
    for name, options in terms.items():
        for n in positions[name]:
            total = total + factors[name] * value_at(name, logits_NV[n], batch, n, options)
    return total


class IdentityHead(nn.Module):
    """A model whose hidden states are its logits: the head is the identity."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.head = nn.Linear(vocabulary, vocabulary, bias=False)
        self.config = SimpleNamespace()
        nn.init.eye_(self.head.weight)

    def get_output_embeddings(self) -> nn.Linear:
        return self.head


def make_batch(
    *,
    num_gold: int,
    num_corpus: int,
    vocabulary: int = 30,
    k: int = 5,
    known: float = 0.0,
    gold_is_captured: bool = False,
    temperatures: tuple[float, ...] = (1.0, 2.0),
    scale: float = 1.0,
    seed: int = 0,
    top: TopK | None = None,
) -> Batch:
    """A random micro-batch of supervised positions; a fraction `known` of those of the corpus has a known target."""
    generator = torch.Generator().manual_seed(seed)
    total = num_gold + num_corpus
    gold_N = torch.randperm(total, generator=generator) < num_gold
    targets_N = torch.randint(0, vocabulary, (total,), generator=generator)
    is_known_N = gold_N | (torch.rand(total, generator=generator) < known)
    weak_N = torch.ones_like(gold_N) if gold_is_captured else ~gold_N
    num_weak = int(weak_N.sum())
    teacher_MV = torch.randn(num_weak, vocabulary, generator=generator) * scale
    if top is None and num_weak:
        top = top_k_and_entropy(teacher_MV, k=min(k, vocabulary), temperatures=temperatures)[0]
    generated_N = torch.where(weak_N, torch.randint(0, vocabulary, (total,), generator=generator), UNKNOWN_TARGET)
    return Batch(
        input_ids_BS=torch.zeros(1, max(total, 1), dtype=torch.int64),
        position_ids_BS=torch.zeros(1, max(total, 1), dtype=torch.int64),
        flat_positions_N=torch.arange(total),
        target_ids_N=torch.where(is_known_N, targets_N, UNKNOWN_TARGET),
        gold_N=gold_N,
        weak_N=weak_N,
        weak_ids_N=generated_N,
        weights_N=torch.ones(total),
        depths_N=torch.zeros(total, dtype=torch.int64),
        teacher=top,
        entropy_M=torch.special.entr(torch.softmax(teacher_MV, 1)).sum(1) if num_weak else None,
        keys_B=torch.zeros(1, dtype=torch.int64),
    )
