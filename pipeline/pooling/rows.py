"""The rows of a pool from those of its members."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.config.schema import PoolKind
from pipeline.core.types import Captured, Manifest, TokenSequence
from pipeline.pooling.choices import Node, PooledNode, pooled_nodes, pooled_reach
from pipeline.pooling.distributions import Pooled, linear_pool, logarithmic_pool
from pipeline.pooling.members import JoinedRow, Member, groups, rows_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """How members are pooled."""

    kind: PoolKind
    weights: tuple[float, ...]
    """Their sum is 1."""
    temperature: float
    fit: Mapping[str, Any] | None = None
    """What the weights were fitted on, for the manifest; None: they were given."""

    @property
    def changes_members(self) -> bool:
        """Whether the pool is another distribution than that of its one member."""
        return len(self.weights) > 1 or self.temperature != 1.0


def taking_part(pool: Pool, members: Sequence[Member]) -> tuple[Pool, list[Member]]:
    """The pool and its members without those of weight 0, which would only narrow what is kept."""
    pairs = [(weight, member) for weight, member in zip(pool.weights, members, strict=True) if weight > 0]
    return dataclasses.replace(pool, weights=tuple(weight for weight, _ in pairs)), [member for _, member in pairs]


def temperatures_of(pool: Pool, members: Sequence[Manifest]) -> tuple[float, ...]:
    """The temperatures that a pool has: those of `distributions`."""
    common = [T for T in members[0].temperatures if all(T in member.temperatures for member in members)]
    if pool.kind is PoolKind.linear and pool.changes_members:
        return (1.0,)
    return tuple(T for T in common if T == 1.0 or T * pool.temperature in common)


def pool_rows(
    pool: Pool, rows: Sequence[JoinedRow], nodes: Mapping[Node, PooledNode], *, vocabulary_size: int
) -> list[Captured]:
    """The pooled distributions of some sequences; a pool of one member is that member, bit for bit.

    `nodes` are those of the shard (`nodes_of_shard`).
    """
    if not pool.changes_members:
        return [captured for _, (captured,) in rows]
    sequences, by_member = [sequence for sequence, _ in rows], joined(rows)
    pooled = _pooled(pool, by_member, vocabulary_size)
    captured = Captured(
        top=pooled.top,
        next_log_prob_N=pooled.target_log_prob_N.half(),
        entropy_N=torch.full_like(pooled.target_log_prob_N, torch.nan).half(),  # needs the tokens of the tail
        weak_ids_N=by_member[0].weak_ids_N,
        weights_N=None if by_member[0].weights_N is None else _reach(pool, sequences, by_member, nodes),
    )
    return captured.split([len(sequence.target_ids_N) for sequence in sequences])


def joined(rows: Sequence[JoinedRow]) -> list[Captured]:
    """What each member captured at all positions of some sequences."""
    return [Captured.cat(column) for column in zip(*(captured for _, captured in rows), strict=True)]


def _pooled(pool: Pool, by_member: Sequence[Captured], vocabulary_size: int) -> Pooled:
    tops, targets = [one.top for one in by_member], [one.next_log_prob_N.float() for one in by_member]
    if pool.kind is PoolKind.linear:
        reaches = [one.weights_N for one in by_member if one.weights_N is not None]
        return linear_pool(tops, targets, pool.weights, vocabulary_size=vocabulary_size, reaches=reaches or None)
    return logarithmic_pool(tops, targets, pool.weights, vocabulary_size=vocabulary_size, temperature=pool.temperature)


def nodes_of_shard(pool: Pool, members: Sequence[Member], index: int) -> dict[Node, PooledNode]:
    """The nodes of the choices in a shard, of a logarithmic pool; those behind a node may be in any other sequence."""
    manifest, nodes = members[0].manifest, dict[Node, PooledNode]()
    if pool.kind is PoolKind.linear or not pool.changes_members or manifest.made_of.get("targets") != "choices":
        return nodes
    # where weights have a sum below 1, the tokens of a tail may have more than the tail as one outcome
    only_kept = pool.temperature > 1.0 and not all(pool.temperature in m.manifest.temperatures for m in members)
    for rows in groups(rows_of(members, index)):
        pooled = _pooled(pool, joined(rows), manifest.vocabulary_size)
        nodes.update(pooled_nodes([sequence for sequence, _ in rows], pooled, only_kept=only_kept))
    return nodes


def _reach(
    pool: Pool, sequences: Sequence[TokenSequence], by_member: Sequence[Captured], nodes: Mapping[Node, PooledNode]
) -> Tensor:
    """p(node) of the pool at each position: float32 [N]."""
    reaches_NE = torch.stack([one.weights_or_ones() for one in by_member], dim=1).double()
    weights_E = torch.tensor(pool.weights, dtype=torch.float64)
    if pool.kind is PoolKind.linear:
        depths_N = torch.cat([sequence.depths_or_zeros() for sequence in sequences])
        return torch.where(depths_N == 0, 1.0, reaches_NE @ weights_E).float()
    log_reach_N = reaches_NE.log() @ weights_E / pool.temperature
    parts = log_reach_N.split([len(sequence.target_ids_N) for sequence in sequences])
    return torch.cat([pooled_reach(sequence, part_N, nodes) for sequence, part_N in zip(sequences, parts, strict=True)])
