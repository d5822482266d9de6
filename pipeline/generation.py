"""A model reads texts of its own making: prompts of different lengths, then a token at a time, with a KV cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.models import Model


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reading:
    """Texts that a model has read, one a row, and where it stands in them."""

    hidden_BH: Tensor
    """Last hidden state of each: it speaks about the next token."""
    cache: Any
    """Keys and values of what was read."""
    mask_BS: Tensor
    """1 where a token was read, 0 on the padding at the left."""
    lengths_B: Tensor


def read_prompts(model: Model, prompts: Sequence[Tensor]) -> Reading:
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
    return Reading(
        hidden_BH=read.last_hidden_state[:, -1], cache=read.past_key_values, mask_BS=mask_BS, lengths_B=lengths_B
    )


def read_next(model: Model, reading: Reading, next_B: Tensor) -> Reading:
    """Read one more token of each text."""
    mask_BS = torch.cat([reading.mask_BS, torch.ones_like(reading.mask_BS[:, :1])], dim=1)
    read = model.get_decoder()(
        input_ids=next_B[:, None],
        attention_mask=mask_BS,
        position_ids=reading.lengths_B[:, None],
        past_key_values=reading.cache,
        use_cache=True,
    )
    return Reading(
        hidden_BH=read.last_hidden_state[:, -1],
        cache=read.past_key_values,
        mask_BS=mask_BS,
        lengths_B=reading.lengths_B + 1,
    )
