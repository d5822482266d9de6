"""Which shard a worker tries next, and when it waits: the decisions alone, without any request.

No process coordinates the workers. One that has met no other goes by index. From the first shard that another one holds
or has captured, it goes round in an order of its own, so that a thousand workers seldom try the same shard. How many
requests this takes, and what it replaced: docs/scale.md.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

MAX_LOSSES = 8  # shards tried in vain, after which a worker lists what is missing, or waits
PAUSE_GROWTH = 1.25  # a worker that has waited for t seconds oversleeps the end by about a quarter of t at most
FIRST_PAUSE_SECONDS = 1.0

Outcome = Enum("Outcome", ["captured", "committed", "held"])
"""What became of a try: this worker captured the shard; another one had committed it; another one holds it."""


@dataclass(frozen=True, slots=True)
class Try:
    """Take the lease of a shard and capture it. The answer is an Outcome."""

    index: int


@dataclass(frozen=True, slots=True)
class ListMissing:
    """Find which shards are not committed. The answer is those of `known` that are not."""

    known: Sequence[int]


@dataclass(frozen=True, slots=True)
class Wait:
    """Others hold what was tried. The answer is nothing."""

    seconds: float
    missing: Sequence[int]


Decisions = Generator[Try | ListMissing | Wait, Any, None]


def claims(missing: Sequence[int], *, seed: int, lease_seconds: float) -> Decisions:
    """The decisions of one worker until every shard of `missing` is committed; each `send` answers the last one.

    Two workers need different seeds. A listing costs many requests in a large cache, a try of a committed shard one:
    so the list is made again only when it has become wrong more often than shards were held.
    """
    generator = random.Random(seed)
    first_pause, longest_pause = min(FIRST_PAUSE_SECONDS, lease_seconds / 4), lease_seconds / 2
    met_another, pause = False, first_pause
    while missing:
        outcomes, over = Counter[Outcome](), set[int]()
        order, max_losses = (claim_order(missing, generator), MAX_LOSSES) if met_another else (iter(missing), 1)
        for index in order:
            outcome = yield Try(index)
            outcomes[outcome] += 1
            if outcome is not Outcome.held:
                over.add(index)
            if outcomes[Outcome.committed] + outcomes[Outcome.held] == max_losses:
                break
        if outcomes[Outcome.captured]:
            pause = first_pause
        if len(missing) - len(over) > MAX_LOSSES and outcomes[Outcome.committed] > outcomes[Outcome.held]:
            met_another, missing = True, (yield ListMissing(missing))
            continue
        missing = [index for index in missing if index not in over]
        if missing and met_another and not outcomes[Outcome.captured]:
            yield Wait(pause * generator.uniform(0.5, 1.0), missing)
            pause = min(pause * PAUSE_GROWTH, longest_pause)
        met_another = True  # or nothing is left


def claim_order(missing: Sequence[int], generator: random.Random) -> Iterator[int]:
    """Each shard once, from a random start and with a random stride, as in double hashing.

    Of 10 shards, start 4 and stride 3 give the places 4, 7, 0, 3, 6, 9, 2, 5, 8, 1. A stride that shares no divisor
    with the number reaches every place. Neighbours are not tried in turn, so workers do not queue up behind others.
    """
    count = len(missing)
    start, stride = generator.randrange(count), generator.randrange(count) or 1
    while math.gcd(stride, count) != 1:
        stride = generator.randrange(1, count)
    return (missing[(start + place * stride) % count] for place in range(count))


def follow(
    decisions: Decisions,
    *,
    capture: Callable[[int], Outcome],
    list_missing: Callable[[Sequence[int]], Sequence[int]],
    wait: Callable[[float, Sequence[int]], None],
) -> None:
    """Carry the decisions out, one after another, until there is none left."""
    answer: Any = None
    while True:
        try:
            decision = decisions.send(answer)
        except StopIteration:
            return
        match decision:
            case Try(index):
                answer = capture(index)
            case ListMissing(known):
                answer = list_missing(known)
            case Wait(seconds, missing):
                wait(seconds, missing)
                answer = None
