"""Reject contradictory options of training before reading any input."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import itertools
from typing import Any

from pipeline.config.schema import (
    DeepspeedConfig,
    Dtype,
    ExportedStep,
    LossConfig,
    Offload,
    Optimizer,
    Shape,
    Source,
    TrainConfig,
)
from pipeline.config.validate import at_least, fraction, plain_name, positive, seeds
from pipeline.config.validate_objective import check_adaptive_weights, check_divergence
from pipeline.config.validate_packages import check_deepspeed, check_trackers
from pipeline.config.validate_trust import check_trust
from pipeline.core.folds import parse_fold
from pipeline.core.types import InputError


def check_train(config: TrainConfig) -> None:
    """Reject contradictory options before reading any input.

    Without training (steps=0) only the student, the held-out texts and how ranks are started are read, at ZeRO 3 also
    the engine's options: the others are not checked.
    """
    plain_name(name=config.name)
    seeds(seed=config.seed)
    at_least(1, student_num_layers=1 if config.student.num_layers is None else config.student.num_layers)
    at_least(0, steps=0 if config.steps is None else config.steps)
    at_least(1, batch_tokens=config.scoring.batch_tokens)
    at_least(0, max_new_tokens=config.scoring.max_new_tokens, few_shot=config.scoring.few_shot)
    if (config.steps is None) == (config.epochs is None):
        raise InputError(f"expected one of steps and epochs, found steps={config.steps}, epochs={config.epochs}")
    _check_more_tests(config)
    _check_jobs(config)
    _check_stage(config)
    if config.steps != 0:
        _check_training(config)
    elif config.dev is None and config.test is None and not config.more_tests:
        raise InputError(
            "steps=0: expected dev, test or more_tests, because the student is scored as it is, found none of them"
        )


def _check_jobs(config: TrainConfig) -> None:
    at_least(1, jobs=config.launcher.jobs)
    if config.launcher.jobs > 1 and config.launcher.num_nodes > 1:
        raise InputError(
            f"launcher.jobs={config.launcher.jobs}: expected runs on this machine alone, found launcher.num_nodes="
            f"{config.launcher.num_nodes}, which are whole nodes; leave out one of the two"
        )


def _check_more_tests(config: TrainConfig) -> None:
    for name in config.more_tests:
        plain_name(more_tests=name)
        if name in ("dev", "test"):
            raise InputError(f"more_tests: expected names other than dev and test, found {name}; choose another")
    unknown = [name for name in config.out_of_domain if name not in config.more_tests]
    if unknown:
        raise InputError(f"out_of_domain: expected names of more_tests {list(config.more_tests)}, found {unknown}")


def _check_training(config: TrainConfig) -> None:
    if config.scoring.few_shot > 0:
        raise InputError(
            f"scoring.few_shot={config.scoring.few_shot}: expected steps=0, because a trained student is scored "
            "without examples, found training; score its model folder with scripts/evaluate.py or experiment=few_shot"
        )
    kd, terms = config.loss.kd, terms_of(config.loss)
    at_least(2, window=config.window)
    at_least(1, global_batch=config.global_batch, micro_batch=config.micro_batch)
    at_least(1, num_processes=1 if config.launcher.num_processes is None else config.launcher.num_processes)
    at_least(0, max_grad_norm=config.optimizer.max_grad_norm)
    if config.epochs is not None:
        positive(epochs=config.epochs)
    at_least(0, checkpoint_every_steps=config.checkpoint.every_steps)
    at_least(1, checkpoint_keep=config.checkpoint.keep, downloads_bytes=config.downloads.bytes)
    at_least(1, shard_bytes=config.export.shard_bytes)
    at_least(0, keep_every_steps=config.checkpoint.keep_every_steps, leave_seconds=config.launcher.leave_seconds)
    positive(hang_seconds=config.launcher.hang_seconds, time_limit=config.launcher.time_limit or 1.0)
    positive(kd_temperature=kd.temperature, learning_rate=config.optimizer.learning_rate)
    fraction(gold_fraction=config.gold_fraction, warmup_fraction=config.optimizer.warmup_fraction)
    fraction(decay_fraction=config.optimizer.decay_fraction)
    _check_objective(config, terms)
    _check_dev_evaluation(config)
    check_trackers(config.trackers)
    _check_sources(config)
    _check_mixing(config)
    _check_engine(config)
    weights = {name: term.weight for name, term in terms.items()}
    if min(weights.values()) < 0:
        raise InputError(f"loss weights: expected 0 or more, found {weights}")
    read = {source for name, term in terms.items() if weights[name] > 0 for source in term.on}
    if not (Source.gold in read and config.gold_fraction > 0) and not (
        Source.corpus in read and config.gold_fraction < 1
    ):
        raise InputError("no term with a weight above 0 reads any text of this run; check loss.*.weight, loss.*.on")


def _check_sources(config: TrainConfig) -> None:
    if config.gold_fraction > 0 and config.gold is None and config.gold_cache is None:
        raise InputError(
            f"gold_fraction is {config.gold_fraction} but gold is null; give a gold set or gold_fraction=0"
        )
    if config.gold_fraction < 1 and config.cache is None:
        raise InputError(f"gold_fraction is {config.gold_fraction} but cache is null; give a cache or gold_fraction=1")


def terms_of(loss: LossConfig) -> dict[str, Any]:
    """The options of every term: each field of the objective that has a weight."""
    terms = {item.name: getattr(loss, item.name) for item in dataclasses.fields(loss)}
    return {name: term for name, term in terms.items() if hasattr(term, "weight")}


def _check_mixing(config: TrainConfig) -> None:
    at_least(1, curriculum_parts=config.curriculum_parts)
    if config.leave_out is not None:
        parse_fold(config.leave_out, "leave_out")
    num_caches = 1 + len(config.more_caches)
    if config.more_caches and config.cache is None:
        raise InputError(f"more_caches: expected them beside a cache, found cache=null and {config.more_caches}")
    if config.cache_weights is not None:
        positive(cache_weights=min(config.cache_weights, default=0.0))
        if len(config.cache_weights) != num_caches:
            raise InputError(
                f"cache_weights: expected {num_caches}, one for cache and one for each of more_caches, found "
                f"{config.cache_weights}"
            )
    if config.gold_epochs is not None:
        positive(gold_epochs=config.gold_epochs)
        if config.gold_fraction == 1:
            raise InputError(
                f"gold_epochs: expected null with gold_fraction=1, because nothing else could fill a batch, found "
                f"{config.gold_epochs}; use epochs={config.gold_epochs}"
            )
    tokens = config.global_batch_tokens
    if tokens is not None and (tokens < config.window or tokens % config.window != 0):
        raise InputError(
            f"global_batch_tokens: expected a multiple of window {config.window}, found {tokens}; for example "
            f"{max(tokens // config.window, 1) * config.window}"
        )


def _check_stage(config: TrainConfig) -> None:
    """How ranks are started and what each holds: at ZeRO 3 a student is also scored so."""
    positive(hang_seconds=config.launcher.hang_seconds)
    if not 0 <= config.deepspeed.zero_stage <= 3:
        raise InputError(f"deepspeed.zero_stage: expected 0 to 3, found {config.deepspeed.zero_stage}")
    if config.launcher.num_processes is not None:
        at_least(1, num_processes=config.launcher.num_processes)
    if config.steps != 0 or config.deepspeed.zero_stage == 3:
        check_deepspeed(importlib.metadata.version("deepspeed"))
        _check_nvme(config.deepspeed)


def _check_engine(config: TrainConfig) -> None:
    deepspeed, checkpoint = config.deepspeed, config.checkpoint
    if config.student.dtype is Dtype.float16 and deepspeed.zero_stage == 0:
        raise InputError(
            "student.dtype=float16: expected deepspeed.zero_stage 1 to 3, because DeepSpeed does not scale the loss at "
            "ZeRO 0, found 0; use zero_stage=1, or bfloat16"
        )
    if deepspeed.offload is not Offload.none and deepspeed.zero_stage == 0:
        raise InputError(
            f"deepspeed.offload={deepspeed.offload.name}: expected zero_stage 1 to 3, because ZeRO moves what it "
            "partitions, found 0; use deepspeed=zero2_offload"
        )
    _check_adapter(config)
    _check_optimizer(config)
    every = checkpoint.every_steps
    if checkpoint.keep_every_steps and (every == 0 or checkpoint.keep_every_steps % every != 0):
        raise InputError(
            f"checkpoint.keep_every_steps: expected a multiple of checkpoint.every_steps {every}, found "
            f"{checkpoint.keep_every_steps}"
        )


def _check_nvme(deepspeed: DeepspeedConfig) -> None:
    if (deepspeed.offload is Offload.nvme) != (deepspeed.nvme_path is not None):
        raise InputError(
            f"deepspeed.nvme_path: expected a folder with offload=nvme and null without, found {deepspeed.nvme_path} "
            f"with offload={deepspeed.offload.name}"
        )


def _check_optimizer(config: TrainConfig) -> None:
    if config.optimizer.schedule is Shape.step:
        drops = [config.optimizer.warmup_fraction, *config.optimizer.step_at_fractions, 1.0]
        if not drops[1:-1] or any(later <= earlier for earlier, later in itertools.pairwise(drops)):
            raise InputError(
                "optimizer.step_at_fractions: expected one or more fractions in ascending order between "
                f"optimizer.warmup_fraction {drops[0]} and 1, found {drops[1:-1]}; for example [0.5, 0.75]"
            )
        positive(step_factor=config.optimizer.step_factor)
    if config.optimizer.name is not Optimizer.muon:
        return
    positive(muon_learning_rate=config.optimizer.muon_learning_rate)
    if config.optimizer.max_grad_norm > 0:
        raise InputError(
            "optimizer.name=muon: expected optimizer.max_grad_norm=0, because at some ZeRO stages DeepSpeed would clip "
            f"Muon's updates after they are orthogonalised, found {config.optimizer.max_grad_norm}"
        )
    if config.student.dtype is Dtype.float16 or config.deepspeed.offload is not Offload.none:
        raise InputError(
            "optimizer.name=muon: expected float32 or bfloat16 without offload, found "
            f"{config.student.dtype.name} with offload={config.deepspeed.offload.name}; use those, or adamw"
        )


def _check_adapter(config: TrainConfig) -> None:
    adapter = config.student.adapter
    if adapter is None:
        return
    if importlib.util.find_spec("peft") is None:
        raise InputError('student.adapter: expected the package peft, found none; pip install ".[lora]"')
    at_least(1, adapter_rank=adapter.rank, adapter_alpha=adapter.alpha)
    fraction(adapter_dropout=adapter.dropout)
    if adapter.dora and config.deepspeed.zero_stage == 3:
        raise InputError(
            "student.adapter.dora: expected deepspeed.zero_stage 0 to 2, because DoRA starts from the norms of "
            "complete weights, found 3; use deepspeed=zero2 or dora=false"
        )
    if adapter.targets == []:
        raise InputError("student.adapter.targets: expected names of linear layers or null for all, found []")


def _check_objective(config: TrainConfig, terms: dict[str, Any]) -> None:
    loss = config.loss
    for name, term in terms.items():
        if name != "lm" and Source.gold in term.on and term.weight > 0 and config.gold_cache is None:
            raise InputError(
                f"loss.{name}.on: expected [corpus], because gold carries no output of the teacher, found gold in it; "
                "capture the gold set as well and give its cache as gold_cache"
            )
        fraction(**{f"loss.{name}.ramp.{end}": getattr(term.ramp, end) for end in ("start_fraction", "end_fraction")})
        if term.ramp.end_fraction < term.ramp.start_fraction:
            raise InputError(
                f"loss.{name}.ramp.end_fraction: expected at least start_fraction {term.ramp.start_fraction}, found "
                f"{term.ramp.end_fraction}"
            )
    check_divergence(loss.kd)
    check_trust(config)
    at_least(0, diagnostics_every_steps=loss.diagnostics_every_steps)
    check_adaptive_weights(config)


def _check_dev_evaluation(config: TrainConfig) -> None:
    early = config.early_stopping
    at_least(0, evaluate_every_steps=config.evaluate_every_steps, early_stopping_patience=early.patience)
    at_least(0, early_stopping_min_delta=early.min_delta)
    at_least(1, health_max_skipped_steps=config.health.max_skipped_steps)
    at_least(1, health_warn_grad_norm=config.health.warn_grad_norm)
    if config.evaluate_every_steps > 0 and config.dev is None:
        raise InputError(
            f"evaluate_every_steps={config.evaluate_every_steps}: expected dev, the text to evaluate on, found null; "
            "set dev or evaluate_every_steps=0"
        )
    if early.patience > 0 and config.evaluate_every_steps == 0:
        raise InputError(
            f"early_stopping.patience={early.patience}: expected evaluate_every_steps of 1 or more, found 0; set "
            "evaluate_every_steps, or early_stopping.patience=0"
        )
    if config.export.what is ExportedStep.best and config.evaluate_every_steps == 0:
        raise InputError(
            "export.what=best: expected dev and evaluate_every_steps of 1 or more, found 0; set both, "
            "or use export.what=last"
        )
