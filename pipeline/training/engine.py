"""DeepSpeed: build the engine around student and loss."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config.schema import Dtype, Offload, Optimizer, TrainConfig
from pipeline.core.progress import log
from pipeline.core.types import Batch
from pipeline.models.forward import Model, hidden_states
from pipeline.objective.fused_head import combined_loss
from pipeline.objective.terms import StepInputs, TermOptions
from pipeline.training.checkpoints import is_unwrapped

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed  # noqa: E402  (it logs, and chooses its accelerator, while it is imported)
from deepspeed.runtime.zero.config import ZERO_OPTIMIZATION  # noqa: E402

# A kernel for inference over several CPU ranks, which training never calls: without it no compiler is needed.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class StudentWithLoss(nn.Module):
    """The student and its objective as one module: under ZeRO-3 weights exist only inside a forward."""

    def __init__(
        self, student: Model, *, vocabulary_size: int, terms: dict[str, TermOptions], fused: bool = True
    ) -> None:
        super().__init__()
        self.student, self.terms = student, terms
        self.objective = Objective(student, vocabulary_size=vocabulary_size, terms=terms, fused=fused)
        self.register_state_dict_post_hook(_drop_frozen)  # in checkpoints; the student's own state dict has all

    def forward(self, batch: Batch, step: StepInputs) -> tuple[Tensor, Tensor]:
        """The micro-batch's share of the loss, and the sums behind it: `fused_head.sum_names`."""
        hidden_BSH = hidden_states(self.student, batch.input_ids_BS, batch.position_ids_BS)
        loss, sums = self.objective(hidden_BSH.flatten(0, 1)[batch.flat_positions_N], batch, step)
        # a rank whose micro-batch has no target still takes part in every collective
        return loss + 0.0 * hidden_BSH[0, 0].float().sum(), sums


class Objective(nn.Module):
    """From hidden states to the loss: a module of its own, so that DeepSpeed gathers the head's weights around it."""

    def __init__(self, student: Model, *, vocabulary_size: int, terms: dict[str, TermOptions], fused: bool) -> None:
        super().__init__()
        self._student = (student,)  # in a tuple: its parameters are the student's, not ours
        self.vocabulary_size, self._terms, self._fused = vocabulary_size, terms, fused

    def register_head(self) -> None:
        """Make ZeRO-3 gather the student's head around this module's forward and backward, too."""
        for parameter in self._student[0].get_output_embeddings().parameters():
            deepspeed.zero.register_external_parameter(self, parameter)

    def forward(self, hidden_NH: Tensor, batch: Batch, step: StepInputs) -> tuple[Tensor, Tensor]:
        """The micro-batch's share of the loss, and the sums behind it."""
        size, is_fused = self.vocabulary_size, self._fused
        return combined_loss(
            self._student[0], hidden_NH, batch, self._terms, step, vocabulary_size=size, fused=is_fused
        )


def build(
    module: StudentWithLoss, config: TrainConfig, *, micro_batch: int, accumulation: int
) -> deepspeed.DeepSpeedEngine:
    """The engine with the configured optimizer and ZeRO stage; the learning rate is set before each step."""
    stage = config.deepspeed.zero_stage
    options = all_options(config, micro_batch=micro_batch, accumulation=accumulation)
    with _same_optimizer_at_zero_1():
        engine, _, _, _ = deepspeed.initialize(model=module, optimizer=_optimizer(module, config), config=options)
    if stage == 0 and _sums_in_float32(config, accumulation):
        _sum_in_float32(engine)
    if stage == 3:
        module.objective.register_head()
    if stage == 0 and engine.dp_world_size == 1:  # with one rank the all-reduce only copies every gradient twice
        engine.enable_backward_allreduce = False
    if stage == 0 and not is_unwrapped(config, stage):  # a second check for inf and NaN, which the norm shows already
        engine.optimizer.overflow_checker.check = lambda: False
    if is_unwrapped(config, stage):
        engine.clip_fp32_gradients = functools.partial(_clip, engine)
    # DeepSpeed has made one step with zero gradients to allocate the state; at ZeRO 0 in bf16 AdamW's step count stays
    # at 1, and its first update would be half as large as at other stages
    set_step_count(engine, 0)
    return engine


