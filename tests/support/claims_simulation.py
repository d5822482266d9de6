"""Workers that claim shards in an object store, simulated: the real decisions, a store that counts requests, no model.

    python tests/support/claims_simulation.py

prints the table of docs/scale.md. A worker is a generator of pauses in seconds; a queue of events resumes each one when
its pause is over. The requests of a try are those of pipeline/cache/leases.py and manifest.py, which
tests/capture/test_claims.py compares with the real ones.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.capture.claims import Decisions, ListMissing, Outcome, Try, Wait, claims

NAMES_PER_PAGE = 1000  # of a listing; a committed shard has two names
RENEWALS_PER_LEASE = 4
CHECK_OF_A_LEASE = ("GET", "PUT", "HEAD", "HEAD", "DELETE")  # what it holds, and its age
COMMIT = ("GET", "HEAD", "PUT", "HEAD", "HEAD", "PUT")  # manifest, ShardInfo?, shard, its size, ShardInfo?, ShardInfo
SNAPSHOT_SECONDS = 60.0  # a listing is at most so old; it saves memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """What is simulated."""

    num_workers: int = 1000
    num_shards: int = 100_000
    shard_seconds: float = 600.0
    """The mean; log-normal, with a standard deviation of the logarithm of 0.4."""
    lease_seconds: float = 60.0
    request_seconds: float = 0.05
    """The mean; exponential."""
    start_seconds: float = 60.0
    """The workers start evenly within this time."""
    killed_fraction: float = 0.01
    """Of the workers, at random times; every second one starts again after five minutes."""
    seed: int = 0


@dataclass(slots=True)
class Worker:
    decisions: Callable[..., Decisions]
    starts_at: float
    dies_at: float = math.inf


@dataclass(slots=True)
class Lease:
    worker: Worker
    since: float


@dataclass(slots=True)
class Store:
    """An object store and its clock."""

    scale: Scale
    random: random.Random
    seconds: list[float]
    """Of capturing each shard."""
    now: float = 0.0
    requests: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[Outcome] = field(default_factory=Counter)
    leases: dict[int, Lease] = field(default_factory=dict)
    captures: Counter[int] = field(default_factory=Counter)
    """How often each shard was captured to its end."""
    taken_over_after: list[float] = field(default_factory=list)
    """Seconds until a dead worker's lease was taken, since it expired and workers without other work were waiting."""
    waiting_since: float = math.inf
    """When a worker first waited because others held all that was left."""
    snapshot: tuple[float, Sequence[int]] = (-math.inf, ())

    def request(self, *kinds: str) -> float:
        """Count some requests, one after another; the seconds they take."""
        self.requests.update(kinds)
        return len(kinds) * self.random.expovariate(1 / self.scale.request_seconds)

    def expired_at(self, lease: Lease) -> float:
        """When a lease goes stale: never, while its holder lives and renews it."""
        every = self.scale.lease_seconds / RENEWALS_PER_LEASE
        renewals = (lease.worker.dies_at - lease.since) // every if math.isfinite(lease.worker.dies_at) else math.inf
        return lease.since + renewals * every + self.scale.lease_seconds

    def missing(self) -> Sequence[int]:
        if self.now > self.snapshot[0] + SNAPSHOT_SECONDS:
            self.snapshot = self.now, [i for i in range(self.scale.num_shards) if i not in self.captures]
        return self.snapshot[1]


def live(store: Store, worker: Worker, *, look_first: bool) -> Generator[float, None, None]:
    """A worker from its start to its end: as `follow` in pipeline/capture/claims.py, with requests that take time."""
    answer: Any = store.missing()
    decisions = worker.decisions(answer, seed=store.random.getrandbits(64), lease_seconds=store.scale.lease_seconds)
    yield list_seconds(store)
    answer = None
    while True:
        try:
            decision = decisions.send(answer)
        except StopIteration:
            return
        match decision:
            case Try(index):
                answer = yield from attempt(store, worker, index, look_first=look_first)
                store.outcomes[answer] += 1
            case ListMissing():
                yield list_seconds(store)
                answer = store.missing()
            case Wait(seconds):
                if len(store.captures) + len(store.leases) >= store.scale.num_shards:
                    store.waiting_since = min(store.waiting_since, store.now)
                yield seconds
                answer = None


def list_seconds(store: Store) -> float:
    pages = 1 + (2 * len(store.captures) + len(store.leases)) // NAMES_PER_PAGE
    store.requests["LIST"] += pages
    return pages * store.scale.request_seconds


