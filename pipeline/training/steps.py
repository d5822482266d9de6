"""Optimizer steps of one rank: the loop with checkpoints and evaluations, one step, and the metrics that it logs."""

from __future__ import annotations

import contextlib
import dataclasses
import time

import torch

from pipeline.core.progress import log
from pipeline.core.runtime import Ranks
from pipeline.core.seeds import seed_from_values
from pipeline.core.types import Batch
from pipeline.core.watchdog import made_progress, watched
from pipeline.data.mixture import prefetch
from pipeline.monitoring.metrics import StepLogger, StepMetrics, engine_metrics, loss_metrics
from pipeline.objective import diagnostics
from pipeline.objective.class_prior import class_names, updated_thresholds
from pipeline.objective.fused_head import sum_names
from pipeline.objective.gates import Gate
from pipeline.objective.terms import StepInputs, TermOptions, classes_of, count_positions
from pipeline.objective.trust import weighted
from pipeline.training import checkpoints
from pipeline.training.builders import learning_rate_at, weights_at
from pipeline.training.dev_evaluation import evaluate_dev, is_over
from pipeline.training.engine import set_learning_rate
from pipeline.training.run import Run, TrainState
from pipeline.training.schedules import is_due

Terms = dict[str, TermOptions]


def take_steps(run: Run, state: TrainState) -> TrainState:
    """Optimizer steps until the last one, until early stopping or a request to stop; checkpoints where they are due."""
    logger = StepLogger(
        run.config,
        run.paths,
        run.ranks,
        run.model_size,
        done=state.step,
        num_steps=run.num_steps,
        skipped_steps=run.engine.skipped_steps,
    )
    batches_of_steps = prefetch(
        run.mixture,
        range(state.step, run.num_steps),
        rank=run.ranks.rank,
        world_size=run.ranks.world_size,
        micro_batch=run.micro_batch,
    )
    waiting_since = time.monotonic()
    with contextlib.closing(batches_of_steps), watched(run.config.launcher.hang_seconds):
        for step, batches in batches_of_steps:
            started = time.monotonic()
            made_progress()
            batches = [weighted(batch, run.position_weight) for batch in batches]
            metrics = take_step(run, state, batches)
            state = dataclasses.replace(state, step=step + 1, thresholds=next_thresholds(metrics, state))
            metrics |= {"data_wait_seconds": started - waiting_since, "seconds": time.monotonic() - started}
            state, is_last = finish_step(run, state, logger.measure(metrics, batches), logger)
            if is_last:
                break
            waiting_since = time.monotonic()
    logger.close()
    return state


def finish_step(run: Run, state: TrainState, metrics: StepMetrics, logger: StepLogger) -> tuple[TrainState, bool]:
    """What follows an optimizer step: evaluation, log, checkpoint; and whether the run stops here."""
    state, dev_metrics = evaluate_dev(run, state)
    ends = has_ended(run, state)
    stops_early = ends and state.step < run.num_steps
    if stops_early:
        dev_metrics["stopped_early"] = True
    logger.append(metrics | dev_metrics, show=("loss", *run.terms))
    if stops_early:
        log.info("step %d: no better score on dev since step %d; the run ends", state.step, state.best_step)
    is_stopped = run.ranks.any(bool(run.stop)) and not ends
    if not ends and (is_stopped or is_checkpoint_due(run, state)):  # that of the last step is saved before the export
        save(run, state)
    if is_stopped:
        log.info("stop requested: saved at step %d of %d", state.step, run.num_steps)
    return state, ends or is_stopped


def has_ended(run: Run, state: TrainState) -> bool:
    """Whether no step is left, or early stopping has ended the run before."""
    return state.step >= run.num_steps or is_over(run.config.early_stopping, state)


def save(run: Run, state: TrainState) -> None:
    """A checkpoint; the watchdog's time is its own."""
    with watched(run.config.launcher.hang_seconds):
        checkpoints.save(run, state)


def is_checkpoint_due(run: Run, state: TrainState) -> bool:
    """Every so many steps, and at the best step on dev where that is the one to export."""
    is_best = checkpoints.keeps_best(run.config) and state.best_step == state.step
    return is_best or is_due(run.config.checkpoint.every_steps, state.step)


# -------------------------------------------------------------------------------------------- one step


