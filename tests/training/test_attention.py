"""Training by segment: at every ZeRO stage, on two ranks, with and without recomputed activations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from support.commands import losses_of, only, script, train_arguments


@pytest.mark.slow(minutes=3)
def test_training_by_segment_is_that_under_a_dense_mask_at_every_stage(
    student: Path, data: Path, cache: Path, tmp_path: Path
) -> None:
    """The losses of six steps to 1e-5, and the kernel in the log; the name of the run is the same."""
    without = {"dev": "null", "test": "null", "export__what": "none", "micro_batch": 1}

    def train(name: str, **changes: Any) -> tuple[str, torch.Tensor, str]:
        (tmp_path / name).mkdir()
        arguments = train_arguments(student, data, str(cache), **without | changes)
        done = script("train", *arguments, cwd=tmp_path / name)
        run = only(tmp_path / name / "runs")
        return run.name, torch.tensor(losses_of(run)), done.stderr

    expected_name, expected, _ = train("dense", student__attention="sdpa")
    for stage in range(4):
        layout = {"launcher__num_processes": 2, "deepspeed__zero_stage": stage}
        how = {"gradient_checkpointing": stage % 2 == 1, "student__attention": "null"}
        name, losses, errors = train(f"stage{stage}", **layout, **how)
        assert name == expected_name
        assert "LlamaForCausalLM: attention sdpa_segments" in errors
        assert torch.allclose(losses, expected, rtol=1e-5), stage
