"""Stage two, one rank: the student learns from shards and gold under the combined objective.

Started by torchrun as `python -m pipeline.training.worker RUN_FOLDER`; everything it needs stands in that folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import logging
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch

from pipeline.config.options import load_config
from pipeline.config.schema import HeadPath, TrainConfig
from pipeline.core.files import RunPaths
from pipeline.core.progress import log, start_logging
from pipeline.core.runtime import Ranks, StopRequest, exit_rank, ranks_from_environment, release_memory
from pipeline.core.seeds import seed_from_values
from pipeline.core.types import Batch, TrainState
from pipeline.data.mixture import Mixture, fitting_micro_batch, prefetch
from pipeline.models import loading as models
from pipeline.models import lora as adapters
from pipeline.models.compatibility import check_architecture
from pipeline.models.tokenizer import open_tokenizer, vocabulary_size
from pipeline.monitoring import health
from pipeline.monitoring.metrics import StepLogger
from pipeline.objective import diagnostics
from pipeline.objective.class_prior import class_names, updated_thresholds
from pipeline.objective.fused_head import sum_names
from pipeline.objective.gates import Gate
from pipeline.objective.terms import StepInputs, TermOptions, classes_of, count_positions
from pipeline.training import checkpoints
from pipeline.training import dev_evaluation as looks
from pipeline.training import engine as engines
from pipeline.training.builders import (
    class_ids,
    learning_rate_at,
    open_gate,
    open_mixture,
    steps_of,
    term_options,
    weights_at,
)
from pipeline.training.export import export, finish
from pipeline.training.schedules import is_due

Terms = dict[str, TermOptions]


def run(folder: Path) -> None:
    """Train, export and score what a run folder describes, from where it stands."""
    paths = RunPaths(folder=folder)
    config = load_config(paths.config, TrainConfig)
    stop = StopRequest(paths.stop)
    with ranks_from_environment() as ranks:
        is_first = ranks.rank == 0
        start_logging(paths.log if is_first else None, level=logging.INFO if is_first else logging.ERROR)
        try:
            trained = paths.model.exists() or train(config, paths, ranks, stop)
        except Exception:
            log.exception("rank %d failed", ranks.rank)
            raise
    if trained and is_first:  # what is scored is the exported folder, as its users will load it
        release_memory()
        finish(config, paths)


def train(config: TrainConfig, paths: RunPaths, ranks: Ranks, stop: StopRequest) -> bool:
    """Train to the last step and export; False if asked to stop before (a checkpoint is saved then)."""
    folder, tokenizer = open_tokenizer(config.student)
    mixture = open_mixture(config, tokenizer)
    num_steps = steps_of(config, mixture)
    looks.check(config, num_steps)
    micro_batch = fitting_micro_batch(config.global_batch, world_size=ranks.world_size, at_most=config.micro_batch)
    torch.manual_seed(config.seed)
    zero_stage = config.deepspeed.zero_stage
    batch = {"train_micro_batch_size_per_gpu": micro_batch}
    partition = engines.engine_options(config) | batch if zero_stage == 3 else None
    student = models.open_model(config.student, ranks.device, partition=partition)
    if config.student.adapter is not None:
        adapters.add_adapter(student, config.student.adapter, seed=config.seed)
    if config.gradient_checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    classes = class_ids(config.loss.confidence.choices, tokenizer)
    terms = term_options(config.loss, open_gate(config.loss.kd, mixture.readers), classes)
    module = engines.StudentWithLoss(
        student.train(),
        vocabulary_size=vocabulary_size(tokenizer),
        terms=terms,
        fused=config.loss.head is HeadPath.fused,
    )
    size, dev = health.model_size(student), looks.open_dev(config, folder, tokenizer)
    size_bytes = checkpoints.checkpoint_bytes(student.parameters(), zero_stage=zero_stage)
    checkpoints.check_room(paths, size_bytes, config)
    engine = engines.build(
        module,
        config,
        micro_batch=micro_batch,
        accumulation=config.global_batch // (ranks.world_size * micro_batch),
    )
    if partition is not None:
        check_architecture(student)
    state = resume(engine, config, paths, ranks)
    where = (ranks.world_size, ranks.device, zero_stage)
    log.info("step %d of %d, %d ranks on %s, ZeRO %d", state.step, num_steps, *where)
    state = take_steps(config, paths, ranks, stop, engine, mixture, state, num_steps, micro_batch, terms, size, dev)
    if state.step < num_steps and not looks.is_over(config.early_stopping, state):
        return False
    if checkpoints.keeps_best(config) and state.best_step != state.step:
        load_checkpoint(engine, config, paths, ranks, checkpoints.of_best(paths, state))
    export(engine, student, tokenizer, paths, ranks, config)
    return True


def resume(engine: Any, config: TrainConfig, paths: RunPaths, ranks: Ranks) -> TrainState:
    """Load the published checkpoint; a run that has none begins at step 0."""
    checkpoint = checkpoints.published(paths)
    if checkpoint is None:
        return TrainState()
    load_checkpoint(engine, config, paths, ranks, checkpoint)
    return checkpoint.train_state()


def load_checkpoint(
    engine: Any, config: TrainConfig, paths: RunPaths, ranks: Ranks, checkpoint: checkpoints.Published
) -> None:
    """Bring weights and optimizer to where they were at a checkpoint: bit by bit, or through the universal form."""
    log.info("loading the checkpoint of step %d", checkpoint.step)
    if checkpoints.fits(checkpoint, config, ranks.world_size):
        engine.load_checkpoint(str(paths.checkpoints), tag=checkpoint.tag, custom_load_fn=engines.load_trained)
    else:
        counts = {"steps": checkpoint.step, "skipped_steps": checkpoint.skipped_steps}
        engines.take_over(engine, checkpoints.universal(paths, checkpoint) / "zero", **counts)


def take_steps(
    config: TrainConfig,
    paths: RunPaths,
    ranks: Ranks,
    stop: StopRequest,
    engine: Any,
    mixture: Mixture,
    state: TrainState,
    num_steps: int,
    micro_batch: int,
    terms: Terms,
    size: health.ModelSize,
    dev: looks.DevSet | None,
) -> TrainState:
    """Optimizer steps until the last one, until dev says enough or somebody asks to stop; checkpoints when due."""
    known = {"done": state.step, "num_steps": num_steps, "skipped_steps": engine.skipped_steps}
    logger = StepLogger(config, paths, ranks, size, **known)
    place = {"rank": ranks.rank, "world_size": ranks.world_size, "micro_batch": micro_batch}
    waiting_since = time.monotonic()
    with contextlib.closing(prefetch(mixture, range(state.step, num_steps), **place)) as stream:
        for step, batches in stream:
            started = time.monotonic()
            # where a rank hangs, the others would wait in a collective; DeepSpeed's own groups know no other limit
            faulthandler.dump_traceback_later(config.launcher.hang_seconds, exit=True)
            figures = take_step(config, ranks, engine, batches, terms, state, num_steps)
            state = dataclasses.replace(state, step=step + 1, thresholds=thresholds_after(figures, state))
            figures |= {"data_wait_seconds": started - waiting_since, "seconds": time.monotonic() - started}
            figures = logger.measure(figures, batches)
            state, found = looks.evaluate_dev(config, ranks, engine, dev, state)
            over = state.step < num_steps and looks.is_over(config.early_stopping, state)
            logger.append(figures | found | ({"stopped_early": True} if over else {}), show=("loss", *terms))
            if over:
                log.info("step %d: nothing better on dev since step %d; the run ends", state.step, state.best_step)
                break
            stopping = ranks.any(bool(stop)) and state.step < num_steps
            if state.step < num_steps and (stopping or is_to_be_kept(config, state)):
                checkpoints.save(engine, paths, state, ranks, config)
            if stopping:
                log.info("asked to stop: saved at step %d of %d", state.step, num_steps)
                break
            waiting_since = time.monotonic()
    faulthandler.cancel_dump_traceback_later()
    logger.close()
    return state


def is_to_be_kept(config: TrainConfig, state: TrainState) -> bool:
    """Whether a checkpoint of this step is due: every so many steps, and of the best on dev if that is to leave."""
    is_best = checkpoints.keeps_best(config) and state.best_step == state.step
    return is_best or is_due(config.checkpoint.every_steps, state.step)


def take_step(
    config: TrainConfig,
    ranks: Ranks,
    engine: Any,
    batches: list[Batch],
    terms: Terms,
    state: TrainState,
    num_steps: int,
) -> dict[str, Any]:
    """One optimizer step over the global batch; its figures for metrics.jsonl.

    Each term's sum is divided by its count over all ranks and micro-batches, known before the first forward.
    DeepSpeed averages gradients over ranks, so the loss is multiplied by their number.
    """
    step, loss_config = state.step, config.loss
    # dropout is a function of the step, so that a resumed run draws the same
    torch.manual_seed(seed_from_values(config.seed, step, ranks.rank))
    weights = weights_at(loss_config, tuple(terms), step, num_steps, kd_factor=state.kd_factor)
    learning_rate = learning_rate_at(config.optimizer, step, num_steps)
    engines.set_learning_rate(engine, learning_rate)
    batches = [batch.to(ranks.device) for batch in batches]
    counts, ungated = global_counts(ranks, batches, terms)
    coefficients = {name: weights[name] * ranks.world_size / max(counts[name], 1.0) for name in terms}
    diagnose = is_due(loss_config.diagnostics_every_steps, step)
    totals = torch.zeros(len(sum_names(terms)), dtype=torch.float64, device=ranks.device)
    inputs = StepInputs(
        coefficients=coefficients,
        diagnose=diagnose,
        thresholds=state.thresholds or (0.0,) * len(classes_of(terms)),
        loss_scale=engines.loss_scale(engine),
    )
    for batch in batches:
        loss, sums = engine(batch, inputs)
        # a clone: the module's output itself DeepSpeed 0.19 divides by the accumulation all the same (ZeRO 0, float32)
        engine.backward(loss.clone(), scale_wrt_gas=False)
        engine.step()
        totals += sums
    values = dict(zip(sum_names(terms), ranks.all_reduce(totals).tolist(), strict=True))
    means = {name: values[name] / counts[name] if counts[name] else None for name in terms}
    loss_value = sum(weights[name] * (means[name] or 0.0) for name in terms)
    if not math.isfinite(loss_value):
        raise FloatingPointError(f"step {step + 1}: expected a finite loss, found {means}; lower the learning rate")
    figures = {"step": step + 1, "loss": loss_value, **means}
    figures |= {f"{name}_weight": weights[name] for name in terms}
    figures |= {f"{name}_count": int(counts[name]) for name in terms}
    if ungated:
        figures["gated_away_fraction"] = 1.0 - counts["kd"] / ungated
    figures |= {"learning_rate": learning_rate} | engine_figures(ranks, engine, batches)
    figures |= diagnostics.figures(values, counts, weights) if diagnose else {}
    return figures | class_figures(terms, values, counts)


def class_figures(terms: Terms, values: dict[str, float], counts: dict[str, float]) -> dict[str, list[float]]:
    """How often the student was hardened to each class, and the teacher is for it; empty where there are none."""
    if not classes_of(terms) or not counts["confidence"]:
        return {}
    fractions = [values[name] / counts["confidence"] for name in class_names(classes_of(terms))]
    half = len(fractions) // 2
    return {"own_class_fractions": fractions[:half], "teacher_class_fractions": fractions[half:]}


def thresholds_after(figures: dict[str, Any], state: TrainState) -> tuple[float, ...]:
    """The classes' thresholds for the next step."""
    if "own_class_fractions" not in figures:
        return state.thresholds
    own, teacher = figures["own_class_fractions"], figures["teacher_class_fractions"]
    return updated_thresholds(state.thresholds or (0.0,) * len(own), own=own, teacher=teacher)


