"""The driver of stage two: names a run by what decides its result, starts its ranks, waits, reads the result.

No DeepSpeed and no CUDA in this process: a sweep's driver starts many runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.config.options import load_config, save_config
from pipeline.config.schema import ExportedStep, TrainConfig
from pipeline.config.validate_train import check_train
from pipeline.core.file_systems import check_folder
from pipeline.core.files import RunPaths, content_hash, is_hub_name, write_json
from pipeline.core.progress import log, start_logging
from pipeline.core.run_state import record_finished, recorded_state
from pipeline.core.runtime import environment, module_command
from pipeline.core.stopping import STOP_SIGNALS, Stopped, stop_signals_handled_by
from pipeline.core.types import InputError, RunFailed
from pipeline.data.mixture import fitting_micro_batch
from pipeline.evaluation.predictions import main_score, scores_from
from pipeline.models.loading import check_trained_dtype, resolve_dtype
from pipeline.models.lora import check_adapter
from pipeline.models.paths import pinned
from pipeline.training import checkpoints
from pipeline.training.finish import read_result, steps_kept, time_taken
from pipeline.training.held_out import SPLITS, entry_of, is_missing, needs_model
from pipeline.training.identity import identity_of
from pipeline.training.inputs import RunInputs, save_inputs
from pipeline.training.joint import gather, watch
from pipeline.training.launch import ranks_command, start_process, worker_command
from pipeline.training.meeting import meeting_of
from pipeline.training.nodes import check_allocation, this_node
from pipeline.training.options_read import trust_source
from pipeline.training.run_lock import run_lock
from pipeline.training.trust import learn_trust


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PreparedRun:
    """A run whose options and inputs are checked: its folder has the name that they decide."""

    config: TrainConfig
    paths: RunPaths
    identity: dict[str, Any]
    inputs: RunInputs
    num_ranks: int
    began: float
    """When this command began with the run, by time.monotonic."""

    def missing(self) -> list[str]:
        """The held-out texts of which a finished run has no scores, or the agreement with another teacher."""
        result, keys = read_result(self.paths), self.inputs.keys
        files = {name: self.paths.predictions(name) for name in keys}
        return [name for name, key in keys.items() if is_missing(entry_of(result, name), key, files[name])]

    def is_complete(self) -> bool:
        """Whether the run is finished and scored on each of its held-out texts."""
        return self.paths.result.exists() and not self.missing()

    def write(self) -> None:
        """Leave in the run folder what its ranks need."""
        config, inputs = self.config, self.inputs
        if self.paths.result.exists():  # what it was trained with stays
            config = with_texts_of(config, load_config(self.paths.config, TrainConfig))
            missing = {name: inputs.held_out[name] for name in self.missing()}
            inputs = dataclasses.replace(inputs, gold=None, held_out=missing)
        else:
            write_json(self.paths.environment, environment())
        write_json(self.paths.identity, self.identity)
        save_config(config, self.paths.config)
        save_inputs(self.paths, inputs)


def with_texts_of(config: TrainConfig, before: TrainConfig) -> TrainConfig:
    """The options of a finished run, `before`, with the held-out texts that it is scored on now as well."""
    kept = [name for name in before.out_of_domain if name not in config.more_tests]
    return dataclasses.replace(
        before,
        student=config.student,  # the same, wherever it lies now
        deepspeed=config.deepspeed,  # of the machine that scores
        launcher=config.launcher,
        dev=config.dev or before.dev,
        test=config.test or before.test,
        more_tests=before.more_tests | config.more_tests,
        out_of_domain=kept + config.out_of_domain,
        scoring=config.scoring,
    )


def run(config: TrainConfig) -> float | None:
    """Bring one run to its result, from nothing or from where it stands; returns its score on dev (else test)."""
    start_logging(quiet=config.launcher.quiet)
    return run_prepared(prepare(config))


def run_prepared(prepared: PreparedRun) -> float | None:
    """The same for a run whose inputs are checked already."""
    paths = prepared.paths
    check_weights_kept(prepared)
    if not paths.result.exists():
        # refuse an incomplete checkpoint before waiting for the lock
        checkpoints.needed(paths, prepared.config)
        if prepared.config.steps != 0:
            check_adapter(prepared.config.student)
        check_folder(paths.folder, "runs_dir")
    if not prepared.is_complete():
        if not can_be_scored(prepared):
            return sweep_objective(prepared)
        with run_lock(paths, prepared.config.launcher.if_busy) as lock:
            if not prepared.is_complete():  # else another process finished it while this one waited
                with recorded_state(paths):
                    run_to_result(prepared, lock)
                return sweep_objective(prepared)
    record_finished(paths)
    log.info("%s is finished; nothing to do", paths.folder)
    return sweep_objective(prepared)


def check_weights_kept(prepared: PreparedRun) -> None:
    """Refuse to export the weights of a run that kept none (export.what=none): they can only be trained again."""
    config, paths = prepared.config, prepared.paths
    wants_weights = config.steps != 0 and config.export.what is not ExportedStep.none
    if not wants_weights or not paths.result.exists() or paths.model.exists():
        return
    if load_config(paths.config, TrainConfig).export.what is ExportedStep.none:
        raise InputError(
            f"{paths.model}: expected the exported weights, found none, because export.what=none trained this run; "
            f"delete {paths.folder} to train it again with its weights, or keep export.what=none"
        )


def can_be_scored(prepared: PreparedRun) -> bool:
    """Whether a model is there, or still to be trained, for the scores that are missing; a warning if not."""
    paths = prepared.paths
    if prepared.config.steps == 0 or not paths.result.exists() or paths.model.exists():
        return True
    result, keys = read_result(paths), prepared.inputs.keys
    unscored = [n for n, key in keys.items() if needs_model(entry_of(result, n), key, paths.predictions(n))]
    if unscored:
        log.warning(
            "%s: expected the exported model, to score it on %s, found none; restore it, or delete %s to train again",
            *(paths.model, ", ".join(unscored), paths.folder),
        )
    return not unscored


def prepare(config: TrainConfig) -> PreparedRun:
    """Check the options, read and check every input, and find the run's folder; nothing is written."""
    began = time.monotonic()
    check_train(config)
    batch = config.global_batch if config.global_batch_tokens is None else config.global_batch_tokens // config.window
    revision = config.student.revision
    config = dataclasses.replace(config, student=pinned(resolve_dtype(config.student)), global_batch=batch)
    num_ranks = num_processes(config)
    if config.steps != 0 or config.deepspeed.zero_stage == 3:
        num_ranks *= config.launcher.num_nodes
        if this_node(config.launcher, os.environ) is None:
            check_allocation(config.launcher.num_nodes, os.environ)
    if config.steps != 0:
        check_trained_dtype(config.student)
        fitting_micro_batch(config.global_batch, world_size=num_ranks, at_most=config.micro_batch)
    identity, inputs = identity_of(config)
    if is_hub_name(config.student.path):  # as it was given: the files' content is hashed, so a name needs no commit
        identity["options"]["student"]["revision"] = revision
    paths = RunPaths(folder=Path(config.runs_dir) / f"{config.name}-{content_hash(identity)[:12]}")
    if inputs.gold is not None and not paths.result.exists():
        inputs.gold.check()
    # once written it stays, so that a resumed run has the same
    if trust_source(config) is not None and not (paths.trust.exists() or paths.result.exists()):
        inputs = dataclasses.replace(inputs, trust=learn_trust(config))
    return PreparedRun(config=config, paths=paths, identity=identity, inputs=inputs, num_ranks=num_ranks, began=began)


