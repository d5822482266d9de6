"""A capture by segment: under the same fingerprint the numbers of the dense kernel, up to rounding."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from pipeline.cache.shards import ShardReader
from pipeline.capture import driver
from pipeline.core.types import Captured
from support.commands import config_of


@pytest.mark.parametrize("attention", [None, "eager_segments"])
def test_a_capture_by_segment_is_that_of_the_dense_kernel(
    teacher: Path, data: Path, tmp_path: Path, attention: str | None
) -> None:
    captures = []
    for kernel in ("sdpa", attention):
        folder = tmp_path / str(kernel)
        config = config_of(teacher, data / "corpus.jsonl", folder)
        model = dataclasses.replace(config.teacher, attention=kernel)
        driver.run(dataclasses.replace(config, name="c", teacher=model))
        (cache,) = folder.glob("c-*")
        reader = ShardReader(cache)
        rows = [reader.row(block, row) for block, size in enumerate(reader.blocks) for row in range(size)]
        captures.append((cache.name, [sequence.key for sequence, _ in rows], Captured.cat([one for _, one in rows])))
    (name, keys, dense), (same_name, same_keys, found) = captures
    assert (name, keys) == (same_name, same_keys)
    assert (dense.top.ids_NK == found.top.ids_NK).float().mean() > 0.999  # ties may change places
    for column in ("relative_logits_NK", "log_tail_NC"):
        assert torch.allclose(getattr(dense.top, column), getattr(found.top, column), atol=2e-3)
    assert torch.allclose(dense.entropy_N, found.entropy_N, atol=2e-3)
    assert torch.allclose(dense.next_log_prob_N, found.next_log_prob_N, atol=4e-3)
