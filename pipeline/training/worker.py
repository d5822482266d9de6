"""Stage two in one rank: build the run from its folder, train, export and score the result.

Started by torchrun as `python -m pipeline.training.worker RUN_FOLDER`; everything that it needs lies in that folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sys
from pathlib import Path
from typing import Any

import torch

from pipeline.config.options import load_config
from pipeline.config.schema import HeadPath, ModelConfig, TrainConfig
from pipeline.core.files import RunPaths
from pipeline.core.progress import log, start_logging
from pipeline.core.run_state import record_steps
from pipeline.core.runtime import Ranks, StopRequest, exit_rank, ranks_from_environment, release_memory
from pipeline.core.stopping import Stopped
from pipeline.data.mixture import fitting_micro_batch
from pipeline.models.compatibility import check_architecture
from pipeline.models.forward import Model
from pipeline.models.loading import open_model
from pipeline.models.lora import add_adapter
from pipeline.models.preflight import attention_of_copy
from pipeline.models.prepack import prepack
from pipeline.models.tokenizer import open_tokenizer, vocabulary_size
from pipeline.monitoring.health import model_size
from pipeline.objective.gates import Gate
from pipeline.training import checkpoints, dev_evaluation, partition
from pipeline.training import engine as engines
from pipeline.training.builders import class_ids, open_mixture, steps_of, term_options
from pipeline.training.export import export
from pipeline.training.finish import finish, scored_model
from pipeline.training.inputs import load_gold
from pipeline.training.options_read import reads_gold_text
from pipeline.training.run import Run, TrainState
from pipeline.training.run_lease import renewed_by_rank
from pipeline.training.steps import has_ended, save, take_steps
from pipeline.training.trust import open_trust
from pipeline.training.universal import load_universal


def run(folder: Path) -> None:
    """Train, export and score the run of a folder, from where it stands."""
    paths = RunPaths(folder=folder)
    config = load_config(paths.config, TrainConfig)
    stop = StopRequest(paths.stop)
    with contextlib.ExitStack() as lease, ranks_from_environment() as ranks:
        is_first = ranks.rank == 0
        level = logging.INFO if is_first else logging.ERROR
        start_logging(paths.log if is_first else None, level=level, quiet=config.launcher.quiet)
        if is_first:
            lease.enter_context(renewed_by_rank(paths))
        try:
            # the first rank alone looks for the model: NFS hides it for a while from a node that looked too early
            is_trained = is_first and (config.steps == 0 or paths.model.exists() or paths.result.exists())
            if ranks.any(is_trained) or train(config, paths, ranks, stop):
                release_memory()
                ranks = dataclasses.replace(ranks, stop=stop)
                finish(config, paths, ranks, lambda: open_exported(config, paths, ranks))
        except Stopped as stopped:
            log.info("%s", stopped)
        except Exception:
            log.exception("rank %d failed", ranks.rank)
            raise


def train(config: TrainConfig, paths: RunPaths, ranks: Ranks, stop: StopRequest) -> bool:
    """Train to the last step and export; False if asked to stop before (a checkpoint is saved then)."""
    _, tokenizer = open_tokenizer(config.student)
    run = open_run(config, paths, ranks, stop, tokenizer)
    state = resume(run)
    where = (ranks.world_size, ranks.device, config.deepspeed.zero_stage)
    if ranks.rank == 0:
        record_steps(paths, run.num_steps)
    log.info("step %d of %d, %d ranks on %s, ZeRO %d", state.step, run.num_steps, *where)
    if not has_ended(run, state):
        check_room(run)
        state = take_steps(run, state)
        if not has_ended(run, state):
            return False
        save(run, state)  # if the export or the scores fail, they are made again from here without a step
    if checkpoints.keeps_best(config) and state.best_step != state.step:
        load_checkpoint(run, checkpoints.of_best(paths, state))
    export(run, tokenizer)
    partition.release(run.engine)
    return True


def check_room(run: Run) -> None:
    """Refuse to train where the disk cannot hold a checkpoint."""
    parameters = run.engine.module.student.parameters()
    size_bytes = checkpoints.checkpoint_bytes(parameters, zero_stage=run.config.deepspeed.zero_stage)
    checkpoints.check_room(run.paths, size_bytes, run.config)


def open_exported(config: TrainConfig, paths: RunPaths, ranks: Ranks) -> Model:
    """The model that is scored, as its users will load it: one for each rank, or at ZeRO 3 a part on each."""
    model_config = scored_model(config, paths)
    if config.deepspeed.zero_stage < 3:
        return prepack(open_model(model_config, ranks.device))
    model_config = with_attention(model_config, ranks)
    model = open_model(model_config, ranks.device, partition=partition.scoring_options(config))
    partition.run_in_parts(model, config)
    check_architecture(model)
    return model


def with_attention(model: ModelConfig, ranks: Ranks) -> ModelConfig:
    """The options with a kernel that is chosen on a small copy: a partitioned model cannot run before its engine."""
    return dataclasses.replace(model, attention=model.attention or attention_of_copy(model, ranks.device))


def open_run(config: TrainConfig, paths: RunPaths, ranks: Ranks, stop: StopRequest, tokenizer: Any) -> Run:
    """From options to a value: data, student and engine of this rank."""
    mixture = open_mixture(config, load_gold(paths) if reads_gold_text(config) else None)
    num_steps = steps_of(config, mixture)
    dev_evaluation.check(config, num_steps)
    micro_batch = fitting_micro_batch(config.global_batch, world_size=ranks.world_size, at_most=config.micro_batch)
    if micro_batch < min(config.micro_batch, part := config.global_batch // ranks.world_size):
        log.warning(
            "micro_batch=%d does not divide the %d sequences that a rank reads in a step: they are taken %d at a time; "
            "a multiple as global_batch would be faster",
            *(config.micro_batch, part, micro_batch),
        )
    accumulation = config.global_batch // (ranks.world_size * micro_batch)
    options = engines.all_options(config, micro_batch=micro_batch, accumulation=accumulation)
    gate, position_weight = open_trust(config, paths, mixture)
    module = build_module(config, ranks, gate, tokenizer, options)
    student, zero_stage = module.student, config.deepspeed.zero_stage
    size, dev = model_size(student), dev_evaluation.open_dev(config, paths, tokenizer)
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
        position_weight=position_weight,
    )


def build_module(
    config: TrainConfig, ranks: Ranks, gate: Gate, tokenizer: Any, options: dict[str, Any]
) -> engines.StudentWithLoss:
    """The student, with its adapter if it has one, and the objective around it; `options` are DeepSpeed's."""
    torch.manual_seed(config.seed)
    is_partitioned = config.deepspeed.zero_stage == 3
    model_config = with_attention(config.student, ranks) if is_partitioned else config.student
    student = open_model(model_config, ranks.device, partition=options if is_partitioned else None)
    if config.student.adapter is not None:
        add_adapter(student, config.student.adapter, seed=config.seed)
    if config.gradient_checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    classes = class_ids(config.loss.confidence.choices, tokenizer)
    return engines.StudentWithLoss(
        student.train(),
        vocabulary_size=vocabulary_size(tokenizer),
        terms=term_options(config.loss, gate, classes),
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
        load_universal(run.engine, run.paths, checkpoint)


if __name__ == "__main__":
    run(Path(sys.argv[1]))
    exit_rank()