def run_to_result(prepared: PreparedRun, lock: int) -> None:
    """Run the ranks until all scores are there; Stopped if asked to stop, RunFailed if they end without."""
    paths = prepared.paths
    paths.stop.unlink(missing_ok=True)
    with forward_signals(paths) as signals:
        prepared.write()
        if paths.result.exists():
            log.info("scoring on %s: %s", ", ".join(prepared.missing()), paths.folder)
        else:
            convert_checkpoints(prepared.config, paths, prepared.num_ranks)
            log.info("%s: %s", "resuming" if paths.published.exists() else "starting", paths.folder)
        kept = steps_kept(paths)
        exit_code = run_ranks(prepared.config, paths, prepared.num_ranks, lock)
    is_complete = prepared.is_complete()
    # a rank may have stopped because of a signal of its own, or because of the time limit
    is_stopped = paths.stop.exists() or (exit_code == 0 and not is_complete)
    paths.stop.unlink(missing_ok=True)
    if is_complete:
        log.info("finished: %s; %s", paths.folder, time_taken(paths, time.monotonic() - prepared.began, kept))
        if is_stopped:  # asked for after the last step: the run needs no more of it, but a sweep has to know
            score = sweep_objective(prepared)
            raise Stopped(f"finished: {paths.folder}", is_finished=True, score=score, signals=tuple(signals))
    elif is_stopped and (exit_code == 0 or -exit_code in STOP_SIGNALS):  # of a scorer that still loaded its modules
        message = f"stopped: {paths.folder}; the same command continues from its checkpoint"
        if paths.model.exists() or prepared.config.steps == 0:
            message = f"stopped: {paths.folder}; the same command scores it again"
        log.info("%s", message)
        raise Stopped(message, is_finished=False, signals=tuple(signals))
    else:
        raise RunFailed(f"{paths.folder} failed (exit code {exit_code}); the reason stands above and in {paths.log}")


