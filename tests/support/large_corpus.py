"""The options of a capture of very many short records."""

from __future__ import annotations

from pathlib import Path

from pipeline.config.schema import CaptureConfig, Dtype, ModelConfig, TextConfig

K, WINDOW, RECORDS_PER_SHARD = 4, 20, 5000


def large_capture(teacher: Path, folder: Path) -> tuple[CaptureConfig, list[str]]:
    """The same capture twice: as a config, and as arguments of a command line."""
    config = CaptureConfig(
        name="many",
        caches_dir=str(folder / "caches"),
        teacher=ModelConfig(path=str(teacher), dtype=Dtype.float32, attention="sdpa"),
        corpus=TextConfig(files=[str(folder / "corpus.jsonl")]),
        window=WINDOW,
        k=K,
        records_per_shard=RECORDS_PER_SHARD,
    )
    arguments = [
        "model@teacher=own",
        "text@corpus=own",
        "name=many",
        f"caches_dir={folder}/caches",
        f"teacher.path={teacher}",
        "teacher.dtype=float32",
        "teacher.attention=sdpa",
        f"corpus.files=[{folder}/corpus.jsonl]",
        "corpus.targets=all",
        f"window={WINDOW}",
        f"k={K}",
        f"records_per_shard={RECORDS_PER_SHARD}",
    ]
    return config, arguments