def take_step(run: Run, state: TrainState, batches: list[Batch]) -> StepMetrics:
    """One optimizer step over the global batch, whose positions are weighted; its metrics for metrics.jsonl."""
    config, terms = run.config, run.terms
    # dropout is a function of the step, so that a resumed run draws the same
    torch.manual_seed(seed_from_values(config.seed, state.step, run.ranks.rank))
    learning_rate = learning_rate_at(config.optimizer, state.step, run.num_steps)
    set_learning_rate(run.engine, learning_rate)
    weights = weights_at(config.loss, tuple(terms), state.step, run.num_steps, kd_factor=state.kd_factor)
    batches = [batch.to(run.ranks.device) for batch in batches]
    counts = global_counts(run.ranks, batches, terms)
    excluded = gated_away_fraction(run.ranks, batches, terms, counts)
    inputs = step_inputs(run, state, weights, counts)
    sums = forward_backward(run, inputs, batches)
    metrics = loss_metrics(state.step + 1, sums, counts, weights)
    if excluded is not None:
        metrics["gated_away_fraction"] = excluded
    metrics |= {"learning_rate": learning_rate} | engine_metrics(run.engine, run.ranks, batches)
    if inputs.diagnose:
        metrics |= diagnostics.figures(sums, counts, weights)
    return metrics | class_metrics(terms, sums)


def step_inputs(run: Run, state: TrainState, weights: dict[str, float], counts: dict[str, float]) -> StepInputs:
    """What the loss of each micro-batch needs.

    Each term's sum is divided by its count over all ranks and micro-batches, known before the first forward. DeepSpeed
    averages gradients over ranks, so the loss is multiplied by their number.
    """
    world_size = run.ranks.world_size
    return StepInputs(
        coefficients={name: weights[name] * world_size / (counts[name] or 1.0) for name in run.terms},
        diagnose=is_due(run.config.loss.diagnostics_every_steps, state.step),
        thresholds=state.thresholds or (0.0,) * len(classes_of(run.terms)),
        loss_scale=run.loss_scale,
    )


def forward_backward(run: Run, inputs: StepInputs, batches: list[Batch]) -> dict[str, float]:
    """Forward and backward of all micro-batches and the update; the sums over the global batch, by name."""
    names = sum_names(run.terms)
    totals = torch.zeros(len(names), dtype=torch.float64, device=run.ranks.device)
    for batch in batches:
        loss, sums = run.engine(batch, inputs)
        # a clone: the module's output itself DeepSpeed 0.19 divides by the accumulation all the same (ZeRO 0, float32)
        run.engine.backward(loss.clone(), scale_wrt_gas=False)
        run.engine.step()
        totals += sums
    return dict(zip(names, run.ranks.all_reduce(totals).tolist(), strict=True))


def global_counts(ranks: Ranks, batches: list[Batch], terms: Terms) -> dict[str, float]:
    """How many positions of the global batch each term reads, by weight."""
    counts = torch.stack([count_positions(batch, terms) for batch in batches]).sum(dim=0)
    return dict(zip(terms, ranks.all_reduce(counts).tolist(), strict=True))


def gated_away_fraction(ranks: Ranks, batches: list[Batch], terms: Terms, counts: dict[str, float]) -> float | None:
    """Fraction of the positions of kd that its gate excludes; None without a gate or without such positions."""
    if "kd" not in terms or terms["kd"].gate.is_open:
        return None
    ungated = global_counts(ranks, batches, {"kd": dataclasses.replace(terms["kd"], gate=Gate())})["kd"]
    return 1.0 - counts["kd"] / ungated if ungated else None


# -------------------------------------------------------------------------------------------- classes


def class_metrics(terms: Terms, sums: dict[str, float]) -> dict[str, list[float]]:
    """How often the student was hardened to each class, and the teacher's probability of it; empty without classes."""
    totals = [sums[name] for name in class_names(classes_of(terms))]
    half = len(totals) // 2
    num_positions = sum(totals[:half])  # each was hardened to one class
    if not num_positions:
        return {}
    fractions = [total / num_positions for total in totals]
    return {"own_class_fractions": fractions[:half], "teacher_class_fractions": fractions[half:]}


def next_thresholds(metrics: StepMetrics, state: TrainState) -> tuple[float, ...]:
    """The classes' thresholds for the next step."""
    if "own_class_fractions" not in metrics:
        return state.thresholds
    own, teacher = metrics["own_class_fractions"], metrics["teacher_class_fractions"]
    return updated_thresholds(state.thresholds or (0.0,) * len(own), own=own, teacher=teacher)
