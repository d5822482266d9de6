"""Checks that a model fits this pipeline: its packed segments stay separate, and our logits equal its own."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from pipeline.core.types import InputError
from pipeline.models.forward import Model, hidden_states, logits


def check_architecture(model: Model) -> None:
    """InputError if packed segments attend to each other, or if our logits differ from the model's own."""
    was_training = model.training
    model.eval()
    check_logits_path(model)
    check_packing(model)
    model.train(was_training)


@torch.no_grad()
def check_logits_path(model: Model) -> None:
    """InputError if `logits(hidden_states(...))` differs from the model's own forward."""
    ids_BS = torch.arange(3, 11, device=model.device)[None] % model.config.vocab_size
    positions_BS = torch.arange(8, device=model.device)[None]
    model_logits_SV = model(input_ids=ids_BS, position_ids=positions_BS, use_cache=False).logits[0].float()
    hidden_BSH = hidden_states(model, ids_BS, positions_BS)
    our_logits_SV = logits(model, hidden_BSH[0], model_logits_SV.shape[1]).float()
    if not torch.allclose(our_logits_SV, model_logits_SV, rtol=2e-2, atol=2e-2):
        difference = (our_logits_SV - model_logits_SV).abs().max().item()
        raise InputError(
            f"{type(model).__name__}: expected head(hidden) to equal the model's own logits, found a difference of "
            f"{difference:.3g}; use another model, or add what this architecture does to its logits to `logits` in "
            "pipeline/models/forward.py"
        )


@torch.no_grad()
def check_packing(model: Model) -> None:
    """InputError if a packed segment attends to another one with this architecture and attention kernel.

    Two rows of three segments: the tokens of the middle one change, and the hidden states of the others must stay the
    same to the last bit. Models that do not mask by position ids (ALiBi, state spaces, position ids of their own) are
    rejected here instead of training wrongly.
    """
    positions_S = torch.tensor([0, 1, 2, 0, 1, 2, 3, 0, 1], device=model.device)
    ids_BS = (torch.arange(18, device=model.device).reshape(2, 9) * 7 + 3) % model.config.vocab_size
    changed_ids_BS = ids_BS.clone()
    changed_ids_BS[:, 3:7] = (changed_ids_BS[:, 3:7] + 11) % model.config.vocab_size
    before_BSH = hidden_states(model, ids_BS, positions_S.expand(2, -1))
    after_BSH = hidden_states(model, changed_ids_BS, positions_S.expand(2, -1))
    outside = torch.tensor([0, 1, 2, 7, 8], device=model.device)
    if not torch.equal(before_BSH[:, outside], after_BSH[:, outside]):
        raise InputError(
            f"{type(model).__name__}: expected packed segments not to attend to each other, found that they do "
            f"(attention {model.config._attn_implementation}); try attention=sdpa or eager, or another architecture"
        )


def max_positions(folder: Path) -> int | None:
    """The largest number of positions that a model's config allows, or None if it sets no limit."""
    if not (folder / "config.json").exists():
        raise InputError(f"{folder}: expected a model in Hugging Face layout, found no config.json; check the path")
    config = json.loads((folder / "config.json").read_text())
    return config.get("max_position_embeddings") or config.get("n_positions")


def check_window(folder: Path, window: int) -> None:
    """InputError if a window is longer than the model's config allows."""
    longest = max_positions(folder)
    if longest is not None and window > longest:
        raise InputError(
            f"window: expected at most {longest} (the positions of {folder}), found {window}; choose a smaller window"
        )
