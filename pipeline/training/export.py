"""The trained student as a model folder that anybody can load."""

from __future__ import annotations

from typing import Any

from pipeline.core.files import atomic_folder
from pipeline.models.loading import save_model
from pipeline.models.lora import merge_adapter
from pipeline.training import engine as engines
from pipeline.training.run import Run


def export(run: Run, tokenizer: Any) -> None:
    """Write the model folder, and before it the adapter alone where there is one; each appears only when complete."""
    config, paths = run.config, run.paths
    weights = engines.student_weights(run.engine, config.deepspeed.zero_stage)
    if run.ranks.rank == 0:
        assert weights is not None
        if config.student.adapter is not None:
            with atomic_folder(paths.adapter) as folder:
                weights = merge_adapter(config.student, weights, folder)
        with atomic_folder(paths.model) as folder:
            student = run.engine.module.student
            save_model(student, weights, tokenizer, folder, shard_bytes=config.export.shard_bytes)
    run.ranks.barrier()
