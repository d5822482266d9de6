"""What a run leaves when it has no step left: its scores and its result. Nothing of the optimizer is loaded for it."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pipeline.config.schema import ExportedStep, ModelConfig, TrainConfig
from pipeline.core.files import RunPaths, write_atomically, write_json
from pipeline.core.runtime import Ranks
from pipeline.core.watchdog import watched
from pipeline.evaluation.predictions import Scores, scored_before, scores_from
from pipeline.evaluation.scoring import score
from pipeline.models.forward import Model
from pipeline.models.tokenizer import open_tokenizer
from pipeline.monitoring.metrics import MetricsFile, seconds_of
from pipeline.monitoring.trackers import record_result
from pipeline.training import checkpoints
from pipeline.training.card import card
from pipeline.training.dev_evaluation import dev_summary
from pipeline.training.held_out import entry_of, is_missing, needs_model, teacher_file, with_entry
from pipeline.training.inputs import load_held_out, load_keys


def scored_model(config: TrainConfig, paths: RunPaths) -> ModelConfig:
    """The model whose scores are the run's: the exported folder, or without training the student as it is."""
    if config.steps == 0:
        return config.student
    return dataclasses.replace(config.student, path=str(paths.model), revision=None, num_layers=None, adapter=None)


def finish(config: TrainConfig, paths: RunPaths, ranks: Ranks, load: Callable[[], Model]) -> None:
    """Make the scores that are missing, on all ranks; the first one writes the result, and after training clears up.

    A result that exists gets what it lacks: everything else in it stays. `load` opens the model, where it is needed.
    """
    is_new = not paths.result.exists()
    result: dict[str, Any] = {"name": config.name, "seed": config.seed} if is_new else read_result(paths)
    result = with_missing_scores(config, paths, result, ranks, load)
    ranks.barrier()  # until all ranks have read the inputs
    if ranks.rank == 0:
        write_result(config, paths, result, is_new=is_new)
    ranks.barrier()


def write_result(config: TrainConfig, paths: RunPaths, result: dict[str, Any], *, is_new: bool) -> None:
    """Complete result.json and the model's card, delete checkpoints and inputs."""
    if is_new:
        result |= training_summary(config, paths)
        checkpoints.clear(paths, config.checkpoint)
    shutil.rmtree(paths.inputs, ignore_errors=True)
    if paths.model.exists():
        identity = json.loads(paths.identity.read_text())
        write_atomically(paths.model / "README.md", card(base=config.student.path, identity=identity, result=result))
    write_json(paths.result, result)
    if config.export.what is ExportedStep.none:  # after the result: without it the run would have to train again
        shutil.rmtree(paths.model, ignore_errors=True)
        shutil.rmtree(paths.adapter, ignore_errors=True)
    record_result(config, paths, result)


def read_result(paths: RunPaths) -> dict[str, Any]:
    """result.json."""
    result: dict[str, Any] = json.loads(paths.result.read_text())
    return result


def with_missing_scores(
    config: TrainConfig, paths: RunPaths, result: dict[str, Any], ranks: Ranks, load: Callable[[], Model]
) -> dict[str, Any]:
    """The result with scores on each held-out text; the model is loaded if one needs it. Complete on the first rank."""
    keys, model = load_keys(paths), functools.cache(load)
    needed = [needs_model(entry_of(result, name), key, paths.predictions(name)) for name, key in keys.items()]
    # the first rank decides: it alone changes these files
    needed = ranks.broadcast(torch.tensor(needed, dtype=torch.int64, device=ranks.device)).bool().tolist()
    for (name, key), is_needed in zip(keys.items(), needed, strict=True):
        file, entry, teacher = paths.predictions(name), entry_of(result, name), teacher_file(config, name)
        if is_needed:
            if entry is not None and ranks.rank == 0:
                # scores and predictions are never of two texts, whenever this process is killed
                result = with_entry(result, name, None)
                write_json(paths.result, result)
            scores, predictions = score_on(name, config, paths, ranks, model())
        elif ranks.rank > 0 or not is_missing(entry, key, file):
            continue
        elif teacher is not None:
            scores, predictions = scored_before(file, load_held_out(paths, name, None), teacher)
        else:
            assert entry is not None
            scores, predictions = scores_from(entry), None
            key = dataclasses.replace(key, teacher_predictions=entry["teacher_predictions"])
        if ranks.rank == 0 and predictions is not None:
            write_table(predictions, file)
        result = with_entry(result, name, dataclasses.asdict(scores) | dataclasses.asdict(key))
    return result


def score_on(name: str, config: TrainConfig, paths: RunPaths, ranks: Ranks, model: Model) -> tuple[Scores, Any]:
    """Scores and predictions on one held-out text, made by all ranks together and the same on each."""
    _, tokenizer = open_tokenizer(scored_model(config, paths))
    held_out = load_held_out(paths, name, tokenizer)
    with watched(config.launcher.hang_seconds):
        return score(
            model,
            held_out,
            batch_tokens=config.scoring.batch_tokens,
            teacher_predictions=teacher_file(config, name),
            log_every_seconds=config.launcher.log_every_seconds,
            ranks=ranks,
        )


def write_table(table: Any, file: Path) -> None:
    """Replace a file of predictions by another table, at once."""
    temporary = file.with_name(f".{file.name}.tmp")
    table.write_parquet(temporary)
    temporary.replace(file)


def training_summary(config: TrainConfig, paths: RunPaths) -> dict[str, Any]:
    """Steps, seconds and the exported step of a run, for result.json; all 0 without training."""
    rows = [] if config.steps == 0 else MetricsFile.read(paths.metrics)
    return {"steps": len(rows), "train_seconds": seconds_of(rows), **dev_summary(rows, what=config.export.what)}


# -------------------------------------------------------------------------------------- time taken


def steps_kept(paths: RunPaths) -> int | None:
    """Steps whose rows of metrics.jsonl the ranks will keep, because they do not make them again; None: all."""
    if paths.model.exists() or paths.result.exists():
        return None
    newest = checkpoints.published(paths)
    return 0 if newest is None else newest.step


def time_taken(paths: RunPaths, seconds: float, kept: int | None) -> str:
    """The seconds of a command that finished a run, and how many of them were not steps that it made itself."""
    rows = [] if kept is None or not paths.metrics.exists() else MetricsFile.read(paths.metrics)
    beside = seconds - seconds_of(row for row in rows if row["step"] > (kept or 0))
    return (
        f"{seconds:.1f} s, {beside:.1f} s of them beside its steps (start, imports, load, checkpoints, score, export)"
    )
