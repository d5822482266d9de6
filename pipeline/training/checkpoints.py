"""Checkpoints of a run: saved by all ranks, published by one, kept as asked, converted for other ranks or stages.

A checkpoint counts once `published.json` names it: that file is replaced atomically, after the checkpoint's own files
are durable. What a crash leaves unfinished is not named there, and is deleted when the run continues.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from pipeline.config.schema import CheckpointConfig, Dtype, ExportedStep, Optimizer, TrainConfig
from pipeline.core.files import RunPaths, sync_files, write_json
from pipeline.core.progress import log
from pipeline.core.runtime import full_numel, module_command
from pipeline.core.types import InputError, RunFailed
from pipeline.training.run import Run, TrainState

FORMAT = 2  # version of published.json; version 1 did not list the files
ABOUT = "about.json"  # in each checkpoint's folder: the published.json of the time when it was the newest


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """The content of published.json: the newest complete checkpoint."""

    tag: str
    world_size: int
    zero_stage: int
    run: str
    """The run folder's name, which ends in the hash of all that decides the result."""
    files: dict[str, int]
    """Bytes of each file."""
    state: dict[str, Any]
    """TrainState's fields."""
    skipped_steps: int
    """Those in which the optimizer did nothing, because a gradient overflowed."""
    loss_scale: float | None = None
    """In float16 the factor that the loss had; None in checkpoints of before."""
    format: int = FORMAT

    def train_state(self) -> TrainState:
        """As it was when this was saved."""
        return TrainState(**self.state | {"thresholds": tuple(self.state["thresholds"])})

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.state["step"])


def published(paths: RunPaths) -> Published | None:
    """The newest complete checkpoint; refuses one with missing files, of another run, or of another code version."""
    return _read(paths, paths.published) if paths.published.exists() else None


def keeps_best(config: TrainConfig) -> bool:
    """Whether the checkpoint of the best step is kept until the run is finished."""
    return config.export.what is ExportedStep.best


def needed(paths: RunPaths, config: TrainConfig) -> list[Published]:
    """The checkpoints that a run needs to continue: the newest, and that of the best step where it is exported."""
    newest = published(paths)
    if newest is None:
        return []
    state = newest.train_state()
    return [newest, of_best(paths, state)] if keeps_best(config) and 0 < state.best_step < state.step else [newest]


def of_best(paths: RunPaths, state: TrainState) -> Published:
    """The checkpoint of the step that was best on dev; refused like the newest."""
    about = paths.checkpoints / tag_of(state.best_step) / ABOUT
    if not about.exists():
        raise InputError(
            f"{about}: expected the checkpoint of step {state.best_step}, the best on dev, found none; restore it, "
            f"or delete {paths.checkpoints} to start again"
        )
    return _read(paths, about)


def _read(paths: RunPaths, about: Path) -> Published:
    found = json.loads(about.read_text())
    if found.get("format") != FORMAT:
        raise InputError(
            f"{about}: expected a checkpoint of format {FORMAT}, found {found.get('format', 1)}, made by "
            f"another version of this code; continue with that version, or delete {paths.checkpoints} to start again"
        )
    checkpoint = Published(**found)
    if checkpoint.run != paths.folder.name:
        raise InputError(
            f"{about}: expected a checkpoint of {paths.folder.name}, found one of {checkpoint.run}, whose "
            f"options or inputs differ; delete {paths.checkpoints} to start again"
        )
    folder = paths.checkpoints / checkpoint.tag
    for name, size in checkpoint.files.items():
        held = (folder / name).stat().st_size if (folder / name).is_file() else None
        if held != size:
            raise InputError(
                f"{folder / name}: expected {size} bytes, found {'no such file' if held is None else held}; restore "
                f"it, or delete {paths.checkpoints} to start again"
            )
    return checkpoint


# ----------------------------------------------------------------------------------------------- saving