def all_options(config: TrainConfig, *, micro_batch: int, accumulation: int) -> dict[str, Any]:
    """DeepSpeed's complete config, with the user's overrides; at ZeRO 3 the student is loaded with it, too."""
    stage, is_summed = config.deepspeed.zero_stage, _sums_in_float32(config, accumulation)
    options = engine_options(config) | {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "checkpoint": {"tag_validation": "Fail"},
    }
    if is_summed and stage > 0:
        options["data_types"] = {"grad_accum_dtype": "fp32"}
    if is_summed and stage < 2:  # gradients are reduced once a step; at other stages after each micro-batch
        options["communication_data_type"] = "fp32"
    return _merged(options, config.deepspeed.overrides)


def _sums_in_float32(config: TrainConfig, accumulation: int) -> bool:
    return accumulation > 1 and config.student.dtype is not Dtype.float32


@contextlib.contextmanager
def _same_optimizer_at_zero_1() -> Iterator[None]:
    """Keep DeepSpeed from choosing another optimizer class at ZeRO 1 where gradients are summed in float32.

    The checkpoints of that class have another form. The class of ZeRO 1 and 2 sums in float32 as well.
    """
    chosen = deepspeed.DeepSpeedEngine._do_optimizer_sanity_check

    def choose(engine: deepspeed.DeepSpeedEngine, optimizer: torch.optim.Optimizer) -> str | None:
        found: str | None = chosen(engine, optimizer)
        return ZERO_OPTIMIZATION if engine.zero_optimization() else found

    deepspeed.DeepSpeedEngine._do_optimizer_sanity_check = choose
    try:
        yield
    finally:
        deepspeed.DeepSpeedEngine._do_optimizer_sanity_check = chosen


def _sum_in_float32(engine: deepspeed.DeepSpeedEngine) -> None:
    """Sum the gradients of all micro-batches in float32 at ZeRO 0, where DeepSpeed has no option for it."""
    trained: list[Any] = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
    if not hasattr(trained[0], "grad_dtype"):
        log.warning(
            "ZeRO 0: torch %s sums the gradients of micro-batches in the weights' type, with 64 of them an error of "
            "0.7 %% of the update; deepspeed=zero1 sums them in float32",
            torch.__version__,
        )
        return
    for parameter in trained:
        parameter.grad_dtype = torch.float32
    gradients = engine._get_gradients_for_reduction

    def complete() -> Any:
        for parameter in trained:
            if parameter.grad is None:  # an expert without tokens: DeepSpeed would give it a gradient of another type
                parameter.grad = torch.zeros_like(parameter, dtype=torch.float32)
        return gradients()

    engine._get_gradients_for_reduction = complete


def engine_options(config: TrainConfig) -> dict[str, Any]:
    """The DeepSpeed options that do not depend on the batch: precision, clipping, ZeRO and offload."""
    zero: dict[str, Any] = {
        "stage": config.deepspeed.zero_stage,
        "stage3_gather_16bit_weights_on_model_save": True,
    }
    if config.optimizer.name is Optimizer.muon:
        zero["reduce_scatter"] = False  # it needs complete gradients
    if config.deepspeed.offload is not Offload.none:
        where = {"device": config.deepspeed.offload.name, "pin_memory": torch.cuda.is_available()}
        if config.deepspeed.offload is Offload.nvme:
            where["nvme_path"] = config.deepspeed.nvme_path
        zero["offload_optimizer"] = where
        if config.deepspeed.zero_stage == 3:
            zero["offload_param"] = where
    return {
        # at ZeRO 0 in float32 DeepSpeed computes a norm only where it clips
        "gradient_clipping": config.optimizer.max_grad_norm
        or (math.inf if is_unwrapped(config, config.deepspeed.zero_stage) else 0.0),
        "bf16": {"enabled": config.student.dtype is Dtype.bfloat16},
        "fp16": {"enabled": config.student.dtype is Dtype.float16},
        "zero_optimization": zero,
        # with offload DeepSpeed prefers its CPUAdam, which has to be compiled; torch's fused AdamW runs on CPUs as well
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000_000,
    }


