"""Stage two, one rank: the student learns from shards and gold under the combined objective.

Started by torchrun as `python -m pipeline.train RUN_FOLDER`; everything it needs stands in that folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch

from pipeline import config as configs
from pipeline import engine as engines
from pipeline import models, ramps
from pipeline.config import LossConfig, OptimizerConfig, TrainConfig
from pipeline.corpus import known_sequences
from pipeline.dataset import Mixture, fitting_micro_batch, prefetched
from pipeline.downloads import Downloads
from pipeline.evaluate import score
from pipeline.exam import open_exam
from pipeline.files import Metrics, RunPaths, content_hash, sync_files, sync_folder, write_json
from pipeline.losses import TermOptions, count_positions
from pipeline.progress import Progress, log, start_logging
from pipeline.runtime import Ranks, StopRequest, compute_device, leave, ranks_from_environment, release_memory
from pipeline.shards import ShardReader
from pipeline.store import one_place
from pipeline.text import open_text
from pipeline.types import Batch, TrainState


def run(folder: Path) -> None:
    """Train, export and score what a run folder describes, from where it stands."""
    paths = RunPaths(folder=folder)
    config = configs.load(paths.config, TrainConfig)
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
    _, tokenizer = models.open_tokenizer(config.student)
    mixture = open_mixture(config, tokenizer)
    num_steps = steps_of(config, mixture)
    micro_batch = fitting_micro_batch(config.global_batch, world_size=ranks.world_size, at_most=config.micro_batch)
    torch.manual_seed(config.seed)
    student = models.open_model(config.student, ranks.device)
    module = engines.StudentWithLoss(
        student.train(), vocabulary_size=models.vocabulary_size(tokenizer), terms=term_options(config.loss)
    )
    zero_stage = config.deepspeed.zero_stage
    engine = engines.build(
        module,
        zero_stage=zero_stage,
        dtype=config.student.dtype.name,
        micro_batch=micro_batch,
        accumulation=config.global_batch // (ranks.world_size * micro_batch),
        max_grad_norm=config.optimizer.max_grad_norm,
        betas=(config.optimizer.beta1, config.optimizer.beta2),
        epsilon=config.optimizer.epsilon,
        weight_decay=config.optimizer.weight_decay,
        overrides=config.deepspeed.overrides,
    )
    state = engines.load_checkpoint(engine, paths)
    where = (ranks.world_size, ranks.device, zero_stage)
    log.info("step %d of %d, %d ranks on %s, ZeRO %d", state.step, num_steps, *where)
    state = take_steps(config, paths, ranks, stop, engine, mixture, state, num_steps, micro_batch)
    if state.step < num_steps:
        return False
    export(engine, student, tokenizer, paths, ranks, zero_stage=zero_stage)
    return True


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
) -> TrainState:
    """Optimizer steps until the last one or until somebody asks to stop; checkpoints at the steps that are due."""
    quiet, every_seconds = ranks.rank != 0, config.launcher.log_every_seconds
    progress = Progress(
        config.name, total=num_steps, unit=" steps", done=state.step, log_every_seconds=every_seconds, quiet=quiet
    )
    metrics = None if quiet else Metrics(paths.metrics, keep_steps=state.step)
    place = {"rank": ranks.rank, "world_size": ranks.world_size, "micro_batch": micro_batch}
    every = config.checkpoint.every_steps
    waiting_since = time.monotonic()
    with contextlib.closing(prefetched(mixture, range(state.step, num_steps), **place)) as stream:
        for step, batches in stream:
            started = time.monotonic()
            figures = take_step(config, ranks, engine, batches, step, num_steps)
            state = TrainState(step=step + 1)
            figures |= {"data_wait_seconds": started - waiting_since, "seconds": time.monotonic() - started}
            if metrics is not None:
                metrics.append(figures)
            progress.advance(1, **{k: figures[k] for k in ("loss", "lm", "kd") if figures[k] is not None})
            stopping = ranks.any(bool(stop)) and state.step < num_steps
            if stopping or (every and state.step % every == 0 and state.step < num_steps):
                zero_stage, keep = config.deepspeed.zero_stage, config.checkpoint.keep
                engines.save_checkpoint(engine, paths, state, ranks, zero_stage=zero_stage, keep=keep)
            if stopping:
                log.info("asked to stop: saved at step %d of %d", state.step, num_steps)
                break
            waiting_since = time.monotonic()
    progress.close()
    return state


def take_step(
    config: TrainConfig, ranks: Ranks, engine: Any, batches: list[Batch], step: int, num_steps: int
) -> dict[str, Any]:
    """One optimizer step over the global batch; its figures for metrics.jsonl.

    Each term's sum is divided by its count over all ranks and micro-batches, known before the first forward.
    DeepSpeed averages gradients over ranks, so the loss is multiplied by their number.
    """
    # dropout is a function of the step, so that a resumed run draws the same
    torch.manual_seed(int(content_hash([config.seed, step, ranks.rank])[:15], 16))
    terms = term_options(config.loss)
    weights = weights_at(config.loss, step, num_steps)
    learning_rate = learning_rate_at(config.optimizer, step, num_steps)
    engines.set_learning_rate(engine, learning_rate)
    batches = [batch.to(ranks.device) for batch in batches]
    counts = ranks.sum(torch.stack([count_positions(batch, terms) for batch in batches]).sum(dim=0))
    divisors = dict(zip(terms, counts.double().tolist(), strict=True))
    totals = torch.zeros(len(terms), dtype=torch.float64, device=ranks.device)
    for batch in batches:
        loss, term_totals = engine(batch, weights, divisors)
        engine.backward(loss * ranks.world_size, scale_wrt_gas=False)
        engine.step()
        totals += term_totals
    tokens = ranks.sum(torch.tensor(sum(batch.input_ids_BS.numel() for batch in batches), device=ranks.device))
    values = dict(zip(terms, ranks.sum(totals).tolist(), strict=True))
    means = {name: values[name] / divisors[name] if divisors[name] else None for name in terms}
    loss_value = sum(weights[name] * (means[name] or 0.0) for name in terms)
    if not math.isfinite(loss_value):
        raise FloatingPointError(f"step {step + 1}: expected a finite loss, found {means}; lower the learning rate")
    return {
        "step": step + 1,
        "loss": loss_value,
        **means,
        **{f"{name}_weight": weights[name] for name in terms},
        **{f"{name}_count": int(divisors[name]) for name in terms},
        "learning_rate": learning_rate,
        "grad_norm": float(engine.get_global_grad_norm() or 0.0),
        "skipped_steps": engine.skipped_steps,
        "tokens": int(tokens),
    }


# ------------------------------------------------------------------------ from options to plain values


def term_options(loss: LossConfig) -> dict[str, TermOptions]:
    """The terms of the objective as the losses know them."""
    return {
        "lm": TermOptions(on=tuple(source.name for source in loss.lm.on)),
        "kd": TermOptions(
            on=tuple(source.name for source in loss.kd.on),
            temperature=loss.kd.temperature,
            temperature_squared=loss.kd.temperature_squared,
        ),
    }


def weights_at(loss: LossConfig, step: int, num_steps: int) -> dict[str, float]:
    """The weight of each term in a step."""
    return {
        name: term.weight * ramps.ramp(step, num_steps=num_steps, **configs.result_options(term.ramp))
        for name, term in (("lm", loss.lm), ("kd", loss.kd))
    }


def learning_rate_at(optimizer: OptimizerConfig, step: int, num_steps: int) -> float:
    """The learning rate of a step."""
    return ramps.learning_rate(
        step,
        num_steps=num_steps,
        peak=optimizer.learning_rate,
        warmup_fraction=optimizer.warmup_fraction,
        shape=optimizer.schedule.name,
        final_fraction=optimizer.final_fraction,
    )


def open_mixture(config: TrainConfig, tokenizer: Any) -> Mixture:
    """The two streams of a run; gold is read, tokenized and packed here, the cache is opened."""
    gold, reader = [], None
    if config.gold is not None and config.gold_fraction > 0:
        gold = known_sequences(open_text(config.gold, "gold"), tokenizer, window=config.window)
    if config.cache is not None and config.gold_fraction < 1:
        downloads = Downloads(folder=Path(config.downloads.dir), limit_bytes=config.downloads.bytes)
        reader = ShardReader(one_place(config.cache, "cache"), k=config.k, downloads=downloads)
    return Mixture(
        gold=gold,
        reader=reader,
        seed=config.seed,
        global_batch=config.global_batch,
        gold_fraction=config.gold_fraction,
    )


def steps_of(config: TrainConfig, mixture: Mixture) -> int:
    """Optimizer steps of a run: as given, or as many as the epochs take."""
    if config.steps is not None:
        return config.steps
    assert config.epochs is not None
    if mixture.reader is None:
        return max(math.ceil(config.epochs * len(mixture.gold) / config.global_batch), 1)
    corpus_share = config.global_batch * (1.0 - config.gold_fraction)
    return max(math.ceil(config.epochs * sum(mixture.reader.blocks) / corpus_share), 1)


# ------------------------------------------------------------------------------------ what is left behind


def export(engine: Any, student: Any, tokenizer: Any, paths: RunPaths, ranks: Ranks, *, zero_stage: int) -> None:
    """Write the model folder under another name and rename it: it exists only if it is whole."""
    weights = engines.student_weights(engine, zero_stage)
    if ranks.rank == 0:
        assert weights is not None
        unfinished = paths.model.with_name(".model.tmp")
        shutil.rmtree(unfinished, ignore_errors=True)
        models.save_model(student, weights, tokenizer, unfinished)
        sync_files(unfinished)
        unfinished.rename(paths.model)
        sync_folder(paths.folder)
    ranks.wait()


def finish(config: TrainConfig, paths: RunPaths) -> None:
    """Score the exported folder on dev and test, write the result, drop the checkpoints."""
    exported = dataclasses.replace(config.student, path=str(paths.model), revision=None, num_layers=None)
    _, tokenizer = models.open_tokenizer(exported)
    model = models.open_model(exported, compute_device())
    result: dict[str, Any] = {"name": config.name, "seed": config.seed}
    for split, text in (("dev", config.dev), ("test", config.test)):
        if text is None:
            continue
        scores, predictions = score(
            model,
            open_exam(open_text(text, split), tokenizer, longest=models.longest_sequence(paths.model)),
            vocabulary_size=models.vocabulary_size(tokenizer),
            batch_tokens=config.scoring.batch_tokens,
            teacher_predictions=config.scoring.teacher_predictions if split == "test" else None,
            log_every_seconds=config.launcher.log_every_seconds,
        )
        predictions.write_parquet(paths.predictions(split))
        result[split] = dataclasses.asdict(scores)
    steps = Metrics.read(paths.metrics)
    result["steps"] = len(steps)
    result["train_seconds"] = sum(row["seconds"] + row["data_wait_seconds"] for row in steps)
    shutil.rmtree(paths.checkpoints, ignore_errors=True)
    write_json(paths.result, result)


if __name__ == "__main__":
    run(Path(sys.argv[1]))
    leave()
