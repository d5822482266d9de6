"""Every option of every stage: its default, its unit, one sentence. YAML under `conf/` holds choices only.

An option marked `result=False` changes where, when or how fast a run works but not what comes out of it: it
stays out of the run's hash. One marked `content=True` names files, which enter the hash by what is in them; one
marked `address=True` may name a place in an object store (s3://bucket/prefix) instead of a local path.
"""

from __future__ import annotations

import dataclasses
import glob
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from omegaconf import MISSING, OmegaConf

from pipeline.types import InputError

T = TypeVar("T")

Dtype = Enum("Dtype", ["float32", "bfloat16"])
Targets = Enum("Targets", ["all", "completion", "next"])
Malformed = Enum("Malformed", ["stop", "skip"])
Kind = Enum("Kind", ["topk", "sampled", "hybrid"])
Source = Enum("Source", ["gold", "corpus"])
Shape = Enum("Shape", ["constant", "linear", "cosine", "step"])


def option(default: Any, help: str, *, result: bool = True, content: bool = False, address: bool = False) -> Any:
    """A dataclass field that knows its sentence and whether it changes what a run produces."""
    metadata = {"help": help, "result": result, "content": content, "address": address}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class ModelConfig:
    path: str = option(
        MISSING,
        "folder of a model and its tokenizer in Hugging Face layout, a glob matching one, or a hub name",
        content=True,
    )
    revision: str | None = option(None, "commit or tag of a hub name")
    dtype: Dtype = option(Dtype.bfloat16, "what the weights are loaded and run as")
    attention: str | None = option(
        None, "attention kernel by transformers' name (sdpa, eager, ...); null: its choice for the model", result=False
    )
    num_layers: int | None = option(None, "keep only this many first layers; null: all of them")
    trust_remote_code: bool = option(False, "run Python code that comes with the model; off unless you trust it")


@dataclass
class ColumnsConfig:
    text: str = option("text", "column of plain text")
    prompt: str = option("prompt", "column of what comes before the completion")
    completion: str = option("completion", "column of what the model should say")
    messages: str = option("messages", "column of a chat, a list of {role, content}")
    choices: str = option("choices", "column of alternative completions, for scoring")
    answer: str = option("answer", "column of the index of the right choice")


@dataclass
class TextConfig:
    files: list[str] = option(
        MISSING,
        "files, folders or globs of .jsonl, .jsonl.gz, .jsonl.zst, .parquet or .txt",
        content=True,
    )
    targets: Targets = option(
        Targets.all, "positions to supervise: all, the completion's, or only the next token after the prompt"
    )
    malformed: Malformed = option(Malformed.stop, "on a malformed record: stop, or skip and count it")
    end_token: bool = option(True, "append the tokenizer's end token to a text or completion")
    columns: ColumnsConfig = option(ColumnsConfig, "names of the input's columns")


@dataclass
class CaptureConfig:
    name: str = option(MISSING, "first part of the cache folder's name")
    caches_dir: str = option("caches", "folder or address that holds all caches", result=False, address=True)
    cache: str | None = option(
        None,
        "exactly this folder or address for the cache (s3://bucket/prefix); null: caches_dir/name-fingerprint",
        result=False,
        address=True,
    )
    teacher: ModelConfig = option(ModelConfig, "the weak model")
    corpus: TextConfig = option(TextConfig, "unlabeled text")
    window: int = option(512, "longest sequence, in tokens; records are packed into it")
    kind: Kind = option(Kind.topk, "topk: k largest and an exact tail; sampled: draws; hybrid: k largest and draws")
    k: int = option(64, "logits kept a position, by size; the rest is one exact tail (topk) or drawn from (hybrid)")
    draws: int = option(50, "draws a position for sampled and hybrid")
    seed: int = option(0, "decides those draws")
    temperatures: list[float] = option(lambda: [1.0], "temperatures whose tail is kept; must contain 1")
    records_per_shard: int = option(20_000, "records in one shard")
    batch_sequences: int = option(16, "sequences in one teacher forward", result=False)
    num_workers: int = option(1, "processes on this machine, each with a GPU or its share of the cores", result=False)
    share: str | None = option(
        None, "INDEX/COUNT: only these shards (0/16 to 15/16); null: SLURM's array task, else all", result=False
    )
    lease_seconds: float = option(
        60.0, "a shard whose worker gave no sign of life for this long is taken over", result=False
    )
    log_every_seconds: float = option(10.0, "seconds between plain progress lines", result=False)