def attempt(store: Store, worker: Worker, index: int, *, look_first: bool) -> Generator[float, None, Outcome]:
    """`capture` of pipeline/capture/worker.py."""
    if look_first:
        yield store.request("GET")
        if index in store.captures:
            return Outcome.committed
    yield store.request("HEAD")
    lease = store.leases.get(index)
    if lease is not None:
        yield store.request(*CHECK_OF_A_LEASE)
        expired = store.expired_at(lease)
        if store.leases.get(index) is not lease or expired > store.now:
            return Outcome.held
        store.taken_over_after.append(max(store.now - max(expired, store.waiting_since), 0.0))
    yield store.request("PUT")
    store.leases[index] = Lease(worker, store.now)
    yield store.request("GET")
    if index not in store.leases or store.leases[index].worker is not worker:
        if lease is None:
            yield store.request(*CHECK_OF_A_LEASE)
        return Outcome.held
    yield store.request("GET")
    outcome = Outcome.committed
    if index not in store.captures:
        outcome = Outcome.captured
        seconds = store.seconds[index]
        renewals = int(seconds * RENEWALS_PER_LEASE / store.scale.lease_seconds)
        store.requests.update({"GET": renewals, "PUT": renewals})
        yield seconds
        yield store.request(*COMMIT)
        store.captures[index] += 1
    yield store.request("GET", "DELETE")
    if index in store.leases and store.leases[index].worker is worker:
        del store.leases[index]
    return outcome


def old_claims(missing: Sequence[int], *, seed: int, lease_seconds: float) -> Decisions:
    """The decisions before: every worker by index, and every second all that is missing again."""
    while missing:
        for index in missing:
            yield Try(index)
        missing = yield ListMissing(missing)
        if missing:
            yield Wait(min(1.0, lease_seconds / 4), missing)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    store: Store
    makespan: float
    ideal: float
    """The seconds that the work takes if all workers share it evenly while they live."""

    @property
    def requests_per_shard(self) -> float:
        return self.store.requests.total() / self.store.scale.num_shards

    @property
    def num_double(self) -> int:
        """Captures of shards that were captured before."""
        return self.store.captures.total() - len(self.store.captures)


def simulate(scale: Scale, *, old: bool = False) -> Result:
    """Run all workers until the last one has ended."""
    generator = random.Random(scale.seed)
    mean = math.log(scale.shard_seconds) - 0.4**2 / 2
    store = Store(scale, generator, [generator.lognormvariate(mean, 0.4) for _ in range(scale.num_shards)])
    decisions = old_claims if old else claims
    expected = sum(store.seconds) / scale.num_workers
    workers = [Worker(decisions, generator.uniform(0, scale.start_seconds)) for _ in range(scale.num_workers)]
    killed = generator.sample(workers, round(scale.killed_fraction * scale.num_workers))
    for number, worker in enumerate(killed):
        worker.dies_at = generator.uniform(worker.starts_at, expected)
        if number % 2:
            workers.append(Worker(decisions, worker.dies_at + 300.0))
    number = itertools.count()
    queue = [(worker.starts_at, next(number), worker, live(store, worker, look_first=not old)) for worker in workers]
    heapq.heapify(queue)
    while queue:
        store.now, _, worker, life = heapq.heappop(queue)
        if store.now < worker.dies_at and (pause := next(life, None)) is not None:
            heapq.heappush(queue, (store.now + pause, next(number), worker, life))
    return Result(store=store, makespan=store.now, ideal=ideal_seconds(workers, sum(store.seconds)))


def ideal_seconds(workers: Sequence[Worker], work: float) -> float:
    """When the workers, each alive from its start to its death, have had the time for the work."""
    low, high = 0.0, work + max(worker.starts_at for worker in workers)
    for _ in range(60):
        middle = (low + high) / 2
        done = sum(max(min(middle, worker.dies_at) - worker.starts_at, 0.0) for worker in workers)
        low, high = (low, middle) if done >= work else (middle, high)
    return high


def row(result: Result, name: str) -> str:
    """A line of the table."""
    store, scale = result.store, result.store.scale
    per_shard = {kind: count / scale.num_shards for kind, count in store.requests.items()}
    renewals = sum(int(seconds * RENEWALS_PER_LEASE / scale.lease_seconds) for seconds in store.seconds)
    cells = [
        *(name, f"{scale.num_workers:,}", f"{scale.num_shards:,}", f"{result.requests_per_shard:,.0f}"),
        f"{2 * renewals / scale.num_shards:,.0f}",
        ", ".join(f"{kind} {per_shard[kind]:,.1f}" for kind in ("GET", "HEAD", "PUT", "DELETE", "LIST")),
        f"{store.outcomes[Outcome.held] / scale.num_shards:,.2f}",
        f"{store.outcomes[Outcome.committed] / scale.num_shards:,.2f}",
        *(f"{result.num_double}", f"{100 * (result.makespan / result.ideal - 1):.1f} %"),
        f"{max(store.taken_over_after, default=0):,.0f} s",
    ]
    return " | ".join(cells)


if __name__ == "__main__":
    import time

    small = Scale(num_workers=50, num_shards=500)
    for size, is_old in ((small, True), (small, False), (Scale(num_shards=10_000), False), (Scale(), False)):
        started = time.monotonic()
        print(row(simulate(size, old=is_old), "before" if is_old else "now"), flush=True)
        print(f"  simulated in {time.monotonic() - started:.0f} s", flush=True)
