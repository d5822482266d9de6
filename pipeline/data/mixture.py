"""Order + gold set + cache -> the micro-batches of one step of one rank."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch

from pipeline.cache.shards import ShardReader
from pipeline.core.topk import label_smoothed
from pipeline.core.types import UNKNOWN_TARGET, Batch, Captured, InputError, TokenSequence, TopK
from pipeline.data.curriculum import Curriculum
from pipeline.data.packing import collate_inputs
from pipeline.data.sampler import BatchSampler, Slot

Row = tuple[TokenSequence, Captured | None]


class Rows(Protocol):
    """Sequences by their index."""

    def __len__(self) -> int: ...
    def __getitem__(self, row: int, /) -> Row: ...


@dataclass(frozen=True, slots=True, eq=False)
class LazyRows:
    """Rows that are read where they are used."""

    num_rows: int
    read: Callable[[int], Row]

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, row: int, /) -> Row:
        return self.read(row)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """What a run reads, and in which order."""

    order: BatchSampler
    gold: Rows
    """With the teacher's distributions where the gold set was captured too."""
    readers: Sequence[ShardReader]
    """The caches; none where gold_fraction is 1."""
    curriculum: Sequence[Curriculum | None] = ()
    """One entry per cache, None where it has no curriculum; empty if no cache has one."""
    smooth_over: int | None = None
    """Vocabulary size, where label smoothing of equal entropy replaces the teacher as a control; else None."""

    def slots(self, step: int) -> list[Slot]:
        """The global batch of a step."""
        return self.order.slots(step)

    def read(self, slot: Slot) -> tuple[TokenSequence, Captured | None]:
        """The sequence of a slot, with the captured distributions if it is from the corpus."""
        if slot.source == "gold":
            return self.gold[slot.row]
        curriculum = self.curriculum[slot.cache] if self.curriculum else None
        row = slot.row if curriculum is None else curriculum.row(slot.part, slot.block, slot.row)
        return self.readers[slot.cache].row(slot.block, row)

    def micro_batches(self, step: int, *, rank: int, world_size: int, micro_batch: int) -> list[Batch]:
        """The micro-batches of one rank in a step."""
        own_slots = self.order.dealt(step, world_size)[rank]
        groups = [own_slots[i : i + micro_batch] for i in range(0, len(own_slots), micro_batch)]
        batches = [
            collate([self.read(slot) for slot in group], [slot.source == "gold" for slot in group]) for group in groups
        ]
        return [self._smoothed(batch) for batch in batches] if self.smooth_over else batches

    def _smoothed(self, batch: Batch) -> Batch:
        if batch.teacher is None:
            return batch
        assert self.smooth_over is not None
        assert batch.entropy_M is not None
        top = label_smoothed(batch.teacher, batch.entropy_M, vocabulary_size=self.smooth_over)
        return dataclasses.replace(batch, teacher=top)


def fitting_micro_batch(global_batch: int, *, world_size: int, at_most: int) -> int:
    """The largest micro-batch up to `at_most` that divides a rank's part of the global batch."""
    if global_batch % world_size != 0:
        raise InputError(
            f"global_batch: expected a multiple of the {world_size} ranks, found {global_batch}; "
            "change global_batch or launcher.num_processes"
        )
    part = global_batch // world_size
    return next(size for size in range(min(at_most, part), 0, -1) if part % size == 0)


def collate(rows: Sequence[tuple[TokenSequence, Captured | None]], from_gold: Sequence[bool]) -> Batch:
    """One micro-batch out of sequences."""
    sequences = [sequence for sequence, _ in rows]
    input_ids_BS, position_ids_BS, flat_positions_N = collate_inputs(sequences)
    num_targets = [sequence.target_ids_N.shape[0] for sequence in sequences]
    counts = torch.tensor(num_targets)
    captured = [one for _, one in rows if one is not None]
    has_teacher = torch.tensor([one is not None for _, one in rows])
    weak_ids = [None if one is None else one.weak_ids_N for _, one in rows]
    weights = [None if one is None else one.weights_N for _, one in rows]
    keys = [int.from_bytes(sequence.key[:8], "little", signed=True) for sequence in sequences]
    return Batch(
        keys_B=torch.tensor(keys),
        input_ids_BS=input_ids_BS,
        position_ids_BS=position_ids_BS,
        flat_positions_N=flat_positions_N,
        target_ids_N=torch.cat([sequence.target_ids_N for sequence in sequences]),
        gold_N=torch.tensor(from_gold).repeat_interleave(counts),
        weak_N=has_teacher.repeat_interleave(counts),
        weak_ids_N=_joined(weak_ids, num_targets, UNKNOWN_TARGET),
        weights_N=_joined(weights, num_targets, 1.0),
        depths_N=_joined([sequence.depths_N for sequence in sequences], num_targets, 0),
        teacher=TopK.cat([one.top for one in captured]) if captured else None,
        entropy_M=torch.cat([one.entropy_N for one in captured]).float() if captured else None,
    )


def _joined(columns: Sequence[torch.Tensor | None], counts: Sequence[int], default: float) -> torch.Tensor:
    """The values of all rows, [N]; `default` at the positions of rows that have none."""
    if all(column is None for column in columns):
        return torch.full((sum(counts),), default)
    filled = zip(columns, counts, strict=True)
    return torch.cat([torch.full((count,), default) if column is None else column for column, count in filled])


def prefetch(
    mixture: Mixture, steps: range, *, rank: int, world_size: int, micro_batch: int
) -> Generator[tuple[int, list[Batch]]]:
    """(step, micro-batches) in order; the next step is read while this one computes."""

    def read(step: int) -> list[Batch]:
        return mixture.micro_batches(step, rank=rank, world_size=world_size, micro_batch=micro_batch)

    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as pool:
        ahead = pool.submit(read, steps.start) if len(steps) else None
        for step in steps:
            assert ahead is not None
            ready, ahead = ahead.result(), pool.submit(read, step + 1) if step + 1 < steps.stop else None
            yield step, ready