@dataclass
class RampConfig:
    shape: Shape = option(Shape.constant, "constant, linear, cosine or step")
    start_fraction: float = option(0.0, "fraction of all steps at which the ramp begins")
    end_fraction: float = option(1.0, "fraction of all steps at which the ramp ends")
    start_value: float = option(1.0, "factor on the weight before the ramp")
    end_value: float = option(0.0, "factor on the weight after the ramp")


@dataclass
class LmConfig:
    weight: float = option(1.0, "weight of the language-model term (cross entropy on known targets)")
    ramp: RampConfig = option(RampConfig, "how that weight changes over the steps")
    on: list[Source] = option(lambda: [Source.gold], "whose positions it reads: gold, corpus or both")


@dataclass
class KdConfig:
    weight: float = option(1.0, "weight of the distillation term (the book's lambda)")
    ramp: RampConfig = option(RampConfig, "how that weight changes over the steps")
    on: list[Source] = option(
        lambda: [Source.corpus], "whose positions it reads: those that carry a captured distribution"
    )
    temperature: float = option(1.0, "softens teacher and student alike; must have been captured")
    temperature_squared: bool = option(
        True, "multiply the differentiated value by T^2, so that its gradient keeps its size as T grows"
    )


@dataclass
class LossConfig:
    lm: LmConfig = option(LmConfig, "ground-truth labels")
    kd: KdConfig = option(KdConfig, "the teacher's distribution")


@dataclass
class OptimizerConfig:
    learning_rate: float = option(4e-5, "peak learning rate of AdamW")
    schedule: Shape = option(Shape.linear, "its shape after the warm-up")
    warmup_fraction: float = option(0.05, "fraction of the steps over which it rises")
    final_fraction: float = option(0.0, "where it ends, as a fraction of the peak")
    beta1: float = option(0.9, "AdamW's decay of the first moment")
    beta2: float = option(0.999, "AdamW's decay of the second moment")
    epsilon: float = option(1e-8, "AdamW's epsilon")
    weight_decay: float = option(0.0, "decoupled weight decay, on matrices only")
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm; 0: never")


@dataclass
class DeepspeedConfig:
    zero_stage: int = option(1, "0 to 3: what is partitioned over the ranks", result=False)
    overrides: dict[str, Any] = option(dict, "merged into the DeepSpeed configuration, as DeepSpeed spells it")


@dataclass
class CheckpointConfig:
    every_steps: int = option(100, "steps between checkpoints; 0: only when stopped", result=False)
    keep: int = option(1, "checkpoints kept while running; all go when the run is finished", result=False)


@dataclass
class ScoringConfig:
    batch_tokens: int = option(4096, "tokens in one forward while scoring", result=False)
    teacher_predictions: str | None = option(
        None,
        "the teacher's predictions-test.parquet (or a glob matching one), for agreement with it",
        content=True,
    )


@dataclass
class LauncherConfig:
    num_processes: int | None = option(None, "ranks on this machine; null: one a GPU, or one", result=False)
    log_every_seconds: float = option(10.0, "seconds between plain progress lines", result=False)


@dataclass
class DownloadsConfig:
    dir: str = option("caches/.downloads", "folder for shards of caches in object stores; may be shared", result=False)
    bytes: int = option(50_000_000_000, "bytes it may take; the shards not used for longest go first", result=False)


