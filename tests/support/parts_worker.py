"""`pipeline.training.worker` in one rank, which counts complete parameters (ZeRO 3) and can be killed at a place.

    torchrun --nproc-per-node=RANKS parts_worker.py RUN_FOLDER

writes RUN_FOLDER/parts-RANK.json: by phase, the most elements of parameters that were complete at once; and the bytes
of the tensors that were in memory when the exported model was loaded. With
KILLED_AT=RANK:MODULE:FUNCTION:NUMBER this rank ends by SIGKILL when it calls the function for the NUMBERth time.
"""

import functools
import gc
import importlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

from pipeline.core.runtime import exit_rank, full_numel
from pipeline.training import worker

complete: dict[int, int] = {}
most: dict[str, int] = {}
phases = ["load"]


def note_status(parameter: torch.nn.Parameter, name: str, value: Any) -> None:
    """DeepSpeed marks each parameter that it has gathered, and each that it has released."""
    object.__setattr__(parameter, name, value)
    if name != "ds_status":
        return
    if value is ZeroParamStatus.AVAILABLE:
        complete[id(parameter)] = full_numel(parameter)
    elif value is ZeroParamStatus.NOT_AVAILABLE:
        complete.pop(id(parameter), None)
    most[phases[-1]] = max(most.get(phases[-1], 0), sum(complete.values()))


def in_phase(name: str, function: Any) -> Any:
    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        phases.append(name)
        try:
            return function(*arguments, **named)
        finally:
            phases.pop()

    return call


def counts_what_lives(function: Any) -> Any:
    """Before the exported model is loaded: the bytes of all tensors that are still in memory."""

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        tensors = [one for one in gc.get_objects() if isinstance(one, torch.Tensor)]
        storages = {storage.data_ptr(): storage.nbytes() for storage in (one.untyped_storage() for one in tensors)}
        most["bytes left"] = sum(storages.values())
        return function(*arguments)

    return call


def killed_at_call(function: Any, number: int) -> Any:
    calls = 0

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **named)

    return call


if __name__ == "__main__":
    torch.nn.Parameter.__setattr__ = note_status
    worker.take_steps = in_phase("steps", worker.take_steps)
    worker.export = in_phase("export", worker.export)
    worker.open_exported = in_phase("load again", counts_what_lives(worker.open_exported))
    worker.finish = in_phase("scores", worker.finish)
    rank, _, place = os.environ.get("KILLED_AT", "").partition(":")
    if rank == os.environ["RANK"]:
        module, function, number = place.split(":")
        patched = importlib.import_module(module)
        setattr(patched, function, killed_at_call(getattr(patched, function), int(number)))
    folder = Path(sys.argv[1])
    worker.run(folder)
    (folder / f"parts-{os.environ['RANK']}.json").write_text(json.dumps(most))
    exit_rank()