def engine_figures(ranks: Ranks, engine: Any, batches: list[Batch]) -> dict[str, Any]:
    """What the engine says after a step, and what was read in it.

    `sequences` adds up the keys of the global batch, modulo 2^64: alike where the same sequences were read, however
    they were dealt to ranks.
    """
    keys = ranks.all_reduce(torch.cat([batch.keys_B for batch in batches]).sum())
    return {
        "grad_norm": float(engine.get_global_grad_norm() or 0.0),
        "skipped_steps": engine.skipped_steps,
        "sequences": f"{int(keys) % 2**64:016x}",
    }


def global_counts(ranks: Ranks, batches: list[Batch], terms: Terms) -> tuple[dict[str, float], float]:
    """How many positions each term reads in the global batch; how many kd would without its gate (0: it has none)."""
    is_gated = "kd" in terms and not terms["kd"].gate.is_open
    ungated = {"kd": dataclasses.replace(terms["kd"], gate=Gate())} if is_gated else terms
    found = []
    for asked in (terms, ungated) if is_gated else (terms,):
        counts = torch.stack([count_positions(batch, asked) for batch in batches]).sum(dim=0)
        found.append(ranks.all_reduce(counts).double().tolist())
    return dict(zip(terms, found[0], strict=True)), found[1][0] if is_gated else 0.0


# ------------------------------------------------------------------------------------ what is left behind


if __name__ == "__main__":
    run(Path(sys.argv[1]))
    exit_rank()