@dataclass
class TrainConfig:
    name: str = option(MISSING, "first part of the run folder's name; what the report calls the experiment")
    runs_dir: str = option("runs", "folder that holds all runs", result=False)
    seed: int = option(1, "decides the order of the data and every other draw")
    student: ModelConfig = option(ModelConfig, "the strong model, before training")
    cache: str | None = option(
        None,
        "folder of a capture, a glob matching one, or an address (s3://bucket/prefix); null: no teacher",
        content=True,
        address=True,
    )
    k: int | None = option(None, "kept entries to read from the cache; null: all that were captured")
    gold: TextConfig | None = option(None, "trusted text with known targets; null: none")
    dev: TextConfig | None = option(None, "held-out text that decisions may look at; null: none")
    test: TextConfig | None = option(None, "held-out text for the reported score; null: none")
    window: int = option(512, "longest gold sequence, in tokens; records are packed into it")
    gold_fraction: float = option(MISSING, "fraction of the global batch's sequences that are gold")
    global_batch: int = option(8, "sequences in one optimizer step, over all ranks")
    micro_batch: int = option(8, "at most so many sequences in one forward of one rank", result=False)
    steps: int | None = option(None, "optimizer steps; give this or epochs")
    epochs: float | None = option(None, "passes over the corpus (over gold where gold_fraction is 1)")
    loss: LossConfig = option(LossConfig, "the combined objective")
    optimizer: OptimizerConfig = option(OptimizerConfig, "AdamW and its schedule")
    deepspeed: DeepspeedConfig = option(DeepspeedConfig, "the engine")
    checkpoint: CheckpointConfig = option(CheckpointConfig, "what survives a stop")
    scoring: ScoringConfig = option(ScoringConfig, "evaluation at the end")
    launcher: LauncherConfig = option(LauncherConfig, "how ranks are started", result=False)
    downloads: DownloadsConfig = option(
        DownloadsConfig, "caches in object stores are read through this folder", result=False
    )


@dataclass
class EvaluateConfig:
    model: ModelConfig = option(ModelConfig, "any causal language model")
    text: TextConfig = option(TextConfig, "held-out text")
    out: str | None = option(None, "folder for scores.json and predictions.parquet; null: print only")
    scoring: ScoringConfig = option(ScoringConfig, "how to score")
    log_every_seconds: float = option(10.0, "seconds between plain progress lines")


@dataclass
class ReportConfig:
    runs: list[str] = option(lambda: ["runs/*"], "run folders, or globs of them")
    out: str | None = option(None, "folder for report.csv and report.parquet; null: print only")


ROOTS: dict[str, type] = {
    "capture": CaptureConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "report": ReportConfig,
}


def typed(node: Any, schema: type[T]) -> T:
    """The composed configuration as its dataclass; an option that must be said and was not is an InputError."""
    missing = sorted(key for key in OmegaConf.missing_keys(node) if not key.startswith("hydra."))
    if missing:
        hints = "\n".join(f"  {key}: {_help_of(schema, key)}" for key in missing)
        raise InputError(f"expected a value for each of these options, found none; give them as name=value:\n{hints}")
    config = OmegaConf.to_object(node)
    assert isinstance(config, schema)
    return config


def save(config: Any, path: Path) -> None:
    """Write a typed configuration as YAML, every option with its resolved value."""
    OmegaConf.save(OmegaConf.structured(config), path)


def load(path: Path, schema: type[T]) -> T:
    """Read what `save` wrote."""
    return typed(OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.load(path)), schema)


def check_capture(config: CaptureConfig) -> None:
    """Refuse what cannot be meant, before anything is read."""
    _at_least(2, window=config.window)
    _at_least(1, k=config.k, draws=config.draws, records_per_shard=config.records_per_shard)
    _at_least(1, batch_sequences=config.batch_sequences, num_workers=config.num_workers)
    _positive(
        lease_seconds=config.lease_seconds,
        temperatures=min(config.temperatures, default=1.0),
        log_every_seconds=config.log_every_seconds,
    )
    if config.kind is not Kind.topk and config.temperatures != [1.0]:
        raise InputError(
            f"temperatures: expected [1.0], because a {config.kind.name} cache is valid only there, found "
            f"{config.temperatures}; use kind=topk for other temperatures"
        )
    if 1.0 not in config.temperatures:
        raise InputError(f"temperatures: expected 1.0 among them, found {config.temperatures}; add it")


