"""The order is pure, complete and the same for every number of ranks."""

import math
from collections import Counter
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.types import InputError
from pipeline.data.curriculum import by_entropy
from pipeline.data.sampler import (
    SHUFFLE_BLOCKS,
    BatchSampler,
    CacheStream,
    curriculum_at,
    exact_fraction,
    fraction_of_sequences,
    stream_at,
)

BLOCKS = st.lists(st.integers(1, 7), min_size=1, max_size=30).map(tuple)


@given(blocks=BLOCKS, seed=st.integers(0, 5), epoch=st.integers(0, 3))
def test_every_row_once_an_epoch(blocks: tuple[int, ...], seed: int, epoch: int) -> None:
    total = sum(blocks)
    seen = [stream_at(i, stream="corpus", seed=seed, blocks=blocks) for i in range(epoch * total, (epoch + 1) * total)]
    assert Counter((s.block, s.row) for s in seen) == Counter(
        (b, r) for b, size in enumerate(blocks) for r in range(size)
    )


@given(blocks=BLOCKS, seed=st.integers(0, 5))
def test_reading_stays_inside_one_pool_at_a_time(blocks: tuple[int, ...], seed: int) -> None:
    visited = [stream_at(i, stream="corpus", seed=seed, blocks=blocks).block for i in range(sum(blocks))]
    pools: list[set[int]] = [set()]
    for block in visited:
        if block not in pools[-1] and len(pools[-1]) == SHUFFLE_BLOCKS:
            pools.append(set())
        pools[-1].add(block)
    assert sum(len(pool) for pool in pools) == len(blocks)  # no block is opened twice


FRACTIONS = st.fractions(0, 1, max_denominator=1000)


def order_of(**changes: Any) -> BatchSampler:
    corpora = (CacheStream(weight=Fraction(1), parts=((4, 3, 9),)),)
    known: dict[str, Any] = {"seed": 3, "global_batch": 6, "gold_fraction": Fraction(3, 10), "num_gold": 5}
    return BatchSampler(**known | {"corpora": corpora} | changes)


@given(fraction=FRACTIONS, global_batch=st.integers(1, 32), steps=st.integers(1, 50))
def test_gold_fraction_holds_over_any_stretch(fraction: Fraction, global_batch: int, steps: int) -> None:
    gold = order_of(global_batch=global_batch, gold_fraction=fraction).gold_before(steps)
    assert 0 <= steps * global_batch * fraction - gold < 1


def test_a_tenth_is_a_tenth() -> None:
    order = order_of(global_batch=10, gold_fraction=exact_fraction(0.1))
    assert [order.gold_before(s) for s in (1, 2, 3, 1000)] == [1, 2, 3, 1000]


@given(
    of_targets=st.fractions(Fraction(1, 100), Fraction(99, 100), max_denominator=100),
    gold=st.integers(1, 500),
    corpus=st.integers(1, 500),
)
def test_a_fraction_of_targets(of_targets: Fraction, gold: int, corpus: int) -> None:
    f = fraction_of_sequences(of_targets, gold=Fraction(gold), corpus=Fraction(corpus))
    assert f * gold / (f * gold + (1 - f) * corpus) == of_targets


