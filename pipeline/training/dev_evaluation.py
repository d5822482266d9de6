"""Evaluation on dev during training: one score drives the adaptive KD weight, early stopping and the best step."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

import torch

from pipeline.config.schema import EarlyStoppingConfig, ExportedStep, TrainConfig
from pipeline.core.files import RunPaths
from pipeline.core.progress import log
from pipeline.core.types import InputError
from pipeline.evaluation.predictions import imitation, main_score, teacher_choices, teacher_score
from pipeline.evaluation.requests import EvaluationSet
from pipeline.evaluation.scoring import score
from pipeline.training.inputs import load_held_out
from pipeline.training.run import DevSet, Run, TrainState
from pipeline.training.schedules import adaptive_kd_factor, is_due

DEV_SCORES = ("dev_accuracy", "dev_exact_match", "dev_nll")
"""In the order of `main_score`: the first that a text has decides."""


def evaluates_on_dev(config: TrainConfig) -> bool:
    """Whether the student is scored on dev while it trains."""
    return config.steps != 0 and (config.evaluate_every_steps > 0 or config.loss.kd.adaptive_weight.every_steps > 0)


def open_dev(config: TrainConfig, paths: RunPaths, tokenizer: Any) -> DevSet | None:
    """Dev with what is known of the teacher on it; None where this run never evaluates."""
    if not evaluates_on_dev(config):
        return None
    held_out, adaptive = load_held_out(paths, "dev", tokenizer), config.loss.kd.adaptive_weight
    goal = None
    if adaptive.every_steps > 0:
        assert adaptive.teacher_predictions is not None, "checked with the options"
        goal = teacher_score(held_out, adaptive.teacher_predictions)
    return DevSet(held_out=held_out, teacher_score=goal, teacher_choices=teacher_choices_on_dev(config, held_out))


def teacher_choices_on_dev(config: TrainConfig, held_out: EvaluationSet) -> tuple[tuple[int, ...], ...] | None:
    """The teacher's best choices on dev, for `scoring.teacher_dev_predictions`; InputError where a record has none.

    None without that option, and where dev has no choices to compare.
    """
    predictions = config.scoring.teacher_dev_predictions
    if predictions is None:
        return None
    if not any(record.choices for record in held_out.records):
        log.info("dev has no records with choices: its evaluations have no dev_imitation and no dev_agreement")
        return None
    return tuple(teacher_choices(held_out, predictions, option="scoring.teacher_dev_predictions"))


def check(config: TrainConfig, num_steps: int) -> None:
    """Refuse to export the best step of a run that is too short to be evaluated once."""
    if config.export.what is ExportedStep.best and config.evaluate_every_steps > num_steps:
        raise InputError(
            f"export.what=best: expected evaluate_every_steps of at most the {num_steps} steps of this run, found "
            f"{config.evaluate_every_steps}; evaluate on dev more often, or use export.what=last"
        )


def evaluate_dev(run: Run, state: TrainState) -> tuple[TrainState, dict[str, Any]]:
    """Score the student on dev where it is due, on all ranks; the state that follows, and the figures to log.

    The first rank's score counts on all ranks.
    """
    adaptive, step = run.config.loss.kd.adaptive_weight, state.step
    is_evaluated, is_adapted = is_due(run.config.evaluate_every_steps, step), is_due(adaptive.every_steps, step)
    if run.dev is None or not (is_evaluated or is_adapted):
        return state, {}
    started = time.monotonic()
    found, figures = _score_student(run, run.dev)
    figures["dev_seconds"] = time.monotonic() - started
    log.info("step %d: dev %.4f", step, found)
    if is_adapted:
        assert run.dev.teacher_score is not None
        kd_factor = adaptive_kd_factor(
            state.kd_factor,
            student=found,
            teacher=run.dev.teacher_score,
            margin=adaptive.margin,
            factor=adaptive.factor,
            least=adaptive.least,
        )
        log.info("step %d: teacher %.4f, KD factor %g", step, run.dev.teacher_score, kd_factor)
        state = dataclasses.replace(state, kd_factor=kd_factor)
    if is_evaluated:
        state = with_score(state, found, min_delta=run.config.early_stopping.min_delta)
        figures |= {"best_step": state.best_step, "evaluations_since_best": state.evaluations_since_best}
    return state, figures


def _score_student(run: Run, dev: DevSet) -> tuple[float, dict[str, float]]:
    student = run.engine.module.student
    scores, predictions = score(
        student,
        dev.held_out,
        batch_tokens=run.config.scoring.batch_tokens,
        teacher_predictions=None,
        log_every_seconds=1e9,
        ranks=run.ranks,
    )
    student.train()
    measured = dict(zip(DEV_SCORES, (scores.accuracy, scores.exact_match, scores.nll), strict=True))
    figures = {name: value for name, value in measured.items() if value is not None}
    if dev.teacher_choices is not None:
        figures |= {f"dev_{name}": value for name, value in imitation(predictions, dev.teacher_choices).items()}
    # the ranks have the same log-probabilities, but polars may add them up in another order
    values = torch.tensor([main_score(scores), *figures.values()], dtype=torch.float64, device=run.ranks.device)
    found, *rest = run.ranks.broadcast(values).tolist()
    return found, dict(zip(figures, rest, strict=True))


def with_score(state: TrainState, score: float, *, min_delta: float) -> TrainState:
    """The state after one more evaluation: a new best exceeds the old one by more than `min_delta`.

    The first score is the best whatever it is; a NaN is replaced by any number.
    """
    best = state.best_score
    to_exceed = -math.inf if best is None or math.isnan(best) else best
    if best is None or score > to_exceed + min_delta:
        return dataclasses.replace(state, best_score=score, best_step=state.step, evaluations_since_best=0)
    return dataclasses.replace(state, evaluations_since_best=state.evaluations_since_best + 1)


def is_over(options: EarlyStoppingConfig, state: TrainState) -> bool:
    """Whether early stopping ends the run: `patience` evaluations in a row without a better score."""
    return 0 < options.patience <= state.evaluations_since_best


def dev_summary(rows: Sequence[dict[str, Any]], *, what: ExportedStep) -> dict[str, Any]:
    """Which step was exported and how dev decided it, for result.json, from the rows of metrics.jsonl."""
    evaluated = [row for row in rows if "best_step" in row]
    if not evaluated:
        return {"exported_step": len(rows)}
    last = evaluated[-1]
    return {
        "exported_step": last["best_step"] if what is ExportedStep.best else len(rows),
        "best_step": last["best_step"],
        "decided_by": next(name for name in DEV_SCORES if name in last),
        "stopped_early_at": last["step"] if last.get("stopped_early") else None,
    }
