"""What a study will cost: steps, tokens, bytes and hours, estimated from counts and from a short probe."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from pipeline.config.options import save_config
from pipeline.config.schema import CaptureConfig, ModelConfig, StudentConfig, TextConfig, TrainConfig
from pipeline.core.progress import log
from pipeline.core.runtime import module_command
from pipeline.data.record_counts import count_records
from pipeline.data.records import MalformedRecords
from pipeline.data.text_files import all_records, open_text
from pipeline.data.tokenize import read_sequences
from pipeline.models.model_files import weight_files
from pipeline.models.paths import model_folder
from pipeline.models.tokenizer import open_tokenizer
from pipeline.training.launch import ALLOCATOR_SETTINGS

SAMPLED_SEQUENCES = 200  # of a text, to estimate how many it has
TRAINING_FORWARDS = 3.0  # a backward takes as long as two forwards
POOL_SECONDS = 5e-5  # a position of two members with k = 64 takes 2e-5; as much again is read and written
START_SECONDS = 12.0  # of a run beside its steps: imports, loading, scoring, writing


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of one run, or of a capture."""

    steps: int
    tokens: int
    """Through the model, padding included."""
    bytes: int
    """What stays on disk: the exported model, or the cache."""
    seconds: float | None
    """None without a probe."""


def num_sequences(text: TextConfig, what: str, model: ModelConfig, window: int) -> float:
    """About how many windows a text is packed into: its records over those of its first sequences."""
    _, tokenizer = open_tokenizer(model)
    opened = open_text(text, what)
    _, num_records = count_records(opened)
    if text.take is not None:
        num_records = min(num_records, text.take)
    raw, malformed = all_records(opened.files, opened.read_columns, take=text.take), MalformedRecords(skip=True)
    first = list(itertools.islice(read_sequences(raw, opened, tokenizer, malformed, window=window), SAMPLED_SEQUENCES))
    records = {record for sequence in first for record in sequence.record_ids}
    return num_records * len(first) / max(len(records), 1)


def run_cost(config: TrainConfig, sequences: float, seconds_per_token: float | None) -> Cost:
    """Of a run that reads `sequences` windows an epoch."""
    steps = num_steps(config, sequences)
    tokens = steps * batch(config) * config.window
    size = 0 if steps == 0 else exported_bytes(config.student)
    seconds = None if seconds_per_token is None else START_SECONDS + tokens * seconds_per_token
    return Cost(steps=steps, tokens=tokens, bytes=size, seconds=seconds)


def capture_cost(config: CaptureConfig, sequences: float, seconds_per_token: float | None) -> Cost:
    """Of a capture, which is forwards alone; `scripts/audit.py plan` estimates its bytes."""
    tokens = round(sequences * config.window)
    seconds = None if seconds_per_token is None else START_SECONDS + tokens * seconds_per_token
    return Cost(steps=0, tokens=tokens, bytes=0, seconds=seconds)


def pool_cost(config: CaptureConfig, sequences: float, *, timed: bool) -> Cost:
    """Of pooling captures made with these options: no token goes through a model."""
    seconds = sequences * config.window * POOL_SECONDS if timed else None
    return Cost(steps=0, tokens=0, bytes=0, seconds=seconds)


def num_steps(config: TrainConfig, sequences: float) -> int:
    """Optimizer steps of a run that reads `sequences` windows an epoch."""
    return config.steps if config.steps is not None else math.ceil((config.epochs or 0) * sequences / batch(config))


def batch(config: TrainConfig) -> int:
    """Sequences in one optimizer step."""
    return config.global_batch if config.global_batch_tokens is None else config.global_batch_tokens // config.window


def exported_bytes(model: ModelConfig) -> int:
    """Bytes of a model's weights, as they lie in its folder."""
    return sum(file.stat().st_size for file in weight_files(model_folder(model.path, revision=model.revision)))


def seconds_per_token(
    model: ModelConfig, *, window: int, sequences: int, limit_seconds: float, trains: bool
) -> float | None:
    """What `probe` measures here; None where the model does not run alone, as one that needs several GPUs."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.yaml"
        save_config(StudentConfig(**{item.name: getattr(model, item.name) for item in fields(ModelConfig)}), path)
        figures = (str(window), str(sequences), str(limit_seconds), str(trains).lower())
        command = module_command("pipeline.study.probe", str(path), *figures)
        environment = ALLOCATOR_SETTINGS | os.environ
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        log.warning("no estimate of the time: %s does not run alone on this machine: %s", model.path, reason)
        return None
    return float(done.stdout.split()[-1])


def total(costs: Sequence[Cost]) -> Cost:
    """The sum; seconds are None if one of them is unknown."""
    seconds = [cost.seconds for cost in costs]
    return Cost(
        steps=sum(cost.steps for cost in costs),
        tokens=sum(cost.tokens for cost in costs),
        bytes=sum(cost.bytes for cost in costs),
        seconds=None if None in seconds else sum(second for second in seconds if second is not None),
    )
