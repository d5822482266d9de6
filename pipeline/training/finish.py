"""What a run leaves when it has no step left: its scores and its result. No engine is loaded for it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from typing import Any

from pipeline.config.schema import ModelConfig, TrainConfig
from pipeline.core.files import RunPaths, write_atomically, write_json
from pipeline.core.runtime import compute_device
from pipeline.evaluation.scoring import score
from pipeline.models.loading import open_model
from pipeline.models.prepack import prepack
from pipeline.models.tokenizer import open_tokenizer
from pipeline.monitoring.metrics import MetricsFile
from pipeline.monitoring.trackers import record_result
from pipeline.training import checkpoints
from pipeline.training.card import card
from pipeline.training.dev_evaluation import dev_summary
from pipeline.training.inputs import load_held_out


def scored_model(config: TrainConfig, paths: RunPaths) -> ModelConfig:
    """The model whose scores are the run's: the exported folder, or without training the student as it is."""
    if config.steps == 0:
        return config.student
    return dataclasses.replace(config.student, path=str(paths.model), revision=None, num_layers=None, adapter=None)


def finish(config: TrainConfig, paths: RunPaths) -> None:
    """Score the run's model on dev and test, write the result, delete checkpoints and inputs."""
    scored = scored_model(config, paths)
    _, tokenizer = open_tokenizer(scored)
    model = prepack(open_model(scored, compute_device()))
    result: dict[str, Any] = {"name": config.name, "seed": config.seed}
    for split, text in (("dev", config.dev), ("test", config.test)):
        if text is None:
            continue
        scores, predictions = score(
            model,
            load_held_out(paths, split, tokenizer),
            batch_tokens=config.scoring.batch_tokens,
            teacher_predictions=config.scoring.teacher_predictions if split == "test" else None,
            log_every_seconds=config.launcher.log_every_seconds,
        )
        predictions.write_parquet(paths.predictions(split))
        result[split] = dataclasses.asdict(scores)
    result |= training_summary(config, paths)
    checkpoints.clear(paths, config.checkpoint)
    shutil.rmtree(paths.inputs, ignore_errors=True)
    if config.steps != 0:
        identity = json.loads(paths.identity.read_text())
        write_atomically(paths.model / "README.md", card(base=config.student.path, identity=identity, result=result))
    write_json(paths.result, result)
    record_result(config, paths, result)


def training_summary(config: TrainConfig, paths: RunPaths) -> dict[str, Any]:
    """Steps, seconds and the exported step of a run, for result.json; all 0 without training."""
    rows = [] if config.steps == 0 else MetricsFile.read(paths.metrics)
    durations = ("seconds", "data_wait_seconds", "dev_seconds")
    seconds = sum((row.get(name, 0.0) for row in rows for name in durations), 0.0)
    return {"steps": len(rows), "train_seconds": seconds, **dev_summary(rows, what=config.export.what)}
