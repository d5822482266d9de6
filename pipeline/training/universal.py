"""A checkpoint in DeepSpeed's universal form, loaded by other ranks or at another ZeRO stage than saved it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.core.files import RunPaths
from pipeline.training.checkpoints import Published, universal
from pipeline.training.engine import deepspeed, set_step_count


@torch.no_grad()
def load_universal(engine: deepspeed.DeepSpeedEngine, paths: RunPaths, checkpoint: Published) -> None:
    """Load weights and AdamW's state from DeepSpeed's universal form, a folder a parameter, one after another.

    DeepSpeed's own `load_universal` expects the file names of the stage that saved, and gives every parameter group
    the first one's weight decay. The form has no loss scale: in float16 that of the checkpoint is used.
    """
    folder = universal(paths, checkpoint) / "zero"
    _allocate_moments(engine)
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        files = {key: folder / name / f"{key}.pt" for key in ("fp32", "exp_avg", "exp_avg_sq")}
        loaded = {key: torch.load(file, map_location="cpu", weights_only=True) for key, file in files.items()}
        # from ZeRO-3 a flat tensor, from the other stages one in a dict
        _put(parameter, {key: value["param"] if isinstance(value, dict) else value for key, value in loaded.items()})
    if engine.fp16_enabled() and checkpoint.loss_scale is not None:
        engine.optimizer.loss_scale = checkpoint.loss_scale
    engine.skipped_steps = checkpoint.skipped_steps
    set_step_count(engine, checkpoint.step - checkpoint.skipped_steps)


def _allocate_moments(engine: deepspeed.DeepSpeedEngine) -> None:
    """Allocate the state that DeepSpeed would allocate in AdamW's first step."""
    zero = engine.optimizer
    in_parts = engine.zero_optimization_partition_weights()
    flats = zero.fp32_partitioned_groups_flat if in_parts else [g["params"][0] for g in zero.optimizer.param_groups]
    for flat in flats:
        if not (state := zero.optimizer.state[flat]):
            state.update({key: torch.zeros_like(flat) for key in ("exp_avg", "exp_avg_sq")}, step=torch.zeros(()))
    if not in_parts:
        zero._lazy_init_hp_params_optimizer_state()


def _put(parameter: Any, values: dict[str, Tensor]) -> None:
    if not hasattr(parameter, "ds_id"):
        parameter.copy_(values["fp32"].view_as(parameter))
        deepspeed.utils.safe_set_full_fp32_param(parameter, values["fp32"])
        for key in ("exp_avg", "exp_avg_sq"):
            deepspeed.utils.safe_set_full_optimizer_state(parameter, values[key], key)
        return
    part = parameter.ds_tensor.ds_numel  # ZeRO-3 pads the last rank's
    ranks = torch.distributed.get_world_size()
    mine = {}
    for key, value in values.items():
        padded = functional.pad(value.flatten(), (0, part * ranks - value.numel()))
        mine[key] = padded[part * torch.distributed.get_rank() :][:part]
    parameter.ds_tensor.copy_(mine["fp32"])
    deepspeed.utils.safe_set_local_fp32_param(parameter, mine["fp32"])
    for key in ("exp_avg", "exp_avg_sq"):
        deepspeed.utils.safe_set_local_optimizer_state(parameter, mine[key], key)
