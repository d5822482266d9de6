"""Reject contradictory options of gates and position weights: where the teacher is used, and how strongly."""

from __future__ import annotations

from pipeline.config.schema import Control, GateBy, TrainConfig, WeightBy
from pipeline.config.validate import fraction, positive
from pipeline.core.types import InputError


def check_trust(config: TrainConfig) -> None:
    """Reject contradictory options before reading any input."""
    gate, weight = config.loss.kd.gate, config.loss.kd.position_weight
    fraction(min_confidence=gate.min_confidence, keep_fraction=gate.keep_fraction)
    positive(keep_fraction=gate.keep_fraction, **{"loss.kd.position_weight.power": weight.power})
    if gate.keep_fraction < 1 and (config.cache is None or config.gold_fraction == 1):
        raise InputError(
            f"loss.kd.gate.keep_fraction: expected 1, because the fraction is of the corpus and this run reads "
            f"none, found {gate.keep_fraction}; use gate.min_confidence or gate.max_entropy"
        )
    if config.more_caches and gate.keep_fraction < 1 and not gate.per_class:
        raise InputError(
            "loss.kd.gate.keep_fraction: expected 1 with more_caches, because a threshold is read off one cache, found "
            f"{gate.keep_fraction}; use min_confidence or max_entropy, or per_class=true, which reads all caches"
        )
    uses = [("gate.by", gate.by.name)] if gate.keep_fraction < 1 else []
    uses += [("position_weight.by", weight.by.name)] if weight.by is not WeightBy.none else []
    reads_teacher = config.gold_cache is not None or (config.cache is not None and config.gold_fraction < 1)
    for name, by in uses if reads_teacher else []:
        if by == GateBy.learnt.name and gate.learn_on is None and config.gold_cache is None:
            raise InputError(
                f"loss.kd.{name}=learnt: expected loss.kd.gate.learn_on or gold_cache, a capture of gold by the same "
                "teacher, found neither; capture the gold set, or use by=confidence"
            )
    if config.loss.kd.control is Control.smoothed:
        _check_smoothed(uses, per_class=gate.per_class)


def _check_smoothed(uses: list[tuple[str, str]], *, per_class: bool) -> None:
    """Smoothing keeps the teacher's entropy and top token alone; a plain gate on confidence was always accepted."""
    accepted = {("gate.by", "entropy"), ("position_weight.by", "entropy")}
    accepted |= set() if per_class else {("gate.by", "confidence")}
    for name, by in uses:
        if (name, by) not in accepted:
            raise InputError(
                f"loss.kd.{name}={by}: expected entropy with loss.kd.control=smoothed, because smoothing keeps the "
                "teacher's entropy and changes every other measure; use by=entropy"
            )
