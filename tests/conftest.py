"""Fixtures that several packages share, made once a session."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from pipeline.core.processes import collect_less
from support.commands import capture_arguments, script
from support.tiny import make_model, make_tokenizer, prompts, write_lines

collect_less()


def minutes(item: pytest.Item) -> float:
    """About how long a test takes: 0 for a quick one, 1 for a slow one that does not say it."""
    mark = item.get_closest_marker("slow")
    return 0.0 if mark is None else float(mark.kwargs.get("minutes", 1))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    num_gpus = torch.cuda.device_count()
    for item in items:
        mark = item.get_closest_marker("gpu")
        needed = 0 if mark is None else int(mark.kwargs.get("devices", 1))
        if num_gpus < needed:
            reason = f"needs {needed} GPU{'s' * (needed > 1)}, found {num_gpus or 'no GPU'}"
            item.add_marker(pytest.mark.skip(reason=reason))
    if os.environ.get("RUN_SLOW") == "1":
        items.sort(key=minutes, reverse=True)  # long ones first, so that no core is left with one
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="takes minutes; RUN_SLOW=1 runs it, as .ci/run does"))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "student", tokenizer, seed=1)


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "teacher", tokenizer, seed=2, num_hidden_layers=2, padding=3)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of corpus, gold, dev and test."""
    folder = tmp_path_factory.mktemp("data")
    write_lines(folder / "corpus.jsonl", prompts(60, labeled=False))
    write_lines(folder / "gold.jsonl", prompts(12, labeled=True, first=60))
    write_lines(folder / "dev.jsonl", prompts(10, labeled=True, first=72))
    write_lines(folder / "test.jsonl", prompts(20, labeled=True, first=82))
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory, teacher: Path, data: Path) -> Path:
    """A capture of the tiny corpus, made by the script."""
    folder = tmp_path_factory.mktemp("caches")
    script("capture", *capture_arguments(teacher, data), cwd=folder)
    (found,) = folder.glob("caches/tiny-*")
    return found
