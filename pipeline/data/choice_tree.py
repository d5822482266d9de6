"""Choices of several tokens as a tree: which positions are supervised so that each of its inner nodes is, once.

A node is a proper prefix of a choice's tokens, the empty prefix included: there the model chooses the next token. With
p(node) the product of the probabilities of its tokens, the divergence over choices as sequences is a sum over nodes
(the chain rule):

    KL(p || q) = sum over nodes of  p(node) KL( p(.|node) || q(.|node) )
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from pipeline.core.types import UNKNOWN_TARGET, InputError
from pipeline.data.packing import Segment


def check_no_choice_begins_another(choice_ids: Sequence[Sequence[int]]) -> None:
    """Refuse choices of which one begins another: the shorter one would always be at least as likely."""
    for shorter, longer in itertools.permutations(choice_ids, 2):
        if list(longer[: len(shorter)]) == list(shorter):
            raise InputError("expected choices of which none begins another, found such; set end_token=true")


def choice_segments(
    prompt_ids: Sequence[int], choice_ids: Sequence[Sequence[int]], *, answer: int | None, record_id: int
) -> Iterator[Segment]:
    """The prompt with each node that begins no other node; a node is supervised in the first segment that contains it.

    Choices [1 2], [1 3] and [4 5 6] after the prompt [8 9]: the nodes are [], [1], [4] and [4 5], and the segments are
    [8 9 1], supervised after 9 and 1, and [8 9 4 5], supervised after 4 and 5. The target is the answer's next token
    where the answer passes through the node, and unknown elsewhere.
    """
    check_no_choice_begins_another(choice_ids)
    answer_ids = () if answer is None else tuple(choice_ids[answer])
    longest = dict.fromkeys(tuple(ids[:-1]) for ids in choice_ids)  # each once, in the order of the choices
    seen: set[tuple[int, ...]] = set()
    for path in longest:
        if any(other != path and other[: len(path)] == path for other in longest):
            continue  # it lies on the path of another segment
        depths = [depth for depth in range(len(path) + 1) if path[:depth] not in seen]
        seen.update(path[:depth] for depth in depths)
        targets = [
            answer_ids[depth] if depth < len(answer_ids) and answer_ids[:depth] == path[:depth] else UNKNOWN_TARGET
            for depth in depths
        ]
        first = len(prompt_ids) - 1
        yield Segment(
            record_id=record_id,
            ids=(*prompt_ids, *path),
            targets=tuple((first + depth, target) for depth, target in zip(depths, targets, strict=True)),
            depths=tuple(depths),
        )
