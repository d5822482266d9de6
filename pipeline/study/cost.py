"""What a study will cost: steps, tokens, bytes and hours, estimated from counts and from a short probe."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from pipeline.config.schema import CaptureConfig, ModelConfig, TextConfig, TrainConfig
from pipeline.core.runtime import compute_device, keep_allocator_memory
from pipeline.data.record_counts import count_records
from pipeline.data.records import MalformedRecords
from pipeline.data.text_files import all_records, open_text
from pipeline.data.tokenize import read_sequences
from pipeline.models.forward import hidden_states
from pipeline.models.loading import open_model, resolve_dtype
from pipeline.models.model_files import weight_files
from pipeline.models.paths import model_folder
from pipeline.models.tokenizer import open_tokenizer, vocabulary_size

SAMPLED_SEQUENCES = 200  # of a text, to estimate how many it has
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
    steps = config.steps if config.steps is not None else math.ceil((config.epochs or 0) * sequences / batch(config))
    tokens = steps * batch(config) * config.window
    size = 0 if steps == 0 else exported_bytes(config.student)
    seconds = None if seconds_per_token is None else START_SECONDS + tokens * seconds_per_token
    return Cost(steps=steps, tokens=tokens, bytes=size, seconds=seconds)


def capture_cost(config: CaptureConfig, sequences: float, seconds_per_token: float | None) -> Cost:
    """Of a capture; a kept entry takes about 2.6 bytes on disk (measured on real logits, compressed)."""
    tokens = round(sequences * config.window)
    seconds = None if seconds_per_token is None else START_SECONDS + tokens * seconds_per_token / 3  # no backward
    return Cost(steps=0, tokens=tokens, bytes=0, seconds=seconds)


def batch(config: TrainConfig) -> int:
    """Sequences in one optimizer step."""
    return config.global_batch if config.global_batch_tokens is None else config.global_batch_tokens // config.window


def exported_bytes(model: ModelConfig) -> int:
    """Bytes of a model's weights, as they lie in its folder."""
    return sum(file.stat().st_size for file in weight_files(model_folder(model.path, revision=model.revision)))


def seconds_per_token(model: ModelConfig, *, window: int, sequences: int, limit_seconds: float) -> float:
    """Time of forward, backward and AdamW for one token on this machine, measured for at most `limit_seconds`."""
    keep_allocator_memory()
    device, (_, tokenizer) = compute_device(), open_tokenizer(model)
    student = open_model(resolve_dtype(model), device).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-9, fused=True)  # about as fast as DeepSpeed's
    input_ids_BS = torch.randint(0, vocabulary_size(tokenizer), (sequences, window), device=device)
    position_ids_BS = torch.arange(window, device=device).expand(sequences, window)

    def step() -> None:
        hidden_states(student, input_ids_BS, position_ids_BS).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return _median_seconds(step, limit_seconds) / (sequences * window)


def _median_seconds(step: Callable[[], None], limit_seconds: float) -> float:
    """Median time of a step after the first one, which is slower."""
    started = time.monotonic()
    times: list[float] = []
    while len(times) < 2 or (time.monotonic() - started < limit_seconds and len(times) < 6):
        before = time.monotonic()
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.monotonic() - before)
    return sorted(times[1:])[(len(times) - 1) // 2]


def total(costs: Sequence[Cost]) -> Cost:
    """The sum; seconds are None if one of them is unknown."""
    seconds = [cost.seconds for cost in costs]
    return Cost(
        steps=sum(cost.steps for cost in costs),
        tokens=sum(cost.tokens for cost in costs),
        bytes=sum(cost.bytes for cost in costs),
        seconds=None if None in seconds else sum(second for second in seconds if second is not None),
    )
