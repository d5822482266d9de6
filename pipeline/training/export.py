"""The trained student as a model folder that anybody can load."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pipeline.core.files import atomic_folder
from pipeline.core.watchdog import made_progress, watched
from pipeline.models.lora import merge_adapter
from pipeline.models.saving import Whole, save_model
from pipeline.training import partition
from pipeline.training.run import Run


def export(run: Run, tokenizer: Any) -> None:
    """Write the model folder, and before it the adapter alone where there is one; each appears only when complete.

    All ranks take part. One weight at a time is complete on each of them, and the first one holds a file of weights at
    most. An adapter is merged by peft into the complete model, which is then in the host memory of the first rank.
    """
    engine = run.engine
    with watched(run.config.launcher.hang_seconds):
        if run.config.student.adapter is None:
            state = engine.module.student.state_dict(keep_vars=True)
            _write(run, tokenizer, state, functools.partial(partition.whole, engine))
        else:
            weights = partition.student_weights(engine)
            if weights is not None:
                with atomic_folder(run.paths.adapter) as folder:
                    weights = merge_adapter(run.config.student, weights, folder)
                made_progress()
                _write(run, tokenizer, weights, lambda weight: weight)
    run.ranks.barrier()  # not watched: a rank that only waits makes no progress


def _write(run: Run, tokenizer: Any, state: Mapping[str, Tensor], whole: Whole) -> None:
    is_first = run.ranks.rank == 0
    with atomic_folder(run.paths.model) if is_first else contextlib.nullcontext() as folder:
        shard_bytes = run.config.export.shard_bytes
        save_model(run.engine.module.student, state, tokenizer, folder, whole=whole, shard_bytes=shard_bytes)
