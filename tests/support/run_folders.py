"""Run folders as training leaves them, from the predictions of a simulated study: no model is trained.

A run has config.yaml, identity.json, metrics.jsonl, result.json and predictions-test.parquet. The texts that it was
"trained" and scored on are written too, with a cache of one shard, so that all that the report reads again is there.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from pipeline.analysis.values import Arm, ArmPredictions, HeldOut
from pipeline.config.options import identity_options, save_config
from pipeline.config.schema import Control, KdConfig, LmConfig, LossConfig, Role, StudentConfig, TextConfig, TrainConfig
from pipeline.core.files import RunPaths, content_hash, write_json
from pipeline.core.types import Manifest, ShardInfo
from pipeline.data.records import read_records
from pipeline.data.text_files import open_text
from pipeline.data.tokenize import text_hash
from pipeline.evaluation.predictions import PREDICTION_COLUMNS, scores_of
from pipeline.evaluation.requests import record_key
from support.tiny import write_lines

FILLER = "the weak model supervises the strong one and the strong one learns what both of them know "
READS_CACHE = ("weak_only", "combined", "control")
NUM_CORPUS = 3000


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyFolder:
    """Where a written study lies, and what its report is given."""

    folder: Path
    texts: dict[str, Path]

    @property
    def runs(self) -> list[str]:
        return [f"{self.folder}/runs/*"]

    def run_folders(self, name: str = "") -> list[Path]:
        """The folders of the runs of an experiment."""
        return sorted((self.folder / "runs").glob(f"{name}*"))


def write_study(
    folder: Path,
    predictions: list[ArmPredictions],
    held_out: HeldOut,
    *,
    metric: str = "accuracy",
    steps: int = 60,
    options: Mapping[str, Any] | None = None,
    more: Mapping[str, tuple[list[ArmPredictions], HeldOut]] | None = None,
) -> StudyFolder:
    """One run folder for each seed of each arm.

    `options`: of every run, by dotted name. `more`: further test texts by name, with the predictions of the same arms.
    """
    study = StudyFolder(folder=folder, texts={"test": _write_test(folder, "test", predictions[0], held_out, metric)})
    for name, (others, text) in (more or {}).items():
        study.texts[name] = _write_test(folder, name, others[0], text, metric)
    cache = _write_cache(folder / "caches" / "demo-0123456789ab")
    for index, of_arm in enumerate(predictions):
        further = {name: (others[index], text) for name, (others, text) in (more or {}).items()}
        _write_arm(study, of_arm, further, held_out, metric=metric, steps=steps, cache=cache, options=options or {})
    return study


def _write_test(folder: Path, name: str, first: ArmPredictions, held_out: HeldOut, metric: str) -> Path:
    lengths = held_out.length_M if held_out.length_M is not None else np.full(len(first.weight_M), 80)
    choices = choices_of(first)
    rows: list[dict[str, Any]] = []
    for m, length in enumerate(lengths):
        prompt = f"{name} record {m}: "
        row: dict[str, Any] = {"prompt": prompt + (FILLER * 10)[: max(int(length) - len(prompt), 0)]}
        if metric == "accuracy":
            assert held_out.answer_M is not None
            row |= {"choices": choices, "answer": int(held_out.answer_M[m])}
        else:
            row |= {"completion": f" answer {m}"}
        rows.append(row)
    return write_lines(folder / "data" / f"{name}.jsonl", rows)


def choices_of(predictions: ArmPredictions) -> list[str]:
    """The texts of the choices of every record."""
    values = predictions.probability_RMC
    return [] if values is None else [f" class {index}" for index in range(values.shape[-1])]


def _write_cache(folder: Path) -> Path:
    made_of = {"corpus": "hash of the corpus", "k": 16}
    manifest = Manifest(
        schema_version=1,
        fingerprint=content_hash(made_of),
        made_of=made_of,
        kind="topk",
        k=16,
        draws=0,
        draw_seed=0,
        temperatures=(1.0,),
        vocabulary_size=300,
        window=64,
        num_records=NUM_CORPUS,
        num_shards=1,
        records_per_shard=20_000,
        num_skipped=0,
    )
    info = ShardInfo(
        index=0,
        file="00000.parquet",
        rows=750,
        row_groups=(750,),
        targets=NUM_CORPUS,
        bytes=1_234_567,
        sha256="0" * 64,
        num_skipped=0,
        retained_mass_histogram=(0, 0, 0, 0, 0, 0, 10, 90, 400, 2500),
    )
    (folder / "shards").mkdir(parents=True)
    write_json(folder / "manifest.json", dataclasses.asdict(manifest) | {"skipped": None, "tokenizer": None})
    write_json(folder / "shards" / "00000.json", dataclasses.asdict(info))
    return folder


# ---------------------------------------------------------------------------------------------- arms


def _config(study: StudyFolder, arm: Arm, steps: int, cache: Path, options: Mapping[str, Any]) -> TrainConfig:
    reads_cache, reads_gold = arm.role in READS_CACHE, arm.gold_fraction > 0 and arm.role != "zero_shot"
    gold = None
    if reads_gold:
        num_gold = arm.num_gold or {"teacher": 900, "ceiling": NUM_CORPUS}.get(arm.role, 500)
        rows = [{"prompt": f"gold record {i}:", "completion": f" class {i % 5}"} for i in range(num_gold)]
        gold = TextConfig(files=[str(write_lines(study.folder / "data" / f"gold-{num_gold}.jsonl", rows))])
    config = TrainConfig(
        name=arm.name,
        role=Role[arm.role],
        study="mine",
        runs_dir=str(study.folder / "runs"),
        student=StudentConfig(path="models/weak" if arm.role == "teacher" else "models/strong"),
        cache=str(cache) if reads_cache else None,
        gold=gold,
        test=TextConfig(files=[str(study.texts["test"])]),
        gold_fraction=arm.gold_fraction if reads_gold else 0.0,
        steps=0 if arm.role == "zero_shot" else steps,
        loss=LossConfig(
            lm=LmConfig(weight=arm.lm_weight), kd=KdConfig(weight=arm.kd_weight, control=Control[arm.control])
        ),
    )
    tests = {name: TextConfig(files=[str(path)]) for name, path in study.texts.items() if name != "test"}
    config = dataclasses.replace(config, more_tests=tests)
    for name, value in (dict(options) | dict(arm.differing)).items():
        *parents, last = name.split(".")
        holder = functools.reduce(getattr, parents, config)
        if hasattr(holder, last) and name not in ("loss.kd.weight", "gold"):
            setattr(holder, last, value)
    return config


def _write_arm(
    study: StudyFolder,
    predictions: ArmPredictions,
    more: Mapping[str, tuple[ArmPredictions, HeldOut]],
    held_out: HeldOut,
    *,
    metric: str,
    steps: int,
    cache: Path,
    options: Mapping[str, Any],
) -> None:
    config = _config(study, predictions.arm, steps, cache, options)
    identity: dict[str, Any] = {"student": ["weights of " + config.student.path, "tokenizer"]}
    if config.cache is not None:
        identity["cache"] = json.loads((cache / "manifest.json").read_text())["fingerprint"]
    if config.gold is not None:
        identity["gold"] = text_hash(open_text(config.gold, "gold"))
    texts = {"test": (predictions, held_out)} | dict(more)
    saved = ""
    for index, seed in enumerate(predictions.arm.seeds):
        config = dataclasses.replace(config, seed=seed)
        of_run = identity | {"options": identity_options(config)}
        paths = RunPaths(folder=Path(config.runs_dir) / f"{config.name}-{content_hash(of_run)[:12]}")
        paths.folder.mkdir(parents=True)
        if not saved:  # as YAML only once: it is slow
            save_config(config, paths.config)
            saved = paths.config.read_text().replace(f"\nseed: {seed}\n", "\nseed: SEED\n")
        paths.config.write_text(saved.replace("\nseed: SEED\n", f"\nseed: {seed}\n"))
        write_json(paths.identity, of_run)
        scores = {
            name: _write_predictions(paths, name, study.texts[name], (of_text, index), text, metric)
            for name, (of_text, text) in texts.items()
        }
        result = {"name": config.name, "seed": seed, "dev": scores["test"], "test": scores["test"]}
        result["more"] = {
            name: scores[name] | {"out_of_domain": text.is_out_of_domain} for name, (_, text) in more.items()
        }
        metrics = _metrics(predictions.arm, seed, config.steps or 0, dev=scores["test"])
        paths.metrics.write_text("".join(json.dumps(row) + "\n" for row in metrics))
        result |= {"steps": len(metrics), "train_seconds": 0.5 * len(metrics), "exported_step": len(metrics)}
        write_json(paths.result, result)


@functools.cache
def _keys(text: Path) -> tuple[bytes, ...]:
    opened = open_text(TextConfig(files=[str(text)]), "test")
    return tuple(record_key(record) for record in read_records(opened, None))


def _write_predictions(
    paths: RunPaths, name: str, text: Path, run: tuple[ArmPredictions, int], held_out: HeldOut, metric: str
) -> dict[str, Any]:
    """predictions-NAME.parquet of one run; its scores as they stand in result.json."""
    keys, (predictions, index) = _keys(text), run
    num_records = len(keys)
    columns: dict[str, Any] = {
        "record_id": np.arange(num_records),
        "record_key": list(keys),
        "num_targets": predictions.weight_M.astype(int) if metric == "-nll" else np.ones(num_records, dtype=int),
        "choice_log_probs": [[]] * num_records,
    }
    if metric == "accuracy":
        assert predictions.probability_RMC is not None
        assert predictions.predicted_RM is not None
        assert predictions.num_tied_RM is not None
        assert held_out.answer_M is not None
        log_p_MC = np.log(predictions.probability_RMC[index])
        columns |= {
            "answer": held_out.answer_M,
            "choice_log_probs": (log_p_MC - 3.0).tolist(),
            "predicted": predictions.predicted_RM[index],
            "num_tied": predictions.num_tied_RM[index],
            "correct": predictions.credit_RM[index],
            "nll_sum": 3.0 - np.take_along_axis(log_p_MC, held_out.answer_M[:, None], axis=1)[:, 0],
        }
    elif metric == "exact_match":
        right_M = predictions.credit_RM[index] > 0.5
        columns |= {
            "exact": right_M,
            "generated": [f"answer {m}" if right else f"no answer {m % 7}" for m, right in enumerate(right_M)],
            "nll_sum": np.where(right_M, 0.5, 2.0),
        }
    else:
        columns["nll_sum"] = -predictions.credit_RM[index]
    missing = {column: [None] * num_records for column in PREDICTION_COLUMNS if column not in columns}
    table = pl.DataFrame(columns | missing).select(pl.col(c).cast(t) for c, t in PREDICTION_COLUMNS.items())
    table.write_parquet(paths.predictions(name))
    return dataclasses.asdict(scores_of(table)) | {"text": text_hash(open_text(TextConfig(files=[str(text)]), name))}


def _metrics(arm: Arm, seed: int, steps: int, *, dev: dict[str, Any]) -> list[dict[str, Any]]:
    """Losses that fall, the diagnostics of every tenth step, and looks at dev every twentieth."""
    rng, rows = np.random.default_rng(seed), []
    for step in range(1, steps + 1):
        left = math.exp(-4 * step / steps)
        row: dict[str, Any] = {"step": step, "loss": 0.2 + 2 * left, "learning_rate": 1e-4 * (1 - step / steps)}
        row |= {"sequences": f"{step:016x}", "seconds": 0.5, "grad_norm": 1.0 + rng.random(), "tokens": 1024}
        if arm.role != "weak_only":
            row |= {"lm": 0.1 + 2 * left + 0.05 * rng.random(), "lm_weight": arm.lm_weight, "lm_count": 16}
        if arm.role in READS_CACHE:
            row |= {"kd": 0.05 + left + 0.02 * rng.random(), "kd_weight": arm.kd_weight, "kd_count": 240}
        if step % 10 == 0 and arm.role in READS_CACHE:
            row |= {"grad_cosine": 0.4 - 0.3 * step / steps, "kd_at_T1": row["kd"], "agreement": 0.8 - 0.3 * left}
            row |= {"teacher_tail": 0.05, "student_tail": 0.04}
        if step % 20 == 0 and dev["accuracy"] is not None:
            row |= {"dev_accuracy": dev["accuracy"] - 0.3 * left, "dev_nll": 0.5 + left}
        rows.append(row)
    return rows
