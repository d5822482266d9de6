"""Checks that a model fits this pipeline: its packed segments stay separate, and our logits equal its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.core.progress import log
from pipeline.core.types import InputError
from pipeline.models.forward import Model, hidden_states, logits
from pipeline.models.model_files import read_model_config

NOISE_MULTIPLE = 4.0  # a difference may be up to this multiple of the one that an unrelated row makes
ROUNDING = 1e-3  # and this fraction of the effect of an earlier token of the same segment
PLACE = 0.1  # and of a segment at another place: measured are up to 2e-6 where positions are right, and 2 where not


def check_architecture(model: Model) -> None:
    """InputError if packed segments attend to each other, or if our logits differ from the model's own."""
    was_training = model.training
    model.eval()
    try:
        check_logits_path(model)
        check_packing(model)
    finally:
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
    """InputError if a packed segment attends to another one, with this architecture, attention kernel and its layout.

    Two rows of three segments: the tokens of the middle one change, and the hidden states of the others must stay the
    same. So must those of a segment that moves to another place: its positions count from its own beginning. Models
    that do not follow position ids (ALiBi, state spaces, positions of their own) are rejected here instead of training
    wrongly. Dense models stay the same to the last bit. A mixture of experts groups the tokens of a batch, so its last
    bits change with any other token: with those of a row that is changed whole, too, which nothing attends to.
    """
    positions_BS = torch.tensor([0, 1, 2, 0, 1, 2, 3, 0, 1]).expand(2, -1)
    ids_BS = (torch.arange(18, device=model.device).reshape(2, 9) * 7 + 3) % model.config.vocab_size
    before_BSH = hidden_states(model, ids_BS, positions_BS)

    def change(rows: slice, tokens: slice, shift: int = 11) -> Tensor:
        """How far each hidden state [B, S] moves if some tokens change."""
        changed_ids_BS = ids_BS.clone()
        changed_ids_BS[rows, tokens] = (changed_ids_BS[rows, tokens] + shift) % model.config.vocab_size
        return (hidden_states(model, changed_ids_BS, positions_BS) - before_BSH).abs().amax(dim=2).float()

    moved_BS = change(slice(0, 2), slice(3, 7))
    leak = torch.cat([moved_BS[:, :3], moved_BS[:, 7:]], dim=1).max().item()  # NaN, if any is: never accepted
    rolled_BSH = hidden_states(model, ids_BS.roll(2, dims=1), positions_BS.roll(2, dims=1))  # the last segment first
    place = (rolled_BSH - before_BSH.roll(2, dims=1)).abs().max().item()
    if leak == 0 == place:
        return
    noise = max(change(slice(1, 2), slice(0, 9), shift)[0].max().item() for shift in (5, 11, 17))
    effect = change(slice(0, 2), slice(3, 4))[:, 4:7].max().item()  # of a token on the later ones of its segment
    if not (leak == 0 or leak <= NOISE_MULTIPLE * noise + effect * ROUNDING):
        raise InputError(
            f"{type(model).__name__}: expected packed segments not to attend to each other, found that they do "
            f"(attention {model.config._attn_implementation}): another segment moves a hidden state by {leak:.2g}, an "
            f"earlier token of its own by {effect:.2g}; try attention=sdpa or eager, or another architecture"
        )
    if not place <= NOISE_MULTIPLE * noise + effect * PLACE:
        raise InputError(
            f"{type(model).__name__}: expected a segment to be the same at any place of its row, found that a hidden "
            f"state moves by {place:.2g} with it (attention {model.config._attn_implementation}), by {effect:.2g} with "
            "an earlier token of its own; use an architecture that follows position ids"
        )
    if leak > 0:
        log.info(
            "%s: other tokens of a batch change a hidden state by up to %.2g (rounding), earlier ones of its text by "
            "%.2g",
            *(type(model).__name__, max(leak, noise), effect),
        )


def max_positions(folder: Path) -> int | None:
    """The largest number of positions that a model can be used with, or None if its config sets no limit."""
    config = read_model_config(folder)
    limits = [config.get("max_position_embeddings") or config.get("n_positions"), *_rope_limits(config).values()]
    return min((limit for limit in limits if limit is not None), default=None)


def check_window(folder: Path, window: int) -> None:
    """InputError if a window is longer than the model can be used with."""
    longest = max_positions(folder)
    if longest is None or window <= longest:
        return
    ropes = [rope_type for rope_type, limit in _rope_limits(read_model_config(folder)).items() if limit == longest]
    why = (
        f"; beyond them, with RoPE of type {ropes[0]}, a text changes with the longest one in its batch"
        if ropes
        else ""
    )
    raise InputError(
        f"window: expected at most {longest} (the positions of {folder}{why}), found {window}; choose a smaller window"
    )


def _rope_limits(config: dict[str, Any]) -> dict[str, int]:
    """Types of RoPE whose frequencies follow the longest sequence of a batch -> the positions up to which they do not.

    transformers 5 writes `rope_parameters`, for some models one per type of layer; before it was `rope_scaling`, with
    `type` for `rope_type`.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    limits: dict[str, int] = {}
    for parameters in [rope, *(inner for inner in rope.values() if isinstance(inner, dict))]:
        rope_type = str(parameters.get("rope_type") or parameters.get("type"))
        trained = config.get("max_position_embeddings")
        if rope_type in (
            "longrope",
            "su",
        ):  # Phi-3 called it su at first; its length stands beside the RoPE's parameters
            original = "original_max_position_embeddings"
            trained = config.get(original) or parameters.get(original) or trained
        elif "dynamic" not in rope_type:
            continue
        if trained is not None:
            limits[rope_type] = min(trained, limits.get(rope_type, trained))
    return limits
