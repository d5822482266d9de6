"""What a run reads of a text of which it leaves out one fold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from pipeline.core.folds import Fold
from pipeline.core.progress import log
from pipeline.core.types import InputError


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Left:
    """The rows of a text that are left without a fold."""

    rows: Sequence[Tensor]
    """int32: of each block its rows that are left, ascending."""
    block_sizes: Sequence[int]
    """The number of rows of each block, those of the fold included."""
    num_targets: int
    """Supervised positions of the rows that are left."""

    def __len__(self) -> int:
        return sum(map(len, self.rows))

    @property
    def mean_targets(self) -> Fraction:
        """Supervised positions a sequence that is left, on average."""
        return Fraction(self.num_targets, len(self))

    def indices(self) -> Tensor:
        """The same rows as indices into all rows of the text, ascending: int64."""
        ends = torch.tensor(self.block_sizes).cumsum(0)
        starts = (ends - torch.tensor(self.block_sizes)).tolist()
        return torch.cat([rows.long() + start for rows, start in zip(self.rows, starts, strict=True)])


def left_without(fold: Fold, blocks: Iterable[Sequence[tuple[bytes, int]]], *, what: str) -> Left:
    """The rows of other folds, logged; InputError if there is none. `what` names the text.

    `blocks` holds of each row its key and its number of supervised positions.
    """
    rows: list[Tensor] = []
    sizes: list[int] = []
    num_targets = 0
    for block in blocks:
        kept = [row for row, (key, _) in enumerate(block) if not fold.holds(key)]
        rows.append(torch.tensor(kept, dtype=torch.int32))
        sizes.append(len(block))
        num_targets += sum(block[row][1] for row in kept)
    left = Left(rows=rows, block_sizes=sizes, num_targets=num_targets)
    if len(left) == 0:
        raise InputError(
            f"leave_out: expected sequences outside of fold {fold} to train on, found none among the {sum(sizes)} of "
            f"{what}; leave out another fold, or give a larger text"
        )
    log.info("leave_out=%s: %d of %d sequences of %s are left out", fold, sum(sizes) - len(left), sum(sizes), what)
    return left
