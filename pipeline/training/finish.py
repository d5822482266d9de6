"""What a run leaves when it has no step left: its scores and its result. No engine is loaded for it."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from pathlib import Path
from typing import Any

from pipeline.config.schema import ExportedStep, ModelConfig, TrainConfig
from pipeline.core.files import RunPaths, write_atomically, write_json
from pipeline.core.runtime import compute_device
from pipeline.evaluation.predictions import scored_before, scores_from
from pipeline.evaluation.scoring import score
from pipeline.models.loading import open_model
from pipeline.models.prepack import prepack
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


def finish(config: TrainConfig, paths: RunPaths) -> None:
    """Make the scores that are missing, and write the result; after training also delete checkpoints and inputs.

    A result that exists gets what it lacks: everything else in it stays.
    """
    is_new = not paths.result.exists()
    result: dict[str, Any] = {"name": config.name, "seed": config.seed} if is_new else read_result(paths)
    result = with_missing_scores(config, paths, result)
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


def with_missing_scores(config: TrainConfig, paths: RunPaths, result: dict[str, Any]) -> dict[str, Any]:
    """The result with scores on each held-out text; the model is loaded if one needs it."""
    model = functools.cache(lambda: prepack(open_model(scored_model(config, paths), compute_device())))
    for name, key in load_keys(paths).items():
        file, entry = paths.predictions(name), entry_of(result, name)
        if not is_missing(entry, key, file):
            continue
        teacher = teacher_file(config, name)
        if needs_model(entry, key, file):
            if entry is not None:  # scores and predictions are never of two texts, whenever this process is killed
                result = with_entry(result, name, None)
                write_json(paths.result, result)
            _, tokenizer = open_tokenizer(scored_model(config, paths))
            scores, predictions = score(
                model(),
                load_held_out(paths, name, tokenizer),
                batch_tokens=config.scoring.batch_tokens,
                teacher_predictions=teacher,
                log_every_seconds=config.launcher.log_every_seconds,
            )
            write_table(predictions, file)
        elif teacher is not None:
            scores, predictions = scored_before(file, load_held_out(paths, name, None), teacher)
            write_table(predictions, file)
        else:
            assert entry is not None
            scores, key = scores_from(entry), dataclasses.replace(key, teacher_predictions=entry["teacher_predictions"])
        result = with_entry(result, name, dataclasses.asdict(scores) | dataclasses.asdict(key))
    return result


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
