"""A model says what follows prompts of different lengths: it reads them, then a token at a time, with a KV cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.models.forward import Model, logits

MAX_BATCH = 512  # completed together: bounds the [B, V] matrix of their next tokens


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DecodingState:
    """Texts that a model has read, one a row, and where it stands in them."""

    hidden_BH: Tensor
    """Last hidden state of each: it speaks about the next token."""
    cache: Any
    """Keys and values of what was read."""
    mask_BS: Tensor
    """1 where a token was read, 0 on the padding at the left."""
    lengths_B: Tensor


def prefill(model: Model, prompts: Sequence[Tensor]) -> DecodingState:
    """Read texts of different lengths, padded at the left, and keep what is needed to read on."""
    lengths_B = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    longest = int(lengths_B.max())
    input_ids_BS = torch.zeros(len(prompts), longest, dtype=torch.int64)
    for b, prompt in enumerate(prompts):
        input_ids_BS[b, longest - len(prompt) :] = prompt
    mask_BS = (torch.arange(longest, device=model.device) >= longest - lengths_B[:, None]).long()
    position_ids_BS = (mask_BS.cumsum(dim=1) - 1).clamp(min=0)
    read = model.get_decoder()(
        input_ids=input_ids_BS.to(model.device), attention_mask=mask_BS, position_ids=position_ids_BS, use_cache=True
    )
    return DecodingState(
        hidden_BH=read.last_hidden_state[:, -1], cache=read.past_key_values, mask_BS=mask_BS, lengths_B=lengths_B
    )


def decode_step(model: Model, reading: DecodingState, next_B: Tensor) -> DecodingState:
    """Read one more token of each text."""
    mask_BS = torch.cat([reading.mask_BS, torch.ones_like(reading.mask_BS[:, :1])], dim=1)
    read = model.get_decoder()(
        input_ids=next_B[:, None],
        attention_mask=mask_BS,
        position_ids=reading.lengths_B[:, None],
        past_key_values=reading.cache,
        use_cache=True,
    )
    return DecodingState(
        hidden_BH=read.last_hidden_state[:, -1],
        cache=read.past_key_values,
        mask_BS=mask_BS,
        lengths_B=reading.lengths_B + 1,
    )


def generate(
    model: Model,
    prompts: Sequence[Tensor],
    choose: Callable[[int, Tensor], Tensor],
    *,
    room: Sequence[int],
    ends: Sequence[Container[int]],
    vocabulary_size: int,
) -> list[list[int]]:
    """What a model says after each prompt: up to one of its `ends`, which is said too, or as long as there is `room`.

    `choose(t, logits_BV)` names the token at step t of each, also of those that are at their end already.
    """
    said: list[list[int]] = [[] for _ in prompts]
    speaking = set(range(len(prompts)))
    state = prefill(model, prompts)
    for t in range(max(room)):
        next_B = choose(t, logits(model, state.hidden_BH, vocabulary_size))
        for b, token in enumerate(next_B.tolist()):
            if b in speaking:
                said[b].append(token)
                if token in ends[b] or len(said[b]) == room[b]:
                    speaking.remove(b)
        if not speaking:
            break
        state = decode_step(model, state, next_B)
    return said


def batches_of_like_length(lengths: Sequence[int], *, batch_tokens: int, max_new_tokens: int) -> Iterator[list[int]]:
    """Texts to be completed together: the longest first, so many that their KV caches hold `batch_tokens` at most."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        size = min(max(batch_tokens // (lengths[order[0]] + max_new_tokens), 1), MAX_BATCH)
        yield order[:size]
        order = order[size:]