def save(run: Run, state: TrainState) -> None:
    """Save on all ranks, publish on the first by replacing one small file, then delete what need not be kept."""
    folder, checkpoints = run.paths.checkpoints / tag_of(state.step), run.paths.checkpoints
    checkpoints.mkdir(parents=True, exist_ok=True)
    try:
        run.engine.save_checkpoint(str(checkpoints), tag=folder.name, save_latest=False, exclude_frozen_parameters=True)
        if run.ranks.rank == 0:
            sync_files(folder)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError when a disk is full
        free = shutil.disk_usage(checkpoints).free
        shutil.rmtree(folder, ignore_errors=True)
        raise RunFailed(
            f"{folder}: expected to save a checkpoint, found {error} with {free / 1e6:.0f} MB free; make room and run "
            f"the same command again: it continues from the last complete checkpoint"
        ) from error
    run.ranks.barrier()
    if run.ranks.rank == 0:
        _publish(run, state, folder)
        delete_others(run.paths, _to_keep(run, state))
    run.ranks.barrier()


def _publish(run: Run, state: TrainState, folder: Path) -> None:
    """Describe a complete checkpoint in its folder, then in published.json, which makes it the newest."""
    published = Published(
        tag=folder.name,
        state=dataclasses.asdict(state),
        skipped_steps=run.engine.skipped_steps,
        loss_scale=run.loss_scale,
        world_size=run.ranks.world_size,
        zero_stage=run.config.deepspeed.zero_stage,
        run=run.paths.folder.name,
        files={
            str(path.relative_to(folder)): path.stat().st_size
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != ABOUT
        },
    )
    write_json(folder / ABOUT, dataclasses.asdict(published))
    write_json(run.paths.published, dataclasses.asdict(published))


def _to_keep(run: Run, state: TrainState) -> set[str]:
    """The names of the folders that stay after the checkpoint of this step."""
    steps = saved_steps(run.paths, up_to=state.step)
    names = {tag_of(step) for step in kept(steps, run.config.checkpoint)}
    if keeps_best(run.config):  # its universal form too: the ranks that saved it may be gone when it is loaded
        names |= {tag_of(state.best_step), f"{tag_of(state.best_step)}-universal"}
    return names


def tag_of(step: int) -> str:
    """The folder's name of a step's checkpoint."""
    return f"step-{step:08d}"


def saved_steps(paths: RunPaths, *, up_to: int) -> list[int]:
    """The steps that have a folder, ascending; one beyond the published step was left unfinished by a crash."""
    steps = [int(path.name.removeprefix("step-")) for path in paths.checkpoints.glob("step-????????")]
    return sorted(step for step in steps if step <= up_to)


def kept(steps: Sequence[int], options: CheckpointConfig) -> set[int]:
    """Of the saved steps, ascending: the last `keep`, and the milestones."""
    return {*steps[-options.keep :], *milestones(steps, options)}


def milestones(steps: Sequence[int], options: CheckpointConfig) -> set[int]:
    """The steps whose checkpoints stay when the run is finished: the multiples of `keep_every_steps`."""
    every = options.keep_every_steps
    return {step for step in steps if every and step % every == 0}


def delete_others(paths: RunPaths, keep: Container[str]) -> None:
    """Delete every other checkpoint, converted ones, and what a crash left unfinished."""
    for path in paths.checkpoints.glob("step-*"):
        if path.name not in keep:
            shutil.rmtree(path)


def clear(paths: RunPaths, options: CheckpointConfig) -> None:
    """When a run is finished: delete all but the milestones."""
    paths.published.unlink(missing_ok=True)
    for_good = {tag_of(step) for step in milestones(saved_steps(paths, up_to=10**8), options)}
    delete_others(paths, for_good)
    if not for_good:
        shutil.rmtree(paths.checkpoints, ignore_errors=True)


