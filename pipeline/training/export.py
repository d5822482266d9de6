"""What a run leaves: the exported model, its model card with data and scores, and the result."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

from pipeline.config.schema import TrainConfig
from pipeline.core.files import RunPaths, atomic_folder, is_hub_name, write_atomically, write_json
from pipeline.core.runtime import compute_device
from pipeline.evaluation.scoring import score
from pipeline.models.loading import open_model, save_model
from pipeline.models.lora import merge_adapter
from pipeline.models.prepack import prepack
from pipeline.models.tokenizer import open_tokenizer
from pipeline.monitoring.metrics import MetricsFile
from pipeline.training import checkpoints
from pipeline.training import engine as engines
from pipeline.training.dev_evaluation import dev_summary
from pipeline.training.inputs import load_held_out
from pipeline.training.run import Run

EXPORTED = {"last": "the last", "best": "the best of those evaluated on dev"}
LIBRARIES = ("torch", "transformers", "deepspeed")


def card(*, base: str, identity: dict[str, Any], result: dict[str, Any]) -> str:
    """README.md of an exported model, as the hub reads it: front matter, then text.

    `identity` and `result` are identity.json and result.json of its run. No path of the machine is in it: of a local
    `base` only the folder's name, which the hub could not resolve, stands in the text.
    """
    options = identity["options"]
    front = [
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags:",
        "- weak-to-strong",
        "- distillation",
    ]
    if is_hub_name(base):
        front.insert(0, f"base_model: {base}")
    else:
        base = base.rstrip("/").rsplit("/", 1)[-1]
    lines = ["---", *front, "---", "", f"# {result['name']}, seed {result['seed']}", ""]
    lines += [
        _summary(base, options["student"]["adapter"]),
        "",
        "## Scores",
        "",
        *_table(["split", "records", "accuracy", "exact match", "nll a target"], _scores(result)),
        "",
        "## Made of",
        "",
        *_table(["what", "sha256"], _inputs(identity)),
        "",
        "## Objective",
        "",
        *_table(["term", "weight", "on"], _terms(options["loss"])),
        "",
        _training(options, result),
        "",
        "All options:",
        "",
        "```json",
        json.dumps(options, indent=1, sort_keys=True),
        "```",
    ]
    return "\n".join(lines) + "\n"


def _summary(base: str, adapter: dict[str, Any] | None) -> str:
    text = f"`{base}`, trained on a weak teacher's captured logits and a trusted gold set under one objective."
    if adapter is None:
        return text
    layers = ", ".join(adapter["targets"] or ["all linear layers but the head"])
    text += f" A {'DoRA' if adapter['dora'] else 'LoRA'} adapter of rank {adapter['rank']} and alpha {adapter['alpha']}"
    text += f" on {layers} was trained, and is merged into these weights."
    full = " and ".join(name for name in ("embeddings", "head") if adapter[f"train_{name}"])
    return f"{text} Also fully trained: {full}." if full else text


def _training(options: dict[str, Any], result: dict[str, Any]) -> str:
    text = f"The weights of step {result['exported_step']}, {EXPORTED[options['export']['what']]}. "
    text += f"{result['steps']} steps of {options['global_batch']} sequences, "
    text += f"gold fraction {options['gold_fraction']}, peak learning rate {options['optimizer']['learning_rate']}, "
    text += f"window {options['window']}; "
    return text + ", ".join(f"{name} {version(name)}" for name in LIBRARIES)


def _scores(result: dict[str, Any]) -> Iterator[list[str]]:
    for split in ("dev", "test"):
        if scores := result.get(split):
            accuracy = _fraction(scores["accuracy"], scores["num_choice_records"])
            exact_match = _fraction(scores["exact_match"], scores["num_free_records"])
            nll = "" if scores["nll"] is None else f"{scores['nll']:.4f}"
            yield [split, str(scores["num_records"]), accuracy, exact_match, nll]


def _fraction(value: float | None, count: int) -> str:
    return "" if value is None else f"{value:.4f} ± {math.sqrt(value * (1 - value) / count):.4f}"


def _inputs(identity: dict[str, Any]) -> Iterator[list[str]]:
    yield ["student's weights, before", identity["student"][0]]
    yield ["tokenizer", identity["student"][1]]
    known = {"cache": "cache of the teacher's logits", "more_caches": "mixed with it", "gold_cache": "cache of gold"}
    for name, what in (known | {"gold": "gold", "dev": "dev", "test": "test"}).items():
        hashes = identity.get(name, [])
        yield from ([what, sha256] for sha256 in (hashes if isinstance(hashes, list) else [hashes]))


def _terms(loss: dict[str, Any]) -> Iterator[list[str]]:
    for name, term in loss.items():
        if isinstance(term, dict) and term.get("weight", 0) > 0:
            what = f"{name} ({term['divergence']}, T {term['temperature']})" if "divergence" in term else name
            yield [what, f"{term['weight']} ({term['ramp']['shape']})", ", ".join(term["on"])]


def _table(head: list[str], rows: Iterator[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


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


def finish(config: TrainConfig, paths: RunPaths) -> None:
    """Score the exported folder on dev and test, write the result, delete checkpoints and inputs."""
    exported = dataclasses.replace(config.student, path=str(paths.model), revision=None, num_layers=None, adapter=None)
    _, tokenizer = open_tokenizer(exported)
    model = prepack(open_model(exported, compute_device()))
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
    steps = MetricsFile.read(paths.metrics)
    result["steps"] = len(steps)
    durations = ("seconds", "data_wait_seconds", "dev_seconds")
    result["train_seconds"] = sum(row.get(name, 0.0) for row in steps for name in durations)
    result |= dev_summary(steps, what=config.export.what)
    checkpoints.clear(paths, config.checkpoint)
    shutil.rmtree(paths.inputs, ignore_errors=True)
    identity = json.loads(paths.identity.read_text())
    write_atomically(paths.model / "README.md", card(base=config.student.path, identity=identity, result=result))
    write_json(paths.result, result)
