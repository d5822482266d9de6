"""Order: (seed, step, slot) -> which sequence. Pure; nothing here is ever saved or restored.

The slots of a global batch are numbered 0 to G - 1 whatever the number of ranks: rank r of W takes the slots
r, r + W, r + 2W, ... so any world size sees the same global batches.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import torch

POOL_BLOCKS = 8  # row groups shuffled together: sorted corpora mix better, and memory stays bounded


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """One sequence of a global batch."""

    source: str
    """"gold" or "corpus"."""
    block: int
    """Row group of the corpus; always 0 for gold, which is one block."""
    row: int
    """Row inside the block."""


def gold_before(step: int, *, global_batch: int, gold_fraction: float) -> int:
    """Gold sequences in all global batches before `step`: floor(step * G * f), so f holds over any stretch.

    f is the fraction meant: the nearest with a denominator up to a million, so that 0.1 is one tenth.
    """
    exact = Fraction(gold_fraction).limit_denominator(1_000_000)
    return math.floor(step * global_batch * exact)


def global_batch_slots(
    step: int,
    *,
    seed: int,
    global_batch: int,
    gold_fraction: float,
    num_gold: int,
    corpus_blocks: Sequence[int],
) -> list[Slot]:
    """The G sequences of one step, gold first; both streams run on from step to step and repeat by epochs.

    `corpus_blocks` holds the rows of each row group of the cache.
    """
    first_gold = gold_before(step, global_batch=global_batch, gold_fraction=gold_fraction)
    end_gold = gold_before(step + 1, global_batch=global_batch, gold_fraction=gold_fraction)
    first_corpus = step * global_batch - first_gold
    end_corpus = (step + 1) * global_batch - end_gold
    gold = [stream_at(i, stream="gold", seed=seed, blocks=(num_gold,)) for i in range(first_gold, end_gold)]
    blocks = tuple(corpus_blocks)
    corpus = [stream_at(i, stream="corpus", seed=seed, blocks=blocks) for i in range(first_corpus, end_corpus)]
    return gold + corpus


def stream_at(index: int, *, stream: str, seed: int, blocks: tuple[int, ...]) -> Slot:
    """The sequence at `index` of an endless stream that visits every row of `blocks` once an epoch.

    Block shuffle: the blocks in an order of the epoch, then the rows of POOL_BLOCKS consecutive blocks in an
    order of that pool, so that reading stays local.
    """
    epoch, offset = divmod(index, sum(blocks))
    for pool, size in _pools(stream, seed, epoch, blocks):
        if offset < size:
            block, row = _pool_rows(stream, seed, epoch, pool, tuple(blocks[b] for b in pool))[offset]
            return Slot(source=stream, block=block, row=row)
        offset -= size
    raise AssertionError("an offset below the sum of the blocks lies in one of them")


@lru_cache(maxsize=8)
def _pools(stream: str, seed: int, epoch: int, blocks: tuple[int, ...]) -> list[tuple[tuple[int, ...], int]]:
    order = _permutation(len(blocks), stream, seed, epoch)
    pools = [tuple(order[i : i + POOL_BLOCKS]) for i in range(0, len(order), POOL_BLOCKS)]
    return [(pool, sum(blocks[b] for b in pool)) for pool in pools]


@lru_cache(maxsize=4)
def _pool_rows(
    stream: str, seed: int, epoch: int, pool: tuple[int, ...], sizes: tuple[int, ...]
) -> list[tuple[int, int]]:
    rows = [(block, row) for block, size in zip(pool, sizes, strict=True) for row in range(size)]
    return [rows[i] for i in _permutation(len(rows), stream, seed, epoch, *pool)]


def _permutation(size: int, *of: object) -> list[int]:
    digest = hashlib.blake2b(repr(of).encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.randperm(size, generator=generator).tolist()
