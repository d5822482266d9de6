"""Claims of shards: the order of one worker, and a thousand workers in a simulation with the same decisions."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pipeline.cache import leases
from pipeline.cache.leases import hold_lease
from pipeline.capture import worker
from pipeline.capture.claims import MAX_LOSSES, ListMissing, Outcome, Try, Wait, claim_order, claims, follow
from pipeline.capture.plan import make_plan
from pipeline.capture.plan_lookup import plan_folder
from pipeline.core import object_store
from pipeline.core.object_store import RemotePath, open_location
from support.claims_simulation import CHECK_OF_A_LEASE, Result, Scale, Store, Worker, attempt, simulate
from support.commands import config_of

LEASE_SECONDS = 60.0


# ------------------------------------------------------------------------------------------- decisions


@pytest.mark.parametrize("count", [1, 2, 3, 7, 10, 64, 1000])
def test_an_order_has_each_shard_once(count: int) -> None:
    missing = random.Random(0).sample(range(10 * count), count)
    orders = [list(claim_order(missing, random.Random(seed))) for seed in range(20)]
    assert all(sorted(order) == sorted(missing) for order in orders)
    if count >= 64:
        assert len({order[0] for order in orders}) > 12  # the workers start at different places
        assert len({tuple(order[:3]) for order in orders}) == 20


def followed(missing: Sequence[int], answers: Iterator[Outcome], listed: Sequence[int] = ()) -> list[Any]:
    """All that a worker does, up to the last answer."""
    done: list[Any] = []

    def capture(index: int) -> Outcome:
        done.append(Try(index))
        return next(answers)

    def list_missing(known: Sequence[int]) -> Sequence[int]:
        done.append(ListMissing(known))
        return listed

    with suppress(StopIteration):  # no answer is left
        follow(
            claims(missing, seed=1, lease_seconds=LEASE_SECONDS),
            capture=capture,
            list_missing=list_missing,
            wait=lambda seconds, left: done.append(Wait(seconds, left)),
        )
    return done


def test_a_worker_that_meets_no_other_goes_by_index() -> None:
    done = followed(range(100), iter([Outcome.captured] * 100))
    assert done == [Try(index) for index in range(100)]


@pytest.mark.parametrize("loss", [Outcome.held, Outcome.committed])
def test_a_worker_that_meets_another_goes_on_in_its_own_order(loss: Outcome) -> None:
    answers = [Outcome.captured, Outcome.captured, loss, *[Outcome.captured] * 97]
    missing = range(3, 100)
    done = followed(range(100), iter(answers), missing)
    tried = [step.index for step in done if isinstance(step, Try)]
    assert tried[:3] == [0, 1, 2]
    assert tried[3:10] != list(range(tried[3], tried[3] + 7))
    assert sorted(set(tried[3:])) == list(range(2 if loss is Outcome.held else 3, 100))
    assert not any(isinstance(step, Wait) for step in done)  # the first meeting is no reason to wait


def test_a_list_that_is_wrong_is_made_again_and_one_that_is_right_is_not() -> None:
    committed = followed(range(1000), iter([Outcome.committed] * (1 + MAX_LOSSES)), range(500))
    assert sum(isinstance(step, ListMissing) for step in committed) == 2
    held = followed(range(1000), iter([Outcome.held] * (1 + 3 * MAX_LOSSES)))
    assert not any(isinstance(step, ListMissing) for step in held)
    assert sum(isinstance(step, Wait) for step in held) == 3


def test_a_worker_that_waits_tries_each_of_few_shards_after_each_pause() -> None:
    """So a lease that expires is taken over at most `lease_seconds` / 2 later. The pauses grow, and differ."""
    done = followed(range(5), iter([Outcome.held] * 201))
    pauses = [step.seconds for step in done if isinstance(step, Wait)]
    assert len(pauses) == 40
    assert 0.5 <= pauses[0] <= 1.0
    assert max(pauses) <= LEASE_SECONDS / 2
    assert min(pauses[20:]) >= LEASE_SECONDS / 4
    assert len({*pauses}) == len(pauses)
    for before, (first, second) in enumerate(pairwise(pauses)):
        assert second <= 1.0 + 0.5 * sum(pauses[: before + 1]), (first, second)  # at worst half of what it has waited
    rounds, tried = [], []
    for step in done[1:]:
        if isinstance(step, Wait):
            rounds.append(sorted(tried))
            tried = []
        else:
            tried.append(step.index)
    assert rounds == [[0, 1, 2, 3, 4]] * 40


def test_a_worker_opens_few_files_to_know_its_work(
    teacher: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(teacher, data / "corpus.jsonl", tmp_path, records_per_shard=6)
    plan = plan_folder(config)
    assert make_plan(config, plan).num_shards == 10
    exact = worker.num_waiting_sequences(plan.sequences, range(10))
    assert exact > 0
    opened: list[Path] = []
    open_file = worker.open_sequence_file
    monkeypatch.setattr(worker, "MAX_FOOTERS", 4)
    monkeypatch.setattr(worker, "open_sequence_file", lambda path: opened.append(path) or open_file(path))
    assert worker.num_waiting_sequences(plan.sequences, range(10)) == pytest.approx(exact, rel=0.3)
    assert [path.stem for path in opened] == ["00000", "00003", "00006", "00009"]
    assert worker.num_waiting_sequences(plan.sequences, []) == 0


# ------------------------------------------------------------------------------------------ simulation


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """The requests of the code in the block, by kind."""
    found = Counter[str]()
    kinds = {"exists": "HEAD", "read_text": "GET", "write_text": "PUT", "unlink": "DELETE"}
    with monkeypatch.context() as patch:

        def count(owner: Any, name: str, kind: str) -> None:
            real = getattr(owner, name)

            def call(*arguments: Any, **named: Any) -> Any:
                found[kind] += 1
                return real(*arguments, **named)

            patch.setattr(owner, name, call)

        for name, kind in kinds.items():
            count(RemotePath, name, kind)
        count(object_store, "modified", "HEAD")
        yield found


def test_the_requests_of_the_simulation_are_those_of_a_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    place = open_location("fsspec+memory://bucket/claims/.00000.lease")
    with counted(monkeypatch) as free, hold_lease(place, lease_seconds=LEASE_SECONDS) as held:
        assert held
    assert free == Counter(["HEAD", "PUT", "GET", "GET", "DELETE"])
    with hold_lease(place, lease_seconds=LEASE_SECONDS):
        monkeypatch.setattr(leases, "has_ended", lambda process: False)
        with counted(monkeypatch) as busy, hold_lease(place, lease_seconds=LEASE_SECONDS) as held:
            assert not held
    assert busy == Counter(["HEAD", *CHECK_OF_A_LEASE])
    place.write_text("a worker that was killed")
    monkeypatch.setattr(leases, "age_seconds", lambda place: object_store.age_seconds(place) + LEASE_SECONDS)
    with counted(monkeypatch) as stale, hold_lease(place, lease_seconds=LEASE_SECONDS) as held:
        assert held
    assert stale == Counter(["HEAD", *CHECK_OF_A_LEASE, "PUT", "GET", "GET", "DELETE"])
    assert leases.RENEWALS_PER_LEASE == 4  # as the simulation counts them
    simulated = Store(Scale(num_shards=1), random.Random(0), [0.0])
    list(attempt(simulated, Worker(claims, 0.0), 0, look_first=True))
    assert simulated.requests - Counter(["GET", "GET"]) - Counter(["GET", *["HEAD"] * 3, *["PUT"] * 2]) == free


def check(result: Result) -> None:
    """Bounds that follow from the decisions."""
    store, scale = result.store, result.store.scale
    assert store.captures.keys() == set(range(scale.num_shards))
    # A shard is captured twice only if two workers ask for its lease within the time of one put. Claims come at the
    # rate workers / shard_seconds, each on one of the free shards, of which there are num_shards to 1: a harmonic sum.
    # To that come the takeovers, where the waiting workers try one lease, and the start, where all try shard 0.
    rate = scale.num_workers / scale.shard_seconds
    expected = 2 * rate * scale.request_seconds * (1 + sum(1 / free for free in range(1, scale.num_shards + 1)))
    expected += scale.killed_fraction * scale.num_workers + 1
    assert result.num_double <= expected + 4 * math.sqrt(expected)  # the number of rare events is Poisson's
    # No order of the shards is slower than this bound for lists of jobs (Graham): the last job begins before the ideal
    # end. A shard whose worker dies late begins again after its lease.
    longest = max(store.seconds)
    assert result.makespan < result.ideal + 2 * longest + 2 * scale.lease_seconds
    # tries in vain: a few of each worker before its lists are made again, and MAX_LOSSES after each pause
    num_pauses = 20 + 2 * longest / (scale.lease_seconds / 4)
    lost = store.outcomes[Outcome.held] + store.outcomes[Outcome.committed]
    assert lost < scale.num_workers * (MAX_LOSSES * num_pauses) + 3 * scale.num_shards
    assert max(store.taken_over_after, default=0.0) < scale.lease_seconds


def test_fifty_workers_capture_everything_with_few_requests() -> None:
    scale = Scale(num_workers=50, num_shards=1000, killed_fraction=0.1)
    now, before = simulate(scale), simulate(Scale(num_workers=50, num_shards=500, killed_fraction=0.1), old=True)
    check(now)
    assert now.store.taken_over_after  # workers died with a lease
    assert now.requests_per_shard < 0.5 * before.requests_per_shard  # renewals included, which did not change


@pytest.mark.slow(minutes=5)
def test_a_thousand_workers_and_a_hundred_thousand_shards() -> None:
    result = simulate(Scale())
    check(result)
    store = result.store
    assert result.num_double < 0.001 * store.scale.num_shards
    assert result.makespan < 1.1 * result.ideal
    lost = store.outcomes[Outcome.held] + store.outcomes[Outcome.committed]
    assert lost < 10 * store.scale.num_shards  # before: each worker tried each shard, 1,000 times
