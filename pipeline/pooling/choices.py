"""Choices of several tokens in a logarithmic pool: the probability of reaching each node of their tree.

A pool is one at each node: p(v|node) = prod_m p_m(v|node)^w_m / Z(node), so that a node with the tokens v_1 to v_d has

    p(node) = product over i of  p(v_i | v_1 ... v_(i-1)) = prod_m p_m(node)^w_m / product over i < d of Z(v_1 ... v_i),

because each member's probabilities of the tokens multiply to its p_m(node), which was captured, also where a token is
not kept. Z of the nodes that come before must be known; they may lie in other sequences of the shard, before or behind.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.core.types import InputError, TokenSequence
from pipeline.pooling.distributions import Pooled

Node = tuple[int, tuple[int, ...]]
"""The record, and the tokens of choices that were read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PooledNode:
    """What a pool at a node means for the nodes behind it."""

    log_normaliser: float
    """log Z, nats."""
    kept_ids: frozenset[int] | None
    """The tokens that the pool keeps there; None: any token may follow."""


def nodes_of(sequence: TokenSequence) -> list[Node]:
    """The node of each supervised position."""
    ids, depths = sequence.input_ids_S.tolist(), sequence.depths_or_zeros().tolist()
    records = records_of(sequence).tolist()
    positions = sequence.target_positions_N.tolist()
    return [
        (record, tuple(ids[s - depth + 1 : s + 1])) for record, s, depth in zip(records, positions, depths, strict=True)
    ]


def records_of(sequence: TokenSequence) -> Tensor:
    """The record of each supervised position: int64 [N]."""
    # segments of 3 and 2 tokens end at 3 and 5: position 3 is in the second one
    ends = torch.tensor(sequence.segment_lengths).cumsum(dim=0)
    return torch.tensor(sequence.record_ids)[torch.searchsorted(ends, sequence.target_positions_N, right=True)]


def pooled_nodes(
    sequences: Sequence[TokenSequence], pooled: Pooled, *, only_kept: bool
) -> Iterable[tuple[Node, PooledNode]]:
    """The nodes of some sequences, whose positions are those of the pool; with `only_kept` also what it keeps."""
    nodes = [node for sequence in sequences for node in nodes_of(sequence)]
    log_normalisers = pooled.log_normaliser_N.tolist()
    kept_ids: Iterable[frozenset[int] | None] = [None] * len(nodes)
    if only_kept:
        kept_ids = (frozenset(ids) for ids in pooled.top.ids_NK.tolist())  # padding repeats an id
    for node, log_normaliser, kept in zip(nodes, log_normalisers, kept_ids, strict=True):
        yield node, PooledNode(log_normaliser=log_normaliser, kept_ids=kept)


def pooled_reach(sequence: TokenSequence, log_reach_N: Tensor, found: Mapping[Node, PooledNode]) -> Tensor:
    """p(node) of each position in the pool: float32 [N].

    `log_reach_N` is log prod_m p_m(node)^w_m. InputError where a node that comes before was not captured, or where it
    does not keep a token that follows though it has to.
    """
    log_sums = []
    for record, path in nodes_of(sequence):
        log_sum = 0.0
        for depth, token in enumerate(path):
            before = found.get((record, path[:depth]))
            if before is None:
                raise InputError(
                    f"members: expected all nodes of the choices of record {record}, found none with the tokens "
                    f"{list(path[:depth])}; capture the whole text with corpus.targets=choices"
                )
            if before.kept_ids is not None and token not in before.kept_ids:
                raise InputError(
                    f"members: expected the tokens of choices among those that all of them kept, because a pool that "
                    f"flattens does not know what is in the tail, found token {token} of record {record} outside; "
                    "capture with a larger k"
                )
            log_sum += before.log_normaliser
        log_sums.append(log_sum)
    log_reach_N = log_reach_N.double() - torch.tensor(log_sums, dtype=torch.float64)
    # above 1 by rounding alone
    return torch.where(sequence.depths_or_zeros() == 0, 1.0, log_reach_N.exp().clamp(max=1.0)).float()