def test_a_step_has_exactly_the_global_batch_and_streams_run_on() -> None:
    seen: dict[str, list[tuple[int, int]]] = {"gold": [], "corpus": []}
    for step in range(40):
        slots = order_of().slots(step)
        assert len(slots) == 6
        for slot in slots:
            seen[slot.source].append((slot.block, slot.row))
    assert len(seen["gold"]) == 72
    for epoch in range(len(seen["gold"]) // 5):
        assert len(set(seen["gold"][epoch * 5 : epoch * 5 + 5])) == 5
    for epoch in range(len(seen["corpus"]) // 16):
        assert len(set(seen["corpus"][epoch * 16 : epoch * 16 + 16])) == 16


def test_gold_ends_after_its_epochs_and_the_corpus_goes_on_without_a_gap() -> None:
    free, capped = order_of(), order_of(max_gold=13)  # of five: two passes and a half
    slots = [slot for step in range(40) for slot in capped.slots(step)]
    assert len(slots) == 240
    gold = [slot.row for slot in slots if slot.source == "gold"]
    assert gold == [slot.row for step in range(40) for slot in free.slots(step) if slot.source == "gold"][:13]
    assert {slot.source for slot in slots[-6 * 30 :]} == {"corpus"}
    corpus = [(slot.block, slot.row) for slot in slots if slot.source == "corpus"]
    assert len(corpus) == 227
    for epoch in range(227 // 16):
        assert len(set(corpus[epoch * 16 : epoch * 16 + 16])) == 16


@given(
    weights=st.lists(st.integers(1, 20), min_size=1, max_size=5),
    sizes=st.lists(st.integers(1, 7), min_size=5, max_size=5),
    start=st.integers(0, 500),
    length=st.integers(1, 300),
)
def test_caches_have_their_turns_by_weight(weights: list[int], sizes: list[int], start: int, length: int) -> None:
    """Over any stretch, to within one sequence a cache; each visits all its rows before any again."""
    shares = [Fraction(weight, sum(weights)) for weight in weights]
    corpora = tuple(
        CacheStream(weight=s, parts=((size, 2),)) for s, size in zip(shares, sizes[: len(weights)], strict=True)
    )
    order = order_of(corpora=corpora)
    slots = [order.corpus_at(i) for i in range(start + length)]
    turns = Counter(slot.cache for slot in slots[start:])
    for number, share in enumerate(shares):
        assert abs(turns[number] - length * share) <= len(weights)
        own = [(slot.block, slot.row) for slot in slots if slot.cache == number]
        rows = sizes[number] + 2
        for epoch in range(len(own) // rows):
            assert len(set(own[epoch * rows : (epoch + 1) * rows])) == rows


def test_caches_of_one_order_do_not_move_together() -> None:
    corpora = tuple(CacheStream(weight=Fraction(1, 2), parts=((50,),)) for _ in range(2))
    slots = [order_of(corpora=corpora).corpus_at(i) for i in range(100)]
    assert [slot.row for slot in slots if slot.cache == 0] != [slot.row for slot in slots if slot.cache == 1]


@given(
    blocks=st.lists(st.lists(st.floats(0, 5, width=32), min_size=1, max_size=9), min_size=1, max_size=12),
    num_parts=st.integers(1, 6),
)
def test_a_curriculum_takes_the_surest_first_and_every_row_once(blocks: list[list[float]], num_parts: int) -> None:
    curriculum = by_entropy([torch.tensor(values) for values in blocks], num_parts)
    total = sum(map(len, blocks))
    for epoch in range(2):
        indices = range(epoch * total, (epoch + 1) * total)
        slots = [curriculum_at(i, stream="corpus", seed=1, parts=curriculum.sizes) for i in indices]
        places = [(slot.block, curriculum.row(slot.part, slot.block, slot.row)) for slot in slots]
        assert sorted(places) == [(b, r) for b, values in enumerate(blocks) for r in range(len(values))]
        entropies = [(slot.part, blocks[b][r]) for slot, (b, r) in zip(slots, places, strict=True)]
        for part in range(num_parts):
            own = [entropy for p, entropy in entropies if p == part]
            after = [entropy for p, entropy in entropies if p > part]
            assert not own or not after or max(own) <= min(after)
            assert abs(len(own) - total / num_parts) < 1
        assert [part for part, _ in entropies] == sorted(part for part, _ in entropies)


def test_a_curriculum_refuses_a_cache_that_does_not_know_entropy() -> None:
    with pytest.raises(InputError, match="found a cache without it"):
        by_entropy([torch.tensor([1.0, math.nan])], 2)


def test_seed_and_epoch_change_the_order() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return [stream_at(epoch * 50 + i, stream="gold", seed=seed, blocks=(50,)).row for i in range(50)]

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(2, 0)
    assert order(1, 0) != order(1, 1)


# ------------------------------------------------------------------------------------- dealt to ranks


@given(
    num_ranks=st.integers(1, 12),
    part=st.integers(1, 9),
    fraction=FRACTIONS,
    sizes=st.lists(BLOCKS, min_size=1, max_size=3),
    num_parts=st.integers(1, 3),
    step=st.integers(0, 60),
)
def test_ranks_share_a_global_batch_evenly(
    num_ranks: int, part: int, fraction: Fraction, sizes: list[tuple[int, ...]], num_parts: int, step: int
) -> None:
    """Together the step's slots, each once and in its order; each rank G / W of them, and gold to within one."""
    corpora = tuple(CacheStream(weight=Fraction(1, len(sizes)), parts=(own,) * num_parts) for own in sizes)
    order = order_of(global_batch=num_ranks * part, gold_fraction=fraction, corpora=corpora, max_gold=700)
    slots, dealt = order.slots(step), order.dealt(step, num_ranks)
    assert Counter(slot for own in dealt for slot in own) == Counter(slots)
    assert [len(own) for own in dealt] == [part] * num_ranks
    num_gold = [sum(slot.source == "gold" for slot in own) for own in dealt]
    assert max(num_gold) - min(num_gold) <= 1
    for own in dealt:  # repeats of a sequence are equal slots
        places = iter(slots)
        assert all(any(place == slot for place in places) for slot in own)
    assert order.dealt(step, 1) == [slots]
    assert order_of(global_batch=8, gold_fraction=Fraction(1)).dealt(step, 2)[0][0].source == "gold"


def blocks_decoded(order: BatchSampler, num_ranks: int) -> list[int]:
    """How many row groups each rank decodes in an epoch, if it keeps those of one pool."""
    num_rows = sum(map(sum, order.corpora[0].parts))
    decoded = [0] * num_ranks
    kept: list[list[int]] = [[] for _ in range(num_ranks)]  # the last used first
    for step in range(num_rows // order.global_batch):
        for rank, own in enumerate(order.dealt(step, num_ranks)):
            for slot in own:
                if slot.block not in kept[rank]:
                    decoded[rank] += 1
                kept[rank] = [slot.block, *(b for b in kept[rank] if b != slot.block)][: SHUFFLE_BLOCKS + 1]
    return decoded


@pytest.mark.parametrize(("num_ranks", "most"), [(1, 8.0), (2, 5.5), (4, 3.5), (8, 2.5), (16, 2.0)])
def test_ranks_decode_few_row_groups(num_ranks: int, most: float) -> None:
    """Of each pool of 8 row groups; when every rank took every W-th slot, each rank decoded all 8.

    A rank's slots of a step are exact, and row groups have more and less in it: to even that out by stretches of a ring
    takes at least 8 + W - 1 pairs of rank and row group, (8 + W - 1) / W for each rank.
    """
    blocks = (128,) * SHUFFLE_BLOCKS * 8
    corpora = (CacheStream(weight=Fraction(1), parts=(blocks,)),)
    order = order_of(global_batch=128, gold_fraction=Fraction(0), corpora=corpora)
    decoded = blocks_decoded(order, num_ranks)
    assert sum(decoded) / num_ranks / 8 <= most
    assert sum(decoded) >= len(blocks)
