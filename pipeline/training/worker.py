"""Stage two in one rank: build the run from its folder, train, export; the first rank scores the result.

Started by torchrun as `python -m pipeline.training.worker RUN_FOLDER`; everything that it needs lies in that folder.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from pathlib import Path
from typing import Any

import torch

from pipeline.config.options import load_config
from pipeline.config.schema import HeadPath, TrainConfig
from pipeline.core.files import RunPaths
from pipeline.core.progress import log, start_logging
from pipeline.core.run_state import record_steps
from pipeline.core.runtime import Ranks, StopRequest, exit_rank, ranks_from_environment, release_memory
from pipeline.data.mixture import Mixture, fitting_micro_batch
from pipeline.models.compatibility import check_architecture
from pipeline.models.loading import open_model
from pipeline.models.lora import add_adapter
from pipeline.models.tokenizer import open_tokenizer, vocabulary_size
from pipeline.monitoring.health import model_size
from pipeline.training import checkpoints, dev_evaluation
from pipeline.training import engine as engines
from pipeline.training.builders import class_ids, open_gate, open_mixture, steps_of, term_options
from pipeline.training.export import export
from pipeline.training.finish import finish
from pipeline.training.inputs import load_gold
from pipeline.training.options_read import reads_gold_text
from pipeline.training.run import Run, TrainState
from pipeline.training.run_lease import renewed_by_rank
from pipeline.training.steps import take_steps


def run(folder: Path) -> None:
    """Train, export and score the run of a folder, from where it stands."""
    paths = RunPaths(folder=folder)
    config = load_config(paths.config, TrainConfig)
    stop = StopRequest(paths.stop)
    with contextlib.ExitStack() as lease:
        with ranks_from_environment() as ranks:
            is_first = ranks.rank == 0
            level = logging.INFO if is_first else logging.ERROR
            start_logging(paths.log if is_first else None, level=level, quiet=config.launcher.quiet)
            if is_first:
                lease.enter_context(renewed_by_rank(paths))
            try:
                is_trained = paths.model.exists() or train(config, paths, ranks, stop)
            except Exception:
                log.exception("rank %d failed", ranks.rank)
                raise
        # the exported folder is scored, as its users will load it; after several nodes by the driver, because torchrun
        # waits five minutes for a node that goes on, and then ends it
        if is_trained and is_first and config.launcher.num_nodes == 1:
            release_memory()
            finish(config, paths)


def train(config: TrainConfig, paths: RunPaths, ranks: Ranks, stop: StopRequest) -> bool:
    """Train to the last step and export; False if asked to stop before (a checkpoint is saved then)."""
    _, tokenizer = open_tokenizer(config.student)
    run = open_run(config, paths, ranks, stop, tokenizer)
    state = resume(run)
    where = (ranks.world_size, ranks.device, config.deepspeed.zero_stage)
    if ranks.rank == 0:
        record_steps(paths, run.num_steps)
    log.info("step %d of %d, %d ranks on %s, ZeRO %d", state.step, run.num_steps, *where)
    state = take_steps(run, state)
    if state.step < run.num_steps and not dev_evaluation.is_over(config.early_stopping, state):
        return False
    if checkpoints.keeps_best(config) and state.best_step != state.step:
        load_checkpoint(run, checkpoints.of_best(paths, state))
    export(run, tokenizer)
    return True


def open_run(config: TrainConfig, paths: RunPaths, ranks: Ranks, stop: StopRequest, tokenizer: Any) -> Run:
    """From options to a value: data, student and engine of this rank."""
    mixture = open_mixture(config, load_gold(paths) if reads_gold_text(config) else [])
    num_steps = steps_of(config, mixture)
    dev_evaluation.check(config, num_steps)
    micro_batch = fitting_micro_batch(config.global_batch, world_size=ranks.world_size, at_most=config.micro_batch)
    module = build_module(config, ranks, mixture, tokenizer, micro_batch=micro_batch)
    student, zero_stage = module.student, config.deepspeed.zero_stage
    size_bytes = checkpoints.checkpoint_bytes(student.parameters(), zero_stage=zero_stage)
    checkpoints.check_room(paths, size_bytes, config)
    size, dev = model_size(student), dev_evaluation.open_dev(config, paths, tokenizer)
    accumulation = config.global_batch // (ranks.world_size * micro_batch)
    engine = engines.build(module, config, micro_batch=micro_batch, accumulation=accumulation)
    if zero_stage == 3:  # a partitioned student runs only inside the engine
        check_architecture(student)
    return Run(
        config=config,
        paths=paths,
        ranks=ranks,
        stop=stop,
        engine=engine,
        mixture=mixture,
        terms=module.terms,
        num_steps=num_steps,
        micro_batch=micro_batch,
        model_size=size,
        dev=dev,
    )


def build_module(
    config: TrainConfig, ranks: Ranks, mixture: Mixture, tokenizer: Any, *, micro_batch: int
) -> engines.StudentWithLoss:
    """The student, with its adapter if it has one, and the objective around it."""
    torch.manual_seed(config.seed)
    partition = None
    if config.deepspeed.zero_stage == 3:
        partition = engines.engine_options(config) | {"train_micro_batch_size_per_gpu": micro_batch}
    student = open_model(config.student, ranks.device, partition=partition)
    if config.student.adapter is not None:
        add_adapter(student, config.student.adapter, seed=config.seed)
    if config.gradient_checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    classes = class_ids(config.loss.confidence.choices, tokenizer)
    return engines.StudentWithLoss(
        student.train(),
        vocabulary_size=vocabulary_size(tokenizer),
        terms=term_options(config.loss, open_gate(config.loss.kd, mixture.readers), classes),
        fused=config.loss.head is HeadPath.fused,
    )


def resume(run: Run) -> TrainState:
    """Load the published checkpoint; a run without one begins at step 0."""
    checkpoint = checkpoints.published(run.paths)
    if checkpoint is None:
        return TrainState()
    load_checkpoint(run, checkpoint)
    return checkpoint.train_state()


def load_checkpoint(run: Run, checkpoint: checkpoints.Published) -> None:
    """Restore weights and optimizer: bit by bit, or through the universal form for other ranks or another stage."""
    log.info("loading the checkpoint of step %d", checkpoint.step)
    if checkpoints.fits(checkpoint, run.config, run.ranks.world_size):
        run.engine.load_checkpoint(str(run.paths.checkpoints), tag=checkpoint.tag, custom_load_fn=engines.load_trained)
    else:
        folder = checkpoints.universal(run.paths, checkpoint) / "zero"
        engines.load_universal(run.engine, folder, steps=checkpoint.step, skipped_steps=checkpoint.skipped_steps)


if __name__ == "__main__":
    run(Path(sys.argv[1]))
    exit_rank()
