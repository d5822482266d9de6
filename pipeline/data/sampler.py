"""The order of the data: (seed, step, slot) -> sequence. A pure function; no sampler state is saved or restored.

The slots of a global batch are numbered 0 to G - 1 whatever the number of ranks, so any number of them sees the same
global batches. Within a step the slots are dealt so that a rank reads few row groups, the same ones over many steps.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import torch

from pipeline.core.seeds import seed_from_bytes

SHUFFLE_BLOCKS = 8  # row groups shuffled together: sorted corpora mix better, and memory stays bounded


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """One sequence of a global batch."""

    source: str
    """"gold" or "corpus"."""
    block: int
    """Row group of the cache; always 0 for gold, which is one block."""
    row: int
    """Row inside the block, or inside what of the block belongs to `part`."""
    cache: int = 0
    """Which cache of the corpus."""
    part: int = 0
    """Which part of the curriculum."""
    span: tuple[float, float] = (0.0, 1.0)
    """From where to where its block lies in its pool, the blocks that are shuffled together (0 to 1)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheStream:
    """One cache as a stream of sequences."""

    weight: Fraction
    """Its share of the corpus's sequences; those of all caches sum to 1."""
    parts: tuple[tuple[int, ...], ...]
    """Rows of each block: of all its rows, or of each part of a curriculum, which an epoch visits one after another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSampler:
    """Everything that decides which sequences a step reads."""

    seed: int
    global_batch: int
    gold_fraction: Fraction
    """Of the sequences."""
    num_gold: int
    corpora: tuple[CacheStream, ...]
    max_gold: int | None = None
    """Gold sequences, repeats included, after which only the corpus is left; None: no end."""

    def gold_before(self, step: int) -> int:
        """Gold sequences in all global batches before `step`: floor(step * G * f), so f holds over any stretch."""
        gold = math.floor(step * self.global_batch * self.gold_fraction)
        return gold if self.max_gold is None else min(gold, self.max_gold)

    def slots(self, step: int) -> list[Slot]:
        """The G sequences of one step, gold first; all streams run on from step to step and repeat by epochs."""
        first_gold, end_gold = self.gold_before(step), self.gold_before(step + 1)
        first_corpus = step * self.global_batch - first_gold
        end_corpus = (step + 1) * self.global_batch - end_gold
        blocks = (self.num_gold,)
        gold = [stream_at(i, stream="gold", seed=self.seed, blocks=blocks) for i in range(first_gold, end_gold)]
        return gold + [self.corpus_at(i) for i in range(first_corpus, end_corpus)]

    def dealt(self, step: int, num_ranks: int) -> list[list[Slot]]:
        """The slots of a step for each rank: G / W of them, gold evenly to within one, each in the order of the step.

        Gold is cut into stretches of rows, the corpus into stretches of a ring of row groups: the row groups of a pool
        one after another, the first again after the last. See `_turn`.
        """
        slots = self.slots(step)
        num_gold = self.gold_before(step + 1) - self.gold_before(step)
        spans = self._spans_on_ring(slots)
        gold = sorted(range(num_gold), key=lambda i: slots[i].row)
        ring = sorted(range(num_gold, len(slots)), key=lambda i: (spans[i], slots[i].block))
        gold_starts = [num_gold * rank // num_ranks for rank in range(num_ranks + 1)]
        starts = [len(slots) * rank // num_ranks - gold_starts[rank] for rank in range(num_ranks + 1)]
        turn = _turn([spans[i][1] for i in ring], starts[:-1])
        ring = ring[turn:] + ring[:turn]
        parts = zip(itertools.pairwise(gold_starts), itertools.pairwise(starts), strict=True)
        return [[slots[i] for i in sorted(gold[a:b] + ring[c:d])] for (a, b), (c, d) in parts]

    def _spans_on_ring(self, slots: Sequence[Slot]) -> list[tuple[float, float]]:
        """From where to where the block of each slot lies on the ring; each cache is as wide there as its weight."""
        ends = [float(end) for end in itertools.accumulate((c.weight for c in self.corpora), initial=Fraction(0))]
        widths = [end - begin for begin, end in itertools.pairwise(ends)] or [1.0]
        return [
            (ends[slot.cache] + widths[slot.cache] * slot.span[0], ends[slot.cache] + widths[slot.cache] * slot.span[1])
            for slot in slots
        ]

    def corpus_at(self, index: int) -> Slot:
        """The corpus's sequence at `index`: which cache is next, then the position in that cache.

        The first cache is next where floor(index * w) rises: with w = 1/3 at 2, 5, 8, ... The other caches share the
        remaining places in the same way, so each weight holds over any range of steps, to within as many sequences as
        there are caches.
        """
        left = Fraction(1)
        for number, corpus in enumerate(self.corpora):
            before, after = (math.floor(i * corpus.weight / left) for i in (index, index + 1))
            if after > before:
                name = "corpus" if number == 0 else f"corpus {number}"
                slot = curriculum_at(before, stream=name, seed=self.seed, parts=corpus.parts)
                return dataclasses.replace(slot, source="corpus", cache=number)
            index, left = index - before, left - corpus.weight
        raise AssertionError("the last cache takes all that is left")


def _turn(block_ends: Sequence[float], starts: Sequence[int]) -> int:
    """By how many slots the ring is turned, so that no rank takes any of a block that ends before the rank's own place.

    `block_ends` has one value a slot, `starts` the first slot of each rank before the turn. A step holds more slots of
    one block and fewer of another than their sizes let expect: what is too much for a rank goes to the next one, never
    to the one before, so a rank meets its own blocks and the first of the next rank's.
    """
    ends, last = sorted(block_ends), max(len(block_ends), 1)
    # blocks end at 0.25, 0.5, ...; rank 1 of 2 begins at place 0.5, and 5 of the 8 slots are of blocks that end there
    # or before, so its start moves from slot 4 to slot 5, and that of rank 0 from 0 to 1: rank 1 takes slot 0 at last
    turn = max(bisect_right(ends, start / last + 1e-9) - start for start in starts)
    return turn % last


def fraction_of_sequences(of_targets: Fraction, *, gold: Fraction, corpus: Fraction) -> Fraction:
    """The fraction f of sequences that are gold where p of all targets shall be: f = (p / g) / (p / g + (1 - p) / c).

    `gold` and `corpus` are g and c, the mean targets of a sequence of each, both above 0.
    """
    wanted_gold, wanted_corpus = of_targets / gold, (1 - of_targets) / corpus
    return wanted_gold / (wanted_gold + wanted_corpus)


def exact_fraction(fraction: float) -> Fraction:
    """The nearest fraction with a denominator up to a million, so that 0.1 is exactly one tenth."""
    return Fraction(fraction).limit_denominator(1_000_000)


def curriculum_at(index: int, *, stream: str, seed: int, parts: tuple[tuple[int, ...], ...]) -> Slot:
    """The sequence at `index` of an endless stream whose epochs go through `parts` in turn, each in its own order."""
    epoch, offset = divmod(index, sum(map(sum, parts)))
    for part, blocks in enumerate(parts):
        if offset < (size := sum(blocks)):
            name = stream if len(parts) == 1 else f"{stream} part {part}"
            slot = stream_at(epoch * size + offset, stream=name, seed=seed, blocks=blocks)
            return dataclasses.replace(slot, part=part)
        offset -= size
    raise AssertionError("an offset below the sum of the parts lies in one of them")


def stream_at(index: int, *, stream: str, seed: int, blocks: tuple[int, ...]) -> Slot:
    """The sequence at `index` of an endless stream that visits every row of `blocks` once an epoch.

    Block shuffle: the blocks in an order of the epoch, then the rows of POOL_BLOCKS consecutive blocks in an
    order of that pool, so that reading stays local.
    """
    epoch, offset = divmod(index, sum(blocks))
    for pool, size in _pools(stream, seed, epoch, blocks):
        if offset < size:
            sizes = tuple(blocks[b] for b in pool)
            block, row = _pool_rows(stream, seed, epoch, pool, sizes)[offset]
            return Slot(source=stream, block=block, row=row, span=_spans(pool, sizes)[block])
        offset -= size
    raise AssertionError("an offset below the sum of the blocks lies in one of them")


@lru_cache(maxsize=64)
def _pools(stream: str, seed: int, epoch: int, blocks: tuple[int, ...]) -> list[tuple[tuple[int, ...], int]]:
    order = _permutation(len(blocks), stream, seed, epoch)
    pools = [tuple(order[i : i + SHUFFLE_BLOCKS]) for i in range(0, len(order), SHUFFLE_BLOCKS)]
    return [(pool, sum(blocks[b] for b in pool)) for pool in pools]


@lru_cache(maxsize=16)
def _pool_rows(
    stream: str, seed: int, epoch: int, pool: tuple[int, ...], sizes: tuple[int, ...]
) -> list[tuple[int, int]]:
    rows = [(block, row) for block, size in zip(pool, sizes, strict=True) for row in range(size)]
    return [rows[i] for i in _permutation(len(rows), stream, seed, epoch, *pool)]


@lru_cache(maxsize=16)
def _spans(pool: tuple[int, ...], sizes: tuple[int, ...]) -> dict[int, tuple[float, float]]:
    ends = [end / sum(sizes) for end in itertools.accumulate(sizes, initial=0)]
    return dict(zip(pool, itertools.pairwise(ends), strict=True))


def _permutation(size: int, *of: object) -> list[int]:
    generator = torch.Generator().manual_seed(seed_from_bytes(repr(of).encode()))
    return torch.randperm(size, generator=generator).tolist()
