"""A study of the tiny models, complete and quick, in a folder of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


def write_tiny_study(folder: Path, *, teacher: Path, student: Path, data: Path, **train: Any) -> Path:
    """`folder`/study/tiny.yaml, for `--config-dir folder study=tiny` there; `train` are options of every run."""
    model = {"dtype": "float32", "attention": "sdpa"}
    texts: dict[str, Any] = {
        name: {"files": [str(data / f"{name}.jsonl")]} for name in ("corpus", "gold", "dev", "test")
    }
    content = {
        "teacher": {"path": str(teacher), **model},
        "student": {"path": str(student), **model},
        "window": 48,
        "runs_dir": "runs",
        "caches_dir": "caches",
        "text": {"targets": "completion", "end_token": False},
        **texts,
        "capture": {"k": 8, "records_per_shard": 5, "batch_sequences": 2},
        "train": {"global_batch": 4, "micro_batch": 2, "steps": 20, "optimizer.learning_rate": 0.001, **train},
        "experiments": {"combined": {"gold_fraction": 0.25}},
    }
    content["corpus"]["targets"] = "next"
    path = folder / "study" / "tiny.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(yaml.safe_dump(content))
    return path