def check_train(config: TrainConfig) -> None:
    """Refuse what cannot be meant, before anything is read."""
    kd, lm = config.loss.kd, config.loss.lm
    _at_least(2, window=config.window)
    _at_least(1, global_batch=config.global_batch, micro_batch=config.micro_batch)
    _at_least(1, steps=1 if config.steps is None else config.steps)
    _at_least(1, num_processes=1 if config.launcher.num_processes is None else config.launcher.num_processes)
    _at_least(0, max_grad_norm=config.optimizer.max_grad_norm)
    if config.epochs is not None:
        _positive(epochs=config.epochs)
    _at_least(0, checkpoint_every_steps=config.checkpoint.every_steps)
    _at_least(1, checkpoint_keep=config.checkpoint.keep, downloads_bytes=config.downloads.bytes)
    _positive(kd_temperature=kd.temperature, learning_rate=config.optimizer.learning_rate)
    _fraction(gold_fraction=config.gold_fraction, warmup_fraction=config.optimizer.warmup_fraction)
    if Source.gold in kd.on:
        raise InputError(
            "loss.kd.on: expected [corpus], found gold in it; gold carries no captured distribution: put the gold "
            "records into the corpus of a capture if the teacher should speak on them"
        )
    if (config.steps is None) == (config.epochs is None):
        raise InputError(f"expected one of steps and epochs, found steps={config.steps}, epochs={config.epochs}")
    if config.gold_fraction > 0 and config.gold is None:
        raise InputError(
            f"gold_fraction is {config.gold_fraction} but gold is null; give a gold set or gold_fraction=0"
        )
    if config.gold_fraction < 1 and config.cache is None:
        raise InputError(f"gold_fraction is {config.gold_fraction} but cache is null; give a cache or gold_fraction=1")
    if not 0 <= config.deepspeed.zero_stage <= 3:
        raise InputError(f"deepspeed.zero_stage: expected 0 to 3, found {config.deepspeed.zero_stage}")
    if min(kd.weight, lm.weight) < 0:
        raise InputError(f"loss weights: expected 0 or more, found lm={lm.weight}, kd={kd.weight}")
    reads_gold = Source.gold in lm.on and lm.weight > 0 and config.gold_fraction > 0
    reads_corpus = (kd.weight > 0 and Source.corpus in kd.on) or (lm.weight > 0 and Source.corpus in lm.on)
    if not reads_gold and not (reads_corpus and config.gold_fraction < 1):
        raise InputError("no term with a weight above 0 reads any text of this run; check loss.*.weight, loss.*.on")


def _at_least(least: int, **values: float) -> None:
    for name, value in values.items():
        if value < least:
            raise InputError(f"{name}: expected at least {least}, found {value}")


def _fraction(**values: float) -> None:
    for name, value in values.items():
        if not 0.0 <= value <= 1.0:
            raise InputError(f"{name}: expected 0 to 1, found {value}")


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise InputError(f"{name}: expected more than 0, found {value}")


def result_options(config: Any) -> dict[str, Any]:
    """The options that decide what comes out, as plain data: files and what is marked `result=False` left out."""
    chosen: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if not item.metadata["result"] or item.metadata["content"]:
            continue
        chosen[item.name] = result_options(value) if dataclasses.is_dataclass(value) else plain(value)
    return chosen


def plain(value: Any) -> Any:
    """An option's value as JSON knows it: an enum by its name."""
    if isinstance(value, Enum):
        return value.name
    return [plain(item) for item in value] if isinstance(value, list) else value


def options(schema: type, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Every leaf option below a dataclass as (dotted name, default, sentence)."""
    hints = get_type_hints(schema)
    for item in dataclasses.fields(schema):
        inner = _dataclass_in(hints[item.name])
        if inner is not None:
            yield from options(inner, f"{prefix}{item.name}.")
            continue
        made = item.default_factory
        default = made() if made is not dataclasses.MISSING else item.default
        yield prefix + item.name, default, item.metadata["help"]


def _dataclass_in(hint: Any) -> type | None:
    candidates = get_args(hint) if get_origin(hint) is Union or "|" in str(hint) else (hint,)
    return next((c for c in candidates if dataclasses.is_dataclass(c) and isinstance(c, type)), None)


def _help_of(schema: type, dotted: str) -> str:
    return next((help for name, _, help in options(schema) if name == dotted), "a group of options; choose one")


def check_files(config: Any, prefix: str = "") -> None:
    """Refuse paths and globs that match nothing, in the first second; hub names and addresses are asked for later."""
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            check_files(value, f"{prefix}{item.name}.")
        elif item.metadata["content"] and value is not None:
            for pattern in [value] if isinstance(value, str) else value:
                is_hub_name = isinstance(config, ModelConfig) and re.fullmatch(r"[\w.-]+/[\w.-]+", pattern)
                is_address = item.metadata["address"] and "://" in pattern
                if not (is_hub_name or is_address or glob.glob(pattern, recursive=True)):
                    raise InputError(
                        f"{prefix}{item.name}: expected {pattern!r} to exist, found nothing there; check the path"
                    )


def addresses(config: Any) -> Iterator[tuple[str, str]]:
    """The options of a root that name a place in an object store, with their values."""
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if item.metadata["address"] and value is not None and "://" in value:
            yield item.name, value
