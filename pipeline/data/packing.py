"""Segments -> packed windows -> padded micro-batches of inputs."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.core.types import UNKNOWN_TARGET, TokenSequence

OPEN_WINDOWS = 32  # windows that may still take a segment: packs tightly, and memory stays bounded


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """The tokens of one record (or of one window of a long text), and its targets."""

    record_id: int
    ids: tuple[int, ...]
    targets: tuple[tuple[int, int], ...]
    """(position s, token s+1), ascending in s."""
    depths: tuple[int, ...] = ()
    """Of each target the number of tokens of choices before it (see `TokenSequence`); empty: all 0."""


def with_completion(prompt: TokenSequence, completion_ids: Sequence[int]) -> Segment:
    """A prompt and the teacher's completion, which is supervised; its true targets are unknown."""
    first = len(prompt.input_ids_S) - 1
    return Segment(
        record_id=prompt.record_ids[0],
        ids=(*prompt.input_ids_S.tolist(), *completion_ids),
        targets=tuple((first + t, UNKNOWN_TARGET) for t in range(len(completion_ids))),
    )


def pack(parts: Iterable[Segment], *, window: int) -> Iterator[TokenSequence]:
    """First-fit packing: each segment goes into the oldest of a few open windows that has room for it.

    A segment without targets is a prompt still to be completed: it becomes a sequence alone.
    """
    open_windows: list[list[Segment]] = []
    rooms: list[int] = []  # tokens that still fit into each
    for segment in parts:
        if not segment.targets:
            yield make_sequence([segment])
            continue
        size = len(segment.ids)
        chosen = next((w for w, room in enumerate(rooms) if room >= size), len(rooms))
        if chosen == len(rooms):
            open_windows.append([])
            rooms.append(window)
        open_windows[chosen].append(segment)
        rooms[chosen] -= size
        if len(open_windows) > OPEN_WINDOWS:
            yield make_sequence(open_windows.pop(0))
            rooms.pop(0)
    yield from map(make_sequence, open_windows)


def make_sequence(parts: Sequence[Segment]) -> TokenSequence:
    """Segments laid end to end."""
    lengths = tuple(len(part.ids) for part in parts)
    starts = itertools.accumulate(lengths, initial=0)
    pairs = [(start + s, t) for start, part in zip(starts, parts, strict=False) for s, t in part.targets]
    ids = np.array([i for part in parts for i in part.ids], dtype=np.int64)
    positions = np.array([s for s, _ in pairs], dtype=np.int64)
    depths = [d for part in parts for d in part.depths or (0,) * len(part.targets)]
    return TokenSequence(
        key=sequence_key(ids, np.array(lengths, dtype=np.int64), positions),
        input_ids_S=torch.from_numpy(ids),
        segment_lengths=lengths,
        record_ids=tuple(part.record_id for part in parts),
        target_positions_N=torch.from_numpy(positions),
        target_ids_N=torch.from_numpy(np.array([t for _, t in pairs], dtype=np.int64)),
        depths_N=torch.tensor(depths) if any(depths) else None,
    )


def sequence_key(*arrays: np.ndarray) -> bytes:
    """16 bytes over int64 arrays; each is preceded by its length, so that none can run into the next."""
    digest = hashlib.blake2b(digest_size=16)
    for array in arrays:
        digest.update(len(array).to_bytes(8, "little") + array.astype("<i8").tobytes())
    return digest.digest()


def position_ids(segment_lengths: Sequence[int]) -> torch.Tensor:
    """0, 1, 2, ... restarting in every segment: [S] int64."""
    return torch.cat([torch.arange(length) for length in segment_lengths])


def collate_inputs(sequences: Sequence[TokenSequence]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pad at the right: input ids [B, S], position ids [B, S], supervised positions in the flattened B * S [N].

    Padding is one more segment: nothing attends to it and it is never supervised, whatever its token id.
    """
    longest = max(len(sequence.input_ids_S) for sequence in sequences)
    input_ids_BS = torch.zeros(len(sequences), longest, dtype=torch.int64)
    position_ids_BS = torch.zeros_like(input_ids_BS)
    for b, sequence in enumerate(sequences):
        length = len(sequence.input_ids_S)
        input_ids_BS[b, :length] = sequence.input_ids_S
        padding = (longest - length,) if length < longest else ()
        position_ids_BS[b] = position_ids((*sequence.segment_lengths, *padding))
    flat = [b * longest + sequence.target_positions_N for b, sequence in enumerate(sequences)]
    return input_ids_BS, position_ids_BS, torch.cat(flat)
