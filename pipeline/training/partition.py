"""Weights that ZeRO 3 spreads over the ranks: gathered one by one, and a model that is scored in such parts."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pipeline.config.schema import TrainConfig
from pipeline.core.watchdog import made_progress
from pipeline.models.forward import Model
from pipeline.training.engine import all_options, deepspeed


def whole(engine: deepspeed.DeepSpeedEngine, weight: Tensor) -> Tensor | None:
    """A weight or buffer of the student, complete, in the host memory of rank 0; None on the others.

    At ZeRO 3 all ranks have to call it. They hold this one weight for a moment, and then their part of it again.
    """
    with deepspeed.zero.GatheredParameters(weight, enabled=hasattr(weight, "ds_id")):
        # a copy, because at ZeRO 1 and 2 the weights are parts of one tensor: all of them would look tied
        return weight.detach().to("cpu", copy=True) if engine.global_rank == 0 else None


def student_weights(engine: deepspeed.DeepSpeedEngine) -> dict[str, Tensor] | None:
    """The student's complete state dict in the host memory of rank 0, tied weights once; None on other ranks."""
    found: dict[int, Tensor] = {}
    by_name = engine.module.student.state_dict(keep_vars=True)
    for weight in {id(weight): weight for weight in by_name.values()}.values():
        if (complete := whole(engine, weight)) is not None:
            found[id(weight)] = complete
        made_progress()
    return {name: found[id(weight)] for name, weight in by_name.items()} if found else None


def scoring_options(config: TrainConfig) -> dict[str, Any]:
    """DeepSpeed's config for a model that is only scored at ZeRO 3: nothing of an optimizer."""
    options = all_options(config, micro_batch=1, accumulation=1)
    zero = {key: value for key, value in options["zero_optimization"].items() if key != "offload_optimizer"}
    return options | {"zero_optimization": zero}


def run_in_parts(model: Model, config: TrainConfig) -> None:
    """Let a model that was loaded in parts (ZeRO 3) run: each layer is gathered on all ranks while it computes."""
    engine, _, _, _ = deepspeed.initialize(model=model, config=scoring_options(config))
    model.engine_of_parts = (engine,)  # in a tuple: no submodule; as long as it lives, so do its hooks


def release(engine: deepspeed.DeepSpeedEngine) -> None:
    """Free weights, gradients and optimizer state when the last of them is exported; the engine cannot be used again.

    DeepSpeed keeps its engine of ZeRO 3 in module-level variables: it would stay beside the model that is scored.
    """
    inner, parameters = engine.basic_optimizer, list(engine.module.parameters())
    engine.destroy()
    parameters += [parameter for group in inner.param_groups for parameter in group["params"]]
    for parameter in parameters:
        parameter.grad = None
        for weight in (parameter, getattr(parameter, "ds_tensor", None)):
            if weight is not None:
                weight.data = weight.data.new_empty(0)
    inner.state.clear()
    vars(engine.optimizer).clear()
