"""The options of a capture of very many short records."""

from __future__ import annotations

from pathlib import Path

from pipeline.config.schema import CaptureConfig, Dtype, ModelConfig, TextConfig

K, WINDOW, RECORDS_PER_SHARD = 4, 20, 5000


def settings(teacher: Path, folder: Path) -> tuple[CaptureConfig, list[str]]:
    """A capture, as options and as words of a command line."""
    config = CaptureConfig(
        name="many",
        caches_dir=str(folder / "caches"),
        teacher=ModelConfig(path=str(teacher), dtype=Dtype.float32, attention="sdpa"),
        corpus=TextConfig(files=[str(folder / "corpus.jsonl")]),
        window=WINDOW,
        k=K,
        records_per_shard=RECORDS_PER_SHARD,
    )
    words = ["model@teacher=own text@corpus=own teacher.dtype=float32"]
    words += [f"name=many caches_dir={folder}/caches teacher.path={teacher}"]
    words += [f"teacher.attention=sdpa corpus.files=[{folder}/corpus.jsonl] corpus.targets=all window={WINDOW} k={K}"]
    return config, " ".join([*words, f"records_per_shard={RECORDS_PER_SHARD}"]).split()