def checkpoint_bytes(parameters: Iterable[nn.Parameter], *, zero_stage: int) -> int:
    """Size of one checkpoint: the trained weights, AdamW's two moments of each, and a float32 copy.

    ZeRO 0 in float32 keeps no copy. Frozen weights are not in it: they are the student's, before training.
    """
    total = 0
    for parameter in parameters:
        has_copy = zero_stage > 0 or parameter.element_size() < 4
        bytes_each = parameter.element_size() + (12 if has_copy else 8)
        total += full_numel(parameter) * bytes_each if parameter.requires_grad else 0
    return total


def check_room(paths: RunPaths, size: int, config: TrainConfig) -> None:
    """Log the size of the checkpoints, and refuse to train where the disk cannot hold one."""
    free = shutil.disk_usage(paths.folder).free
    log.info(
        "a checkpoint takes about %.1f MB, %d of them while one is saved; %.1f MB are free",
        size / 1e6,
        config.checkpoint.keep + 1 + keeps_best(config),
        free / 1e6,
    )
    if free < size:
        raise InputError(
            f"{paths.folder}: expected room for a checkpoint of {size / 1e6:.1f} MB, found {free / 1e6:.1f} MB free; "
            "make room, or choose another runs_dir"
        )


# ------------------------------------------------------------------------------------------- continuing


def fits(checkpoint: Published, config: TrainConfig, world_size: int) -> bool:
    """Whether these ranks can load it as it was saved, bit by bit.

    At ZeRO 0 in float32 each rank holds everything, so their number does not matter; there DeepSpeed has no form for
    another stage either, which is refused.
    """
    stage = config.deepspeed.zero_stage
    if checkpoint.zero_stage == stage and (checkpoint.world_size == world_size or is_unwrapped(config, stage)):
        return True
    if is_unwrapped(config, stage) or is_unwrapped(config, checkpoint.zero_stage):
        raise InputError(
            f"deepspeed.zero_stage: expected {checkpoint.zero_stage}, as in the checkpoint of step {checkpoint.step}, "
            f"found {stage}; in float32 a checkpoint changes between stages 1, 2 and 3 only"
        )
    if config.optimizer.name is Optimizer.muon:
        raise InputError(
            f"optimizer.name=muon: expected {checkpoint.world_size} ranks at ZeRO {checkpoint.zero_stage}, as in the "
            f"checkpoint of step {checkpoint.step}, because DeepSpeed has no form of Muon's momentum for others, found "
            f"{world_size} at ZeRO {stage}"
        )
    return False


def is_unwrapped(config: TrainConfig, zero_stage: int) -> bool:
    """Whether DeepSpeed wraps neither weights nor optimizer: ZeRO 0 in float32."""
    return zero_stage == 0 and config.student.dtype is Dtype.float32


def universal(paths: RunPaths, checkpoint: Published) -> Path:
    """The folder of a checkpoint in DeepSpeed's universal form: one file a parameter, for any ranks and any stage."""
    return paths.checkpoints / f"{checkpoint.tag}-universal"


def convert(paths: RunPaths, checkpoint: Published) -> None:
    """Convert a checkpoint to the universal form with DeepSpeed's own program; a crash leaves nothing behind."""
    done = universal(paths, checkpoint)
    if done.exists():
        return
    unfinished = done.with_name(f".{done.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    command = module_command("deepspeed.checkpoint.ds_to_universal", "--inject_missing_state")
    command += ["--input_folder", str(paths.checkpoints / checkpoint.tag), "--output_folder", str(unfinished)]
    # in a session of its own: Ctrl-C does not reach it, and the ranks that follow find the request to stop
    ended = subprocess.run(command, capture_output=True, text=True, check=False, start_new_session=True)
    if ended.returncode != 0:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise RunFailed(
            f"{paths.checkpoints / checkpoint.tag}: expected DeepSpeed to convert a checkpoint of "
            f"{checkpoint.world_size} ranks at ZeRO {checkpoint.zero_stage}, found\n{ended.stderr[-3000:]}\n"
            f"continue with those, or delete {paths.checkpoints} to start again"
        )
    unfinished.rename(done)