def convert_checkpoints(config: TrainConfig, paths: RunPaths, ranks: int) -> None:
    """Before the ranks start, convert the checkpoints that they cannot load as they were saved."""
    if paths.model.exists():
        return
    for checkpoint in checkpoints.needed(paths, config):
        if not checkpoints.fits(checkpoint, config, ranks):
            log.info(
                "the checkpoint of step %d is of %d ranks at ZeRO %d: converting it for %d ranks at ZeRO %d",
                *(checkpoint.step, checkpoint.world_size, checkpoint.zero_stage, ranks, config.deepspeed.zero_stage),
            )
            checkpoints.convert(paths, checkpoint)


def num_processes(config: TrainConfig) -> int:
    """Ranks on this machine: as configured, else one per GPU, else one; one for a student that is only scored whole."""
    if config.steps == 0 and config.deepspeed.zero_stage < 3:
        return 1
    if config.launcher.num_processes is not None:
        return config.launcher.num_processes
    return max(torch.cuda.device_count(), 1)


def run_ranks(config: TrainConfig, paths: RunPaths, ranks: int, lock: int) -> int:
    """Start the ranks under torchrun, or the one that scores alone; wait for them; returns the exit code."""
    nodes = config.launcher.num_nodes
    if (config.steps == 0 or paths.result.exists()) and config.deepspeed.zero_stage < 3:
        command = module_command("pipeline.training.scorer", str(paths.folder))
        return start_process(config, command, num_processes=1, lock=lock).wait()
    meeting, on_this_node = meeting_of(config.launcher), ranks // nodes
    if meeting is None:
        command = ranks_command(worker_command(paths), num_nodes=nodes, num_processes=on_this_node)
        return start_process(config, command, num_processes=on_this_node, lock=lock).wait()
    port = gather(meeting, paths.folder)
    command = ranks_command(
        worker_command(paths), num_nodes=nodes, num_processes=on_this_node, node=meeting.node, port=port
    )
    return watch(meeting, start_process(config, command, num_processes=on_this_node, lock=lock))


@contextlib.contextmanager
def forward_signals(paths: RunPaths) -> Iterator[list[int]]:
    """Turn signals to this process into the stop file, which its ranks check after each step; yields those received."""
    received: list[int] = []

    def ask_to_stop(number: int, frame: object) -> None:
        received.append(number)
        paths.stop.touch()
        log.info(
            "stop requested: the ranks save after their current step and end, or leave scoring to the next command"
        )

    with stop_signals_handled_by(ask_to_stop):
        yield received


def sweep_objective(prepared: PreparedRun) -> float | None:
    """What a sweep maximises: the main score on dev, else on test; None without such a text, or scores on it."""
    result, keys = read_result(prepared.paths), prepared.inputs.keys
    for name in (split for split in SPLITS if split in keys):
        entry = entry_of(result, name)
        if entry is None or needs_model(entry, keys[name], prepared.paths.predictions(name)):
            return None
        return main_score(scores_from(entry))
    return None
