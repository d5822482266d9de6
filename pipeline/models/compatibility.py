"""Whether a model fits this pipeline: packed segments kept apart, logits as its own forward makes them."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from pipeline.core.types import InputError
from pipeline.models.forward import Model, hidden_states, logits


def check_architecture(model: Model) -> None:
    """Refuse a model in which packed segments see each other or whose logits we do not know to make."""
    was_training = model.training
    model.eval()
    check_logits_path(model)
    check_packing(model)
    model.train(was_training)


@torch.no_grad()
def check_logits_path(model: Model) -> None:
    """Refuse an architecture whose own forward does something between hidden states and logits that we do not."""
    ids_BS = torch.arange(3, 11, device=model.device)[None] % model.config.vocab_size
    positions_BS = torch.arange(8, device=model.device)[None]
    theirs = model(input_ids=ids_BS, position_ids=positions_BS, use_cache=False).logits[0].float()
    hidden_BSH = hidden_states(model, ids_BS, positions_BS)
    ours = logits(model, hidden_BSH[0], theirs.shape[1]).float()
    if not torch.allclose(ours, theirs, rtol=2e-2, atol=2e-2):
        worst = (ours - theirs).abs().max().item()
        raise InputError(
            f"{type(model).__name__}: expected head(hidden) to equal the model's own logits, found a difference of "
            f"{worst:.3g}; teach pipeline/models/forward.py what this architecture does to its logits"
        )


@torch.no_grad()
def check_packing(model: Model) -> None:
    """Refuse an architecture (or attention kernel) in which one packed segment sees another.

    Two rows of three segments; the middle one changes, and the others must not, to the last bit. Models that do not
    mask by position ids (ALiBi, state spaces, positions of their own) fail here instead of training wrongly.
    """
    positions_S = torch.tensor([0, 1, 2, 0, 1, 2, 3, 0, 1], device=model.device)
    first_BS = (torch.arange(18, device=model.device).reshape(2, 9) * 7 + 3) % model.config.vocab_size
    second_BS = first_BS.clone()
    second_BS[:, 3:7] = (second_BS[:, 3:7] + 11) % model.config.vocab_size
    one, other = (hidden_states(model, ids_BS, positions_S.expand(2, -1)) for ids_BS in (first_BS, second_BS))
    outside = torch.tensor([0, 1, 2, 7, 8], device=model.device)
    if not torch.equal(one[:, outside], other[:, outside]):
        raise InputError(
            f"{type(model).__name__}: expected packed segments not to see each other, found that they do "
            f"(attention {model.config._attn_implementation}); try attention=sdpa or eager, or another architecture"
        )


def max_positions(folder: Path) -> int | None:
    """The positions that a model knows, or None if it does not say."""
    if not (folder / "config.json").exists():
        raise InputError(f"{folder}: expected a model in Hugging Face layout, found no config.json; check the path")
    config = json.loads((folder / "config.json").read_text())
    return config.get("max_position_embeddings") or config.get("n_positions")


def check_window(folder: Path, window: int) -> None:
    """Refuse a window longer than the positions that a model knows."""
    longest = max_positions(folder)
    if longest is not None and window > longest:
        raise InputError(f"window: expected at most {longest} (the positions of {folder}), found {window}")
