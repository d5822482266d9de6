"""Where the figures come from: commands, versions, hashes, machines and time; the cache; the numbers on the diagram."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline.analysis.values import Training
from pipeline.cache.manifest import load_manifest, shard_info
from pipeline.core.object_store import one_location
from pipeline.core.progress import log
from pipeline.core.types import InputError
from pipeline.models.model_files import weight_files
from pipeline.report.arms import ArmRuns
from pipeline.report.runs import StudyRun, text_of

HASH_LETTERS = 12


def main_run(arms: Sequence[ArmRuns], role: str) -> StudyRun | None:
    """The first run of the main arm of a role."""
    return next((of_arm.runs[0] for of_arm in arms if of_arm.arm.role == role and of_arm.arm.is_main), None)


def provenance(arms: Sequence[ArmRuns]) -> dict[str, Any]:
    """Commands, versions, hardware and seconds of all runs, and the hashes of what the main arms were made of.

    Runs that recorded none (of an earlier version) give no commands; the versions are then those of this report.
    """
    runs = [run for of_arm in arms for run in of_arm.runs]
    recorded = [_environment(run) for run in runs]
    versions: dict[str, str] = {}
    for name in sorted({name for found in recorded for name in found.get("versions", {})}):
        versions[name] = ", ".join(sorted({found["versions"][name] for found in recorded if "versions" in found}))
    commands = list(dict.fromkeys(found["command"] for found in recorded if "command" in found))
    hardware = list(dict.fromkeys(found["hardware"] for found in recorded if "hardware" in found))
    return {
        "commands": commands,
        "versions": {"weak-to-strong": version("weak-to-strong")}
        | (versions or {"python (of this report)": platform.python_version()}),
        "hashes": _hashes(arms),
        "hardware": "; ".join(hardware),
        "seconds": sum(run.result["train_seconds"] for run in runs),
        "num_runs": len(runs),
    }


def _environment(run: StudyRun) -> dict[str, Any]:
    path = run.paths.environment
    return dict(json.loads(path.read_text())) if path.exists() else {}


def _hashes(arms: Sequence[ArmRuns]) -> dict[str, str]:
    """sha256 of models before training, texts and cache; the beginning of each."""
    found: dict[str, str] = {}
    student = main_run(arms, "combined") or arms[0].runs[0]
    teacher = main_run(arms, "teacher")
    if teacher is not None:
        found["teacher before training"] = _weights(teacher)
    found["student before training"] = _weights(student)
    for name in ("cache", "gold", "gold_cache"):
        if name in student.inputs:
            found[name] = student.inputs[name][:HASH_LETTERS]
    for name in ("test", *student.result.get("more", {})):
        found[name] = (text_of(student, name) or "")[:HASH_LETTERS]
    return {name: value for name, value in found.items() if value}


def _weights(run: StudyRun) -> str:
    return str(next(iter(run.identity.get("student", [])), ""))[:HASH_LETTERS]


# -------------------------------------------------------------------------------------------- cache


def cache_figures(arms: Sequence[ArmRuns], training: Sequence[Training]) -> dict[str, Any]:
    """Counts and retained mass of the cache that combined (else weak_only) has read; empty where it is gone.

    `retained_mass`: 1 minus the mean tail that training logged at the positions of kd; where it logged none, the mean
    of the histogram with each bin at its middle, which may be wrong by half a bin.
    """
    run = main_run(arms, "combined") or main_run(arms, "weak_only")
    if run is None or run.config.get("cache") is None or "cache" not in run.inputs:
        return {}
    try:
        cache = one_location(run.config["cache"], "cache")
        manifest = load_manifest(cache)
        infos = [shard_info(cache, index) for index in range(manifest.num_shards)]
    except (InputError, OSError) as error:
        log.warning("no figures of the teacher's cache: %s", error)
        return {}
    present = [info for info in infos if info is not None]
    if manifest.fingerprint != run.identity["cache"] or len(present) < len(infos):
        log.warning("no figures of the teacher's cache: %s is not the one that was read, or is not complete", cache)
        return {}
    histogram = [sum(counts) for counts in zip(*(info.retained_mass_histogram for info in present), strict=True)]
    return {
        "num_records": manifest.num_records,
        "num_sequences": sum(info.rows for info in present),
        "num_targets": sum(info.targets for info in present),
        "bytes": sum(info.bytes for info in present),
        "k": manifest.k,
        "retained_mass": _retained_mass(arms, training, run, histogram),
        "histogram": histogram,
    }


def _retained_mass(
    arms: Sequence[ArmRuns], training: Sequence[Training], run: StudyRun, histogram: Sequence[int]
) -> float | None:
    label = next(of_arm.arm.label for of_arm in arms if run in of_arm.runs)
    curves = [of_arm.curves.get("teacher_tail", ()) for of_arm in training if of_arm.label == label]
    tails = [tail for curve in curves for tail in curve if tail is not None]
    if tails:
        return 1.0 - sum(tails) / len(tails)
    total, bins = sum(histogram), len(histogram)
    return sum((i + 0.5) / bins * count for i, count in enumerate(histogram)) / total if total else None


# ------------------------------------------------------------------------------------------- counts


def diagram_counts(arms: Sequence[ArmRuns], cache: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers on the diagram of the objective, of the main arm of combined (else weak_only, gold_only, any)."""
    roles = ("combined", "weak_only", "gold_only")
    student = next((run for role in roles if (run := main_run(arms, role)) is not None), arms[0].runs[0])
    teacher, arm = main_run(arms, "teacher"), next(of_arm.arm for of_arm in arms if student in of_arm.runs)
    counts: dict[str, Any] = {
        "num_corpus": cache.get("num_records"),
        "num_gold": arm.num_gold,
        "gold_fraction": arm.gold_fraction,
        "lm_weight": arm.lm_weight,
        "kd_weight": arm.kd_weight,
        "more_weights": {
            term: weight for term in ("hard", "confidence") if (weight := student.options.get(f"loss.{term}.weight"))
        },
        "temperature": student.options.get("loss.kd.temperature"),
        "num_steps": student.result["steps"],
        "epochs": student.options.get("epochs"),
        "student": model_name(student),
        "student_parameters": num_parameters(student),
    }
    if teacher is not None:
        counts |= {"teacher": model_name(teacher), "teacher_parameters": num_parameters(teacher)}
    return {name: value for name, value in counts.items() if value not in (None, {})}


def model_name(run: StudyRun) -> str:
    """The model of a run before training: the last part of its path, and how many layers are kept."""
    student = run.config["student"]
    name = str(student["path"]).rstrip("/").rsplit("/", 1)[-1]
    layers = student.get("num_layers")
    return f"{name}, first {layers} layers" if layers else name


def num_parameters(run: StudyRun) -> int | None:
    """Parameters in the headers of a run's exported weights; of a run that exports none, of its model's folder."""
    student = run.config["student"]
    folder = run.paths.model if run.paths.model.is_dir() else Path(student["path"])
    if not folder.is_dir() or (folder != run.paths.model and student.get("num_layers")):
        return None
    try:
        return sum(_parameters_in(file) for file in weight_files(folder))
    except (InputError, OSError, ValueError):
        return None


def _parameters_in(file: Path) -> int:
    """Safetensors: length of the header in 8 bytes, then the header as JSON with the shape of each tensor."""
    with file.open("rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
