"""After the last step a student that is spread over its ranks (ZeRO 3) is exported and scored by them, in parts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import transformers

from pipeline.core.types import RunFailed
from pipeline.training import driver, launch
from support.commands import ROOT, merged, only, train_arguments
from support.scoring import scored
from support.tiny import make_model

STEPS = 4
AT_ONCE = {  # DeepSpeed keeps up to so many elements complete for the next layers: here none
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}
KILLED = {
    "the export has gathered some weights": "1:pipeline.training.partition:whole:5",
    "it has written a file": "0:pipeline.models.saving:save_file:3",
    "dev is being scored": "1:pipeline.evaluation.scoring:_batch_log_probs:2",
    "test is being scored": "0:pipeline.training.finish:score_on:2",
    "the checkpoint is gone, the result not yet there": "0:pipeline.training.finish:write_json:1",
}


@pytest.fixture
def train(student: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The command, whose two ranks count and may be killed."""

    def command(name: str, *arguments: str, **named: Any) -> list[str]:
        worker = [sys.executable, str(ROOT / "tests" / "support" / "parts_worker.py"), *arguments]
        return worker if name == "pipeline.training.worker" else module_command(name, *arguments, **named)

    def run(folder: Path, killed_at: str = "", **changes: Any) -> None:
        monkeypatch.setenv("KILLED_AT", killed_at)
        chosen = {"experiment": "gold_only", "gold_fraction": 1, "steps": STEPS, "micro_batch": 2, "runs_dir": folder}
        chosen |= {"deepspeed__zero_stage": 3, "launcher__num_processes": 2, "evaluate_every_steps": 2}
        chosen |= {"scoring__batch_tokens": 128, "export__shard_bytes": 60_000}
        config = merged(train_arguments(student, data, "null", **chosen | changes))
        config.deepspeed.overrides = {"zero_optimization": AT_ONCE}
        driver.run(config)

    module_command = launch.module_command
    monkeypatch.setattr(launch, "module_command", command)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
    return run


def result_of(run: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((run / "result.json").read_text())
    return result | {"train_seconds": None}


def published(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "checkpoints" / "published.json").read_text())
    return found


@pytest.mark.slow(minutes=4)
def test_no_rank_holds_more_than_its_part_and_a_layer_and_nothing_is_lost(
    train: Any, student: Path, data: Path, tmp_path: Path
) -> None:
    """By DeepSpeed's own marks, from loading to scores. Killed at any place, the same command makes no step again."""
    train(tmp_path / "undisturbed")
    reference = only(tmp_path / "undisturbed")
    parameters = transformers.AutoModelForCausalLM.from_pretrained(student).parameters()
    largest = max(parameter.numel() for parameter in parameters)
    for rank in (0, 1):
        most = json.loads((reference / f"parts-{rank}.json").read_text())
        assert most.pop("bytes left") < 1000  # of weights, gradients and moments
        assert most == dict.fromkeys(("load", "steps", "export", "load again", "scores"), largest)
    assert len(list((reference / "model").glob("*.safetensors"))) > 2
    assert not (reference / "checkpoints").exists()
    for name in ("dev", "test"):  # as one process scores the whole model that was exported
        scores, table = scored(reference / "model", data / f"{name}.jsonl", batch_tokens=128, end_token=False)
        assert scores.nll == result_of(reference)[name]["nll"]
        assert table.equals(pl.read_parquet(reference / f"predictions-{name}.parquet"))

    rows = b""
    for place, killed_at in KILLED.items():
        with pytest.raises(RunFailed):
            train(tmp_path / "killed", killed_at)
        run = only(tmp_path / "killed")
        assert not (run / "result.json").exists(), place
        rows = rows or (run / "metrics.jsonl").read_bytes()
        assert (run / "metrics.jsonl").read_bytes() == rows, place
        is_exported = "scored" in place or "result" in place
        assert (run / "model").exists() == is_exported, place
        if "result" not in place:
            assert published(run)["state"]["step"] == STEPS, place
    train(tmp_path / "killed")
    assert (run / "metrics.jsonl").read_bytes() == rows
    assert result_of(run) == result_of(reference)
    files = [path.name for path in (reference / "model").iterdir() if path.name != "README.md"]
    assert [
        name for name in files if (run / "model" / name).read_bytes() != (reference / "model" / name).read_bytes()
    ] == []
    assert not (run / "checkpoints").exists()
    train(tmp_path / "killed", test__files=f"[{data}/dev.jsonl]")  # another text: the finished run is scored in parts
    assert (run / "metrics.jsonl").read_bytes() == rows
    assert result_of(run)["test"]["nll"] == result_of(reference)["dev"]["nll"]


@pytest.mark.slow
def test_loading_holds_a_part_and_a_layer(student: Path, tokenizer: Any, tmp_path: Path) -> None:
    """Anonymous memory of each of two ranks, for a student of 230 MB; whole, on a CPU, it is mapped from its file."""
    sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 12}
    folder = make_model(tmp_path / "large", tokenizer, seed=1, num_key_value_heads=12, initializer_range=0.02, **sizes)
    weights = (folder / "model.safetensors").stat().st_size
    assert weights > 200e6
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(ROOT / "tests" / "support" / "load_worker.py"), str(folder), str(student), str(tmp_path)]
    # large blocks of their own, which go back to the kernel when they are freed
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    environment |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    for rank in (0, 1):
        added = json.loads((tmp_path / f"load-{rank}.json").read_text())
        assert weights / 2 < added["parts"] < weights / 2 + weights / 8
        assert added["whole"] < weights / 10
