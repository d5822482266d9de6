"""DeepSpeed: build the engine around student and loss, save and load it, hand out its weights."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import math
import os
import shutil
from typing import Any

import torch
from torch import Tensor, nn

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed  # noqa: E402  (it logs, and chooses its accelerator, while it is imported)

from pipeline import head, models  # noqa: E402
from pipeline.files import RunPaths, write_json  # noqa: E402
from pipeline.losses import TermOptions  # noqa: E402
from pipeline.runtime import Ranks  # noqa: E402
from pipeline.types import Batch, TrainState  # noqa: E402

# A kernel for inference over several CPU ranks, which training never calls: without it no compiler is needed.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class StudentWithLoss(nn.Module):
    """The student and its objective as one module: under ZeRO-3 weights exist only inside a forward."""

    def __init__(
        self, student: models.Model, *, vocabulary_size: int, terms: dict[str, TermOptions], fused: bool = True
    ) -> None:
        super().__init__()
        self.student = student
        self.objective = Objective(student, vocabulary_size=vocabulary_size, terms=terms, fused=fused)

    def forward(
        self, batch: Batch, coefficients: dict[str, float], diagnose: bool, thresholds: tuple[float, ...] = ()
    ) -> tuple[Tensor, Tensor]:
        """The micro-batch's share of the loss, and the sums behind it (`head.sum_names`)."""
        how = {"diagnose": diagnose, "thresholds": thresholds}
        hidden_BSH = models.hidden_states(self.student, batch.input_ids_BS, batch.position_ids_BS)
        loss, sums = self.objective(hidden_BSH.flatten(0, 1)[batch.flat_positions_N], batch, coefficients, how)
        # a rank whose micro-batch has no target still takes part in every collective
        return loss + 0.0 * hidden_BSH.float().sum(), sums


class Objective(nn.Module):
    """From hidden states to the loss: a module, so that DeepSpeed gathers the head's weights around it."""

    def __init__(
        self, student: models.Model, *, vocabulary_size: int, terms: dict[str, TermOptions], fused: bool
    ) -> None:
        super().__init__()
        self._student = (student,)  # in a tuple: its parameters are the student's, not ours
        self.vocabulary_size, self._terms, self._fused = vocabulary_size, terms, fused

    def borrow_head(self) -> None:
        """Have ZeRO-3 gather the head's weights, which belong to the student, around our forward and backward too."""
        for parameter in self._student[0].get_output_embeddings().parameters():
            deepspeed.zero.register_external_parameter(self, parameter)

    def forward(
        self, hidden_NH: Tensor, batch: Batch, coefficients: dict[str, float], how: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """The micro-batch's share of the loss, and the sums behind it."""
        how = how | {"vocabulary_size": self.vocabulary_size, "fused": self._fused}
        return head.speak(self._student[0], hidden_NH, batch, self._terms, coefficients, **how)


def build(
    module: StudentWithLoss,
    *,
    zero_stage: int,
    dtype: str,
    micro_batch: int,
    accumulation: int,
    max_grad_norm: float,
    betas: tuple[float, float],
    epsilon: float,
    weight_decay: float,
    overrides: dict[str, Any],
) -> deepspeed.DeepSpeedEngine:
    """The engine: AdamW with fp32 state under the given ZeRO stage; the learning rate is set before each step."""
    matrices = [p for p in module.parameters() if p.ndim >= 2]
    vectors = [p for p in module.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=epsilon, fused=True)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        # at ZeRO 0 in float32 DeepSpeed asks for a norm only where it clips
        "gradient_clipping": max_grad_norm or (math.inf if (zero_stage, dtype) == (0, "float32") else 0.0),
        "bf16": {"enabled": dtype == "bfloat16"},
        "zero_optimization": {"stage": zero_stage, "stage3_gather_16bit_weights_on_model_save": True},
        "checkpoint": {"tag_validation": "Fail"},
        "steps_per_print": 1_000_000_000,
    }
    engine, _, _, _ = deepspeed.initialize(model=module, optimizer=optimizer, config=_merged(config, overrides))
    if zero_stage == 3:
        module.objective.borrow_head()
    if zero_stage == 0 and engine.dp_world_size == 1:  # else all gradients are copied twice for the sum with nobody
        engine.enable_backward_allreduce = False
    if zero_stage == 0 and dtype == "float32":
        engine.clip_fp32_gradients = functools.partial(_clip, engine)
    # DeepSpeed has stepped once on zeros to allocate the state; at ZeRO 0 in bf16 AdamW's step count stays at 1, and
    # its first update would be half of what it is elsewhere
    for state in engine.optimizer.state.values():
        if "step" in state:
            state["step"].zero_()
    return engine


def _clip(engine: deepspeed.DeepSpeedEngine) -> None:
    # DeepSpeed's own forgets the norm that it clips to, and multiplies gradients by 1 where none is too large
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
        group["lr"] = value


def save_checkpoint(
    engine: deepspeed.DeepSpeedEngine, paths: RunPaths, state: TrainState, ranks: Ranks, *, zero_stage: int, keep: int
) -> None:
    """Save on all ranks, then publish on rank 0 by replacing one small file, then drop old ones."""
    tag = f"step-{state.step:08d}"
    paths.checkpoints.mkdir(parents=True, exist_ok=True)
    engine.save_checkpoint(str(paths.checkpoints), tag=tag, client_state=dataclasses.asdict(state), save_latest=False)
    ranks.wait()
    if ranks.rank == 0:
        write_json(
            paths.published,
            {"tag": tag, "step": state.step, "world_size": ranks.world_size, "zero_stage": zero_stage},
        )
        for old in sorted(path for path in paths.checkpoints.glob("step-*") if path.name <= tag)[:-keep]:
            shutil.rmtree(old)
    ranks.wait()


def load_checkpoint(engine: deepspeed.DeepSpeedEngine, paths: RunPaths) -> TrainState:
    """Go on from the published checkpoint; a run that has none begins at step 0."""
    if not paths.published.exists():
        return TrainState()
    published = json.loads(paths.published.read_text())
    _, client_state = engine.load_checkpoint(str(paths.checkpoints), tag=published["tag"])
    known = {item.name: client_state[item.name] for item in dataclasses.fields(TrainState) if item.name in client_state}
    return TrainState(**known)


def student_weights(engine: deepspeed.DeepSpeedEngine, zero_stage: int) -> dict[str, Tensor] | None:
    """The student's whole state dict, on rank 0; None on other ranks where parameters are partitioned."""
    state = engine._zero3_consolidated_16bit_state_dict() if zero_stage == 3 else engine.module.state_dict()
    if state is None:
        return None
    prefix = "student."
    return {name.removeprefix(prefix): weight.cpu() for name, weight in state.items()}
