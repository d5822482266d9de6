"""A run as one rank sees it: everything that it has from its start, in one value, and what changes with the steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.config.schema import TrainConfig
from pipeline.core.files import RunPaths
from pipeline.core.runtime import Ranks, StopRequest
from pipeline.data.mixture import Mixture
from pipeline.evaluation.requests import EvaluationSet
from pipeline.monitoring.health import ModelSize
from pipeline.objective.terms import TermOptions
from pipeline.objective.trust import PositionWeight


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DevSet:
    """The held-out text by which a run decides while it trains."""

    held_out: EvaluationSet
    teacher_score: float | None
    """The teacher's score on it, where the KD weight adapts to it."""
    teacher_choices: tuple[tuple[int, ...], ...] | None
    """The teacher's best choices on each record, where the student's are compared with them."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Run:
    """What does not change from step to step; what does is `TrainState`."""

    config: TrainConfig
    paths: RunPaths
    ranks: Ranks
    stop: StopRequest
    engine: Any
    """DeepSpeed's, around `engine.StudentWithLoss`."""
    mixture: Mixture
    terms: dict[str, TermOptions]
    num_steps: int
    micro_batch: int
    """Sequences in one forward of one rank."""
    model_size: ModelSize
    dev: DevSet | None
    """None where the run never evaluates on dev."""
    position_weight: PositionWeight | None = None
    """None where each position counts once."""

    @property
    def loss_scale(self) -> float:
        """What DeepSpeed multiplies the loss by before a backward: above 1 only in float16."""
        return float(self.engine.optimizer.loss_scale if self.engine.fp16_enabled() else 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainState:
    """What a checkpoint stores besides parameters and optimizer state; the batches follow from the seed and `step`."""

    step: int = 0
    """Number of finished optimizer steps."""
    kd_factor: float = 1.0
    """Factor of the KD weight: 1 at first, smaller as the student becomes better than the teacher (adaptive weight)."""
    thresholds: tuple[float, ...] = ()
    """One per class: subtracted from the student's logits before `confidence` takes their argmax as the hard target."""
    best_score: float | None = None
    """The best score on dev so far (higher is better); None before the first evaluation."""
    best_step: int = 0
    """The step after which `best_score` was measured."""
    evaluations_since_best: int = 0
    """Number of evaluations after `best_step`, none of which was better."""