def _optimizer(module: StudentWithLoss, config: TrainConfig) -> torch.optim.Optimizer:
    options, trained = config.optimizer, [p for p in module.parameters() if p.requires_grad]
    adam: dict[str, Any] = {"lr": 0.0, "betas": (options.beta1, options.beta2), "eps": options.epsilon}
    if options.name is Optimizer.adamw:
        return torch.optim.AdamW(_decayed(trained, options.weight_decay), **adam, fused=True)
    ends = (module.student.get_input_embeddings().weight, module.student.get_output_embeddings().weight)
    hidden = [p for p in trained if dimensions(p) == 2 and not any(p is end for end in ends)]
    for parameter in hidden:
        parameter.use_muon = True  # type: ignore[attr-defined]  # DeepSpeed's mark, which its ZeRO stages read
    others = [p for p in trained if not hasattr(p, "use_muon")]
    muon = {"params": hidden, "use_muon": True, "lr": 0.0, "momentum": options.muon_momentum}
    muon |= {
        "weight_decay": options.weight_decay,
        "learning_rate_ratio": options.muon_learning_rate / options.learning_rate,
    }
    groups = [muon, *({"use_muon": False} | adam | group for group in _decayed(others, options.weight_decay))]
    if not torch.cuda.is_available():  # the iteration is a few products: do not require a compiler for it
        torch.compiler.set_stance("force_eager")
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam  # here: importing it prepares kernels

    return MuonWithAuxAdam(groups, torch.optim.AdamW, {"fused": True})


def _decayed(parameters: list[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    groups = [
        {"params": [p for p in parameters if dimensions(p) >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if dimensions(p) < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def dimensions(parameter: nn.Parameter) -> int:
    """Number of dimensions of the complete parameter; partitioned by ZeRO-3 it looks like an empty vector."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


def _clip(engine: deepspeed.DeepSpeedEngine) -> None:
    # DeepSpeed's own does not keep the norm, and multiplies gradients by 1 where none is too large
    engine._global_grad_norm = nn.utils.clip_grad_norm_(engine.module.parameters(), engine.gradient_clipping())


def _merged(config: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    merged = dict(config)
    for key, value in overrides.items():
        inner = merged.get(key)
        merged[key] = _merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged


def set_learning_rate(engine: deepspeed.DeepSpeedEngine, value: float) -> None:
    """Use this learning rate in the next step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = value * group.get("learning_rate_ratio", 1.0)


def set_step_count(engine: deepspeed.DeepSpeedEngine, steps: int) -> None:
    """Set the number of updates that AdamW's state has seen."""
    for state in engine.optimizer.state.values():
        if "step" in state:
            state["step"] = torch.full_like(state["step"], steps) if torch.is_tensor(state["step"]) else steps


def _drop_frozen(module: nn.Module, state: dict[str, Tensor], prefix: str, _: Any) -> None:
    # DeepSpeed has an option for this, but it keeps the second name of a tied matrix
    for name in frozen_names(module):
        state.pop(prefix + name, None)


def frozen_names(module: nn.Module) -> set[str]:
    """All names of the parameters that are not trained."""
    return {name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}


def load_trained(src: dict[str, Tensor], dst: nn.Module) -> None:
    """Load a checkpoint's weights into the module; only the frozen ones, which no checkpoint holds, may be missing."""
    found = dst.load_state_dict(src, strict=False)
    wrong = {*found.unexpected_keys, *found.missing_keys} - frozen_names(dst)
    if wrong:
        raise RuntimeError(f"expected a checkpoint of the trained weights, found a difference in {sorted(wrong)[:5]}")
