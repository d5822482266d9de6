"""The order is pure, complete and the same for every number of ranks."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from pipeline.order import POOL_BLOCKS, global_batch_slots, gold_before, stream_at

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
        if block not in pools[-1] and len(pools[-1]) == POOL_BLOCKS:
            pools.append(set())
        pools[-1].add(block)
    assert sum(len(pool) for pool in pools) == len(blocks)  # no block is opened twice


@given(
    fraction=st.floats(0, 1),
    global_batch=st.integers(1, 32),
    steps=st.integers(1, 50),
)
def test_gold_fraction_holds_over_any_stretch(fraction: float, global_batch: int, steps: int) -> None:
    gold = gold_before(steps, global_batch=global_batch, gold_fraction=fraction)
    resolution = steps * global_batch * 1e-6  # a fraction is taken to the nearest with a denominator up to a million
    assert -resolution <= steps * global_batch * fraction - gold < 1 + resolution


def test_a_tenth_is_a_tenth() -> None:
    assert [gold_before(s, global_batch=10, gold_fraction=0.1) for s in (1, 2, 3, 1000)] == [1, 2, 3, 1000]


def test_a_step_has_exactly_the_global_batch_and_streams_run_on() -> None:
    seen: dict[str, list[tuple[int, int]]] = {"gold": [], "corpus": []}
    for step in range(40):
        slots = global_batch_slots(step, seed=3, global_batch=6, gold_fraction=0.3, num_gold=5, corpus_blocks=(4, 3, 9))
        assert len(slots) == 6
        for slot in slots:
            seen[slot.source].append((slot.block, slot.row))
    assert len(seen["gold"]) == 72
    for epoch in range(len(seen["gold"]) // 5):
        assert len(set(seen["gold"][epoch * 5 : epoch * 5 + 5])) == 5
    for epoch in range(len(seen["corpus"]) // 16):
        assert len(set(seen["corpus"][epoch * 16 : epoch * 16 + 16])) == 16


def test_seed_and_epoch_change_the_order() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return [stream_at(epoch * 50 + i, stream="gold", seed=seed, blocks=(50,)).row for i in range(50)]

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(2, 0)
    assert order(1, 0) != order(1, 1)
