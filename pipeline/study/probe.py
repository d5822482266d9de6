"""How long a token takes on this machine: `python -m pipeline.study.probe MODEL.yaml WINDOW SEQUENCES SECONDS TRAINS`.

A process of its own: the driver of a study holds no model, and a model that does not fit ends this process alone.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from pipeline.config.options import load_config
from pipeline.config.schema import ModelConfig, StudentConfig
from pipeline.core.runtime import compute_device, keep_allocator_memory
from pipeline.models.forward import hidden_states
from pipeline.models.loading import open_model, resolve_dtype
from pipeline.models.tokenizer import open_tokenizer, vocabulary_size


def seconds_per_token(model: ModelConfig, *, window: int, sequences: int, limit_seconds: float, trains: bool) -> float:
    """Time of a forward, and with `trains` of backward and AdamW too, for one token; for about `limit_seconds`."""
    keep_allocator_memory()
    device, (_, tokenizer) = compute_device(), open_tokenizer(model)
    student = open_model(resolve_dtype(model), device).train(trains)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-9, fused=True) if trains else None
    input_ids_BS = torch.randint(0, vocabulary_size(tokenizer), (sequences, window), device=device)
    position_ids_BS = torch.arange(window, device=device).expand(sequences, window)

    def step() -> None:
        with torch.set_grad_enabled(trains):
            hidden_BSH = hidden_states(student, input_ids_BS, position_ids_BS)
        if optimizer is not None:
            hidden_BSH.float().square().mean().backward()
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


if __name__ == "__main__":
    path, window, sequences, limit_seconds, trains = sys.argv[1:]
    found = seconds_per_token(
        load_config(Path(path), StudentConfig),
        window=int(window),
        sequences=int(sequences),
        limit_seconds=float(limit_seconds),
        trains=trains == "true",
    )
    print(found)
