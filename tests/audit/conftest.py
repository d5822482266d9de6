"""Caches that the tests of this package share, and copies of them to damage."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipeline.capture import driver
from pipeline.config.schema import CaptureConfig, Dtype, Kind, ModelConfig, Targets, TextConfig
from support.commands import config_of
from support.damage import copy_cache
from support.tiny import prompts, write_lines


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """For tensors as small as these a second thread only costs time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="package")
def labeled_caches(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> dict[str, Path]:
    """One cache of kind topk and one of kind hybrid, of the same 60 records with known completions."""
    folder = tmp_path_factory.mktemp("labeled")
    write_lines(folder / "corpus.jsonl", prompts(60, labeled=True))
    caches = {}
    for kind, chosen in (("topk", {"k": 8, "temperatures": [1.0, 2.0]}), ("hybrid", {"k": 4, "draws": 12})):
        driver.run(
            CaptureConfig(
                name=kind,
                caches_dir=str(folder / "caches"),
                teacher=ModelConfig(path=str(teacher), dtype=Dtype.float32, attention="sdpa"),
                corpus=TextConfig(files=[str(folder / "corpus.jsonl")], targets=Targets.all),
                kind=Kind[kind],
                window=48,
                records_per_shard=25,
                batch_sequences=4,
                **chosen,
            )
        )
        (caches[kind],) = (folder / "caches").glob(f"{kind}-*")
    return caches


@pytest.fixture(scope="package")
def choices_cache(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Path:
    """A cache of 12 records with choices of several tokens, whose answers are known."""
    folder = tmp_path_factory.mktemp("choices")
    corpus = write_lines(folder / "corpus.jsonl", prompts(12, labeled=True))
    text = TextConfig(files=[str(corpus)], targets=Targets.choices)
    driver.run(config_of(teacher, corpus, folder, corpus=text, temperatures=[1.0]))
    (found,) = folder.glob("tiny-*")
    return found


@pytest.fixture
def cache_copy(cache: Path, tmp_path: Path) -> Path:
    """A copy of the cache of unlabeled records."""
    return copy_cache(cache, tmp_path)


@pytest.fixture(params=["topk", "hybrid"])
def labeled_copy(request: pytest.FixtureRequest, labeled_caches: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of each labeled cache in turn; its name begins with its kind."""
    return copy_cache(labeled_caches[request.param], tmp_path)
