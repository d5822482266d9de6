"""Where the checks work: a folder with a model, a tokenizer, texts and a plan of a capture, all made here.

A finished capture or run in this folder is not made again, because that is how both stages work: checks that need the
same one call the same function.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from pipeline.cache.sequence_files import open_sequence_file, sequence_file
from pipeline.capture import driver as capture_driver
from pipeline.capture.plan import make_plan
from pipeline.capture.plan_lookup import plan_folder
from pipeline.config.schema import CaptureConfig, Dtype, ModelConfig, TextConfig
from pipeline.core.types import Manifest, TokenSequence
from pipeline.models.forward import Model
from pipeline.models.loading import load_model
from pipeline.models.tiny import Size, save_tiny_model

SMALL = Size(hidden=64, layers=2, heads=4, positions=128)
LARGE = Size(hidden=1024, layers=12, heads=16, positions=1024)  # 150 million parameters: for speed and memory of GPUs
NUM_RECORDS, BATCH = 240, 8
TOPICS = (" river", " metal", " planet")
WORDS = ("weak", "strong", "teacher", "student", "position", "tail", "shard", "gold", "corpus", "target", "window")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Place:
    """A folder with all that the checks read."""

    folder: Path
    size: Size
    dtype: Dtype
    """Of the teacher and of the students."""
    manifest: Manifest
    """Of the capture of its corpus."""
    sequences: Sequence[TokenSequence]
    """Its corpus."""

    @property
    def model(self) -> Path:
        """The folder of the model: teacher and student alike."""
        return self.folder / "model"

    def batches(self) -> Iterator[Sequence[TokenSequence]]:
        """The corpus as stage one runs it through the teacher."""
        for first in range(0, len(self.sequences), BATCH):
            yield self.sequences[first : first + BATCH]


def records(first: int, num: int, *, labeled: bool) -> Iterator[dict[str, object]]:
    """Made-up records, all different, numbered from `first`; labeled ones have a completion."""
    for number in range(first, first + num):
        words = [WORDS[(number * step + step) % len(WORDS)] for step in range(1, 4 + number % 5)]
        text = f"Record {number}: {' '.join(words)}"
        yield {"prompt": text, "completion": TOPICS[number % 3]} if labeled else {"text": text}


def build(folder: Path, size: Size = SMALL, dtype: Dtype = Dtype.float32) -> Place:
    """Write model, tokenizer and texts into a folder, and plan the capture."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {"corpus": records(0, NUM_RECORDS, labeled=False), "gold": records(10_000, NUM_RECORDS // 4, labeled=True)}
    for name, text in texts.items():
        lines = [json.dumps(record) for record in text]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    save_tiny_model(folder / "model", size, seed=1)
    config = capture_options(folder, size, dtype)
    plan = plan_folder(config)
    manifest = plan.load() or make_plan(config, plan)
    shards = [open_sequence_file(sequence_file(plan.sequences, index)) for index in range(manifest.num_shards)]
    sequences = list(itertools.chain.from_iterable(shards))
    return Place(folder=folder, size=size, dtype=dtype, manifest=manifest, sequences=sequences)


def capture_options(folder: Path, size: Size, dtype: Dtype) -> CaptureConfig:
    """A capture of the corpus, all of whose tokens are targets."""
    return CaptureConfig(
        name="selftest",
        caches_dir=str(folder / "caches"),
        teacher=ModelConfig(path=str(folder / "model"), dtype=dtype),
        corpus=TextConfig(files=[str(folder / "corpus.jsonl")]),
        window=size.positions,
        k=8,
        batch_sequences=BATCH,
    )


def captured(place: Place) -> Path:
    """The cache of the place's corpus, captured by the real command on this machine's first device."""
    cache = capture_driver.run(capture_options(place.folder, place.size, place.dtype))
    assert isinstance(cache, Path)
    return cache


@lru_cache(maxsize=1)
def larger(place: Place) -> Place:
    """Beside a place, one of the size at which speed and memory of a GPU mean something, in bfloat16."""
    return build(place.folder / "larger", LARGE, Dtype.bfloat16)


def open_place_model(place: Place, device: torch.device, dtype: Dtype, *, attention: str | None = None) -> Model:
    """The place's model on a device."""
    return load_model(place.model, dtype=dtype.name, device=device, attention=attention)


# --------------------------------------------------------------------------------------- the machine


def missing_gpus(needed: int) -> str | None:
    """Why a check that needs so many GPUs is skipped; None if they are there."""
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return None if found >= needed else ("no GPU" if found == 0 else "one GPU")
