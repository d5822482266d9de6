"""A curriculum by the teacher's confidence: an epoch goes from low to high entropy of the teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.core.types import InputError


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Curriculum:
    """The rows of a cache in parts of equal size, by rising entropy of the teacher."""

    rows: Sequence[Sequence[Tensor]]
    """Of each part, of each block: the block's rows that belong to the part, ascending."""

    @property
    def sizes(self) -> tuple[tuple[int, ...], ...]:
        """The number of rows of each part in each block."""
        return tuple(tuple(len(rows) for rows in part) for part in self.rows)

    def row(self, part: int, block: int, number: int) -> int:
        """The row of a block that is the `number`th of a part there."""
        return int(self.rows[part][block][number])


def by_entropy(entropy_R: Sequence[Tensor], num_parts: int) -> Curriculum:
    """Part p of P holds the rows of ranks [p n / P, (p + 1) n / P) of all n; equal ones stay as they lie.

    `entropy_R` is, of each block, the teacher's mean entropy (nats) over each row's positions.
    """
    every_N = torch.cat(list(entropy_R))
    if not every_N.isfinite().all():
        raise InputError(
            "curriculum_parts: expected the teacher's entropy at every position, found a cache without it (an "
            "imported one); capture with this project"
        )
    part_N = torch.empty(len(every_N), dtype=torch.int64)
    part_N[every_N.argsort(stable=True)] = torch.arange(len(every_N)) * num_parts // max(len(every_N), 1)
    blocks = part_N.split([len(values) for values in entropy_R])
    return Curriculum(rows=[[(block == p).nonzero()[:, 0].int() for block in blocks] for p in range(num_parts)])
