"""Reject contradictory options of the objective that adapt the KD weight, or weigh parts of its divergence."""

from __future__ import annotations

from pipeline.config.schema import Divergence, KdConfig, TrainConfig
from pipeline.config.validate import at_least, fraction
from pipeline.core.types import InputError


def check_divergence(kd: KdConfig) -> None:
    """Reject options of another divergence."""
    fraction(beta=kd.beta)
    at_least(0, **{"loss.kd.tail_weight": kd.tail_weight})
    if kd.tail_weight != 1.0 and kd.divergence is not Divergence.forward_kl:
        raise InputError(
            f"loss.kd.tail_weight: expected 1 with divergence={kd.divergence.name}, which has no such part, found "
            f"{kd.tail_weight}; use divergence=forward_kl"
        )


def check_adaptive_weights(config: TrainConfig) -> None:
    """Reject rules of the KD weight whose inputs are missing, and two rules at once."""
    follows = config.loss.kd.adaptive_weight
    at_least(0, adaptive_weight_every_steps=follows.every_steps)
    if follows.every_steps > 0:
        fraction(adaptive_weight_margin=follows.margin, adaptive_weight_least=follows.least)
        if not 0.0 < follows.factor < 1.0:
            raise InputError(
                f"loss.kd.adaptive_weight.factor: expected more than 0 and less than 1, found {follows.factor}"
            )
        if config.dev is None or follows.teacher_predictions is None:
            raise InputError(
                "loss.kd.adaptive_weight: expected dev and adaptive_weight.teacher_predictions, because it compares "
                "two scores, found null; score the teacher on dev with scripts/evaluate.py"
            )
