"""Looks at dev during training: one score serves the weight that follows the teacher's and the end before the end."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.config.schema import EarlyStoppingConfig, ExportedStep, TrainConfig
from pipeline.core.progress import log
from pipeline.core.runtime import Ranks
from pipeline.core.types import InputError, TrainState
from pipeline.data.records import open_text
from pipeline.evaluation.predictions import main_score, teacher_score
from pipeline.evaluation.requests import EvaluationSet, open_evaluation_set
from pipeline.evaluation.scoring import score
from pipeline.models.compatibility import max_positions
from pipeline.training import schedules as ramps
from pipeline.training.schedules import is_due


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DevSet:
    """What is looked at."""

    exam: EvaluationSet
    goal: float | None
    """The teacher's score, where a weight follows it."""


def open_dev(config: TrainConfig, folder: Path, tokenizer: Any) -> DevSet | None:
    """Dev, and the teacher's score on it if a weight is made to follow it; None if this run never looks."""
    follows = config.loss.kd.adaptive_weight
    if follows.every_steps == 0 and config.evaluate_every_steps == 0:
        return None
    assert config.dev is not None, "checked with the options"
    longest, max_new_tokens = max_positions(folder), config.scoring.max_new_tokens
    exam = open_evaluation_set(open_text(config.dev, "dev"), tokenizer, longest=longest, max_new_tokens=max_new_tokens)
    if follows.every_steps == 0:
        return DevSet(exam=exam, goal=None)
    assert follows.teacher_predictions is not None, "checked with the options"
    return DevSet(exam=exam, goal=teacher_score(exam, follows.teacher_predictions))


def check(config: TrainConfig, num_steps: int) -> None:
    """Refuse to look for the best of steps of which none is looked at."""
    if config.export.what is ExportedStep.best and config.evaluate_every_steps > num_steps:
        raise InputError(
            f"export.what=best: expected evaluate_every_steps of at most the {num_steps} steps of this run, found "
            f"{config.evaluate_every_steps}; look at dev more often, or use export.what=last"
        )


def evaluate_dev(
    config: TrainConfig, ranks: Ranks, engine: Any, dev: DevSet | None, state: TrainState
) -> tuple[TrainState, dict[str, Any]]:
    """Score the student if it is time; what follows from it, and the figures. The first rank's score counts for all."""
    follows = config.loss.kd.adaptive_weight
    is_evaluated = is_due(config.evaluate_every_steps, state.step)
    if dev is None or not (is_evaluated or is_due(follows.every_steps, state.step)):
        return state, {}
    started = time.monotonic()
    found, figures = _scored(config, ranks, engine, dev.exam)
    figures["dev_seconds"] = time.monotonic() - started
    log.info("step %d: dev %.4f", state.step, found)
    if is_due(follows.every_steps, state.step):
        assert dev.goal is not None
        rule = {"margin": follows.margin, "factor": follows.factor, "least": follows.least}
        kd_factor = ramps.adaptive_kd_factor(state.kd_factor, student=found, teacher=dev.goal, **rule)
        log.info("step %d: teacher %.4f, KD factor %g", state.step, dev.goal, kd_factor)
        state = dataclasses.replace(state, kd_factor=kd_factor)
    if is_evaluated:
        state = with_score(state, found, min_delta=config.early_stopping.min_delta)
        figures |= {"best_step": state.best_step, "evaluations_since_best": state.evaluations_since_best}
    return state, figures


def _scored(config: TrainConfig, ranks: Ranks, engine: Any, exam: EvaluationSet) -> tuple[float, dict[str, float]]:
    student = engine.module.student
    scores, _ = score(
        student,
        exam,
        batch_tokens=config.scoring.batch_tokens,
        teacher_predictions=None,
        log_every_seconds=1e9,
        ranks=ranks,
    )
    student.train()
    measured = {"dev_accuracy": scores.accuracy, "dev_exact_match": scores.exact_match, "dev_nll": scores.nll}
    known = {name: value for name, value in measured.items() if value is not None}
    mine = torch.tensor([main_score(scores), *known.values()], dtype=torch.float64, device=ranks.device)
    found, *others = ranks.broadcast(mine).tolist()
    return found, dict(zip(known, others, strict=True))


def with_score(state: TrainState, score: float, *, min_delta: float) -> TrainState:
    """The state after one more evaluation: a new best is better than the old one by more than `min_delta`.

    The first is the best whatever it is; one that is no number gives way to any that is one.
    """
    best = state.best_score
    held = -math.inf if best is None or math.isnan(best) else best
    if best is None or score > held + min_delta:
        return dataclasses.replace(state, best_score=score, best_step=state.step, evaluations_since_best=0)
    return dataclasses.replace(state, evaluations_since_best=state.evaluations_since_best + 1)


def is_over(options: EarlyStoppingConfig, state: TrainState) -> bool:
    """Whether so many evaluations brought nothing better that the run ends here."""
    return 0 < options.patience <= state.evaluations_since_best


def dev_summary(rows: Sequence[dict[str, Any]], *, what: ExportedStep) -> dict[str, Any]:
    """What a result says of the step that was exported and of looks at dev, read off the metrics."""
    looks = [row for row in rows if "best_step" in row]
    if not looks:
        return {"exported_step": len(rows)}
    last = looks[-1]
    return {
        "exported_step": last["best_step"] if what is ExportedStep.best else len(rows),
        "best_step": last["best_step"],
        "decided_by": next(name for name in ("dev_accuracy", "dev_exact_match", "dev_nll") if name in last),
        "stopped_early_at": last["step"] if last.get("stopped_early") else None,
    }
