"""Which rows of a cache an epoch reads, in parts: all but a fold, or from low to high entropy of the teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.core.types import InputError


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Curriculum:
    """The rows of a cache that a run reads, in one or more parts that an epoch visits one after another."""

    rows: Sequence[Sequence[Tensor]]
    """Of each part, of each block: the block's rows that belong to the part, ascending."""

    @property
    def sizes(self) -> tuple[tuple[int, ...], ...]:
        """The number of rows of each part in each block."""
        return tuple(tuple(len(rows) for rows in part) for part in self.rows)

    def rows_in(self, block: int) -> Tensor:
        """The rows of a block in all parts, ascending."""
        return torch.cat([part[block] for part in self.rows]).sort().values

    def row(self, part: int, block: int, number: int) -> int:
        """The row of a block that is the `number`th of a part there."""
        return int(self.rows[part][block][number])


def by_entropy(entropy_R: Sequence[Tensor], num_parts: int, *, rows: Sequence[Tensor] | None = None) -> Curriculum:
    """Part p of P holds the rows of ranks [p n / P, (p + 1) n / P) of all n; equal ones stay as they lie.

    `entropy_R` is, of each block, the teacher's mean entropy (nats) over each row's positions. `rows`: of each block
    the rows that the run reads, ascending; None: all.
    """
    rows = [torch.arange(len(values)) for values in entropy_R] if rows is None else rows
    every_N = torch.cat([values[kept.long()] for values, kept in zip(entropy_R, rows, strict=True)])
    if not every_N.isfinite().all():
        raise InputError(
            "curriculum_parts: expected the teacher's entropy at every position, found a cache without it (an "
            "import or a pool); capture with this project"
        )
    part_N = torch.empty(len(every_N), dtype=torch.int64)
    part_N[every_N.argsort(stable=True)] = torch.arange(len(every_N)) * num_parts // max(len(every_N), 1)
    blocks = part_N.split([len(kept) for kept in rows])
    pairs = list(zip(blocks, rows, strict=True))
    return Curriculum(rows=[[kept[block == p].int() for block, kept in pairs] for p in range(num_parts)])
