"""Batched generation for prompts of different lengths, with a KV cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.models.forward import Model, logits

MAX_BATCH = 512  # prompts completed together: bounds the memory of their [B, V] logits


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DecodingState:
    """What is needed to continue B texts of different lengths, padded at the left, by one more token each."""

    hidden_BH: Tensor
    """The last hidden state of each text: it predicts the next token."""
    cache: Any
    """transformers' KV cache of the tokens so far."""
    mask_BS: Tensor
    """The attention mask: 1 on tokens, 0 on the padding at the left."""
    lengths_B: Tensor
    """Tokens of each text, without padding."""


def prefill(model: Model, prompts: Sequence[Tensor]) -> DecodingState:
    """Run the model over prompts of different lengths, padded at the left, and fill the KV cache."""
    lengths_B = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    longest = int(lengths_B.max())
    input_ids_BS = torch.zeros(len(prompts), longest, dtype=torch.int64)
    for b, prompt in enumerate(prompts):
        input_ids_BS[b, longest - len(prompt) :] = prompt
    mask_BS = (torch.arange(longest, device=model.device) >= longest - lengths_B[:, None]).long()
    position_ids_BS = (mask_BS.cumsum(dim=1) - 1).clamp(min=0)
    output = model.get_decoder()(
        input_ids=input_ids_BS.to(model.device), attention_mask=mask_BS, position_ids=position_ids_BS, use_cache=True
    )
    return DecodingState(
        hidden_BH=output.last_hidden_state[:, -1], cache=output.past_key_values, mask_BS=mask_BS, lengths_B=lengths_B
    )


def decode_step(model: Model, state: DecodingState, next_ids_B: Tensor) -> DecodingState:
    """Append one token to each text."""
    mask_BS = torch.cat([state.mask_BS, torch.ones_like(state.mask_BS[:, :1])], dim=1)
    output = model.get_decoder()(
        input_ids=next_ids_B[:, None],
        attention_mask=mask_BS,
        position_ids=state.lengths_B[:, None],
        past_key_values=state.cache,
        use_cache=True,
    )
    return DecodingState(
        hidden_BH=output.last_hidden_state[:, -1],
        cache=output.past_key_values,
        mask_BS=mask_BS,
        lengths_B=state.lengths_B + 1,
    )


def generate(
    model: Model,
    prompts: Sequence[Tensor],
    choose: Callable[[int, Tensor], Tensor],
    *,
    max_new_tokens: Sequence[int],
    end_ids: Sequence[Container[int]],
    vocabulary_size: int,
    goes_on: Callable[[bool], bool] = bool,
) -> list[list[int]]:
    """Complete prompts together: the generated ids of each.

    A completion ends with the first token of the prompt's `end_ids`, which is included, or after its `max_new_tokens`.
    `choose(t, logits_BV)` returns the B tokens of step t. Completions that have ended stay in the batch until all have:
    `choose` is called with their logits too, and their further tokens are dropped. `goes_on` is asked after each token
    with whether a completion is unfinished here: ranks that have to make the same forwards go on while one of them is.
    """
    generated_ids: list[list[int]] = [[] for _ in prompts]
    unfinished = set(range(len(prompts)))
    state = prefill(model, prompts)
    for t in range(max(max_new_tokens)):
        next_ids_B = choose(t, logits(model, state.hidden_BH, vocabulary_size))
        for b, token in enumerate(next_ids_B.tolist()):
            if b in unfinished:
                generated_ids[b].append(token)
                if token in end_ids[b] or len(generated_ids[b]) == max_new_tokens[b]:
                    unfinished.remove(b)
        if not goes_on(bool(unfinished)):
            break
        state = decode_step(model, state, next_ids_B)
    return generated_ids


def batches_by_length(lengths: Sequence[int], *, batch_tokens: int, max_new_tokens: int) -> Iterator[list[int]]:
    """Indices of prompts to complete together: the longest first, at most `batch_tokens` tokens in the KV cache."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        size = min(max(batch_tokens // (lengths[order[0]] + max_new_tokens), 1), MAX_BATCH)
        yield order[:size]
        order = order[size:]
