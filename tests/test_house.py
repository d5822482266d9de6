"""The architecture is the file list: imports fall downward, one library behind one door."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PIPELINE = Path(__file__).resolve().parent.parent / "pipeline"

FLOORS = [
    {"core.types"},
    {"config.options"},
    {"config.schema", "core.files", "core.progress", "core.runtime", "bench.timing"},
    {
        "core.topk",
        "data.sampler",
        "training.schedules",
        "cache.schema",
        "evaluation.statistics",
        "core.object_store",
        "models.paths",
        "config.validate",
        "importers.distillkit",
        "audit.charts",
        "models.forward",
        "objective.class_prior",
        "monitoring.health",
        "monitoring.trackers",
        "training.export",
        "data.curriculum",
        "models.prepack",
    },
    {
        "config.validate_train",
        "objective.divergences",
        "objective.gates",
        "cache.manifest",
        "cache.leases",
        "cache.downloads",
        "data.records",
        "models.loading",
        "audit.row_groups",
    },
    {
        "models.lora",
        "models.generation",
        "objective.terms",
        "cache.shards",
        "data.tokenize",
        "monitoring.metrics",
        "capture.plan_lookup",
        "importers.sources",
        "audit.row_checks",
        "audit.sampling",
    },
    {
        "objective.diagnostics",
        "objective.position_groups",
        "data.mixture",
        "capture.teacher",
        "evaluation.requests",
        "capture.plan",
        "importers.decode",
        "audit.verify",
        "audit.summary",
    },
    {"objective.fused_head", "training.builders", "evaluation.scoring", "capture.completion", "audit.replay"},
    {"training.engine", "capture.worker", "importers.convert", "training.checkpoints", "training.dev_evaluation"},
    {"training.worker"},
    {"capture.driver", "training.driver", "evaluation.report", "config.cli", "audit.commands", "capture.estimate"},
    {"bench.capture", "bench.read", "bench.loss"},
    {"bench.rerun", "bench.fidelity", "bench.step"},
    {"bench.train"},
    {"bench.cli"},
]

EVERYWHERE = set.union(*FLOORS)
DOORS = {
    # without torch in these, a wrong option and a finished cache are known within a second
    "torch": EVERYWHERE
    - {
        "config.options",
        "config.schema",
        "config.validate",
        "config.validate_train",
        "config.cli",
        "core.files",
        "core.progress",
        "models.paths",
        "data.records",
        "capture.plan_lookup",
        "capture.driver",
    }
    - {"core.object_store", "cache.manifest", "cache.leases", "cache.downloads"},
    "omegaconf": {"config.options", "config.schema", "config.cli", "importers.sources"},
    "hydra": {"config.cli"},
    "tqdm": {"core.progress"},
    "numpy": {
        "cache.schema",
        "data.tokenize",
        "importers.distillkit",
        "importers.decode",
        "audit.row_groups",
        "audit.row_checks",
        "audit.sampling",
        "audit.verify",
        "audit.summary",
    },
    "pyarrow": {
        "cache.schema",
        "cache.manifest",
        "cache.shards",
        "core.object_store",
        "data.records",
        "capture.plan",
        "capture.estimate",
        "importers.sources",
        "importers.decode",
        "audit.row_groups",
        "audit.sampling",
        "audit.verify",
    },
    "polars": {"evaluation.scoring", "evaluation.report"},
    "transformers": {"models.loading"},
    "huggingface_hub": {"models.paths"},
    "deepspeed": {"training.engine"},
    "altair": {"audit.charts"},
    "peft": {"models.lora"},
    "wandb": {"monitoring.trackers"},
    "mlflow": {"monitoring.trackers"},
}

FILES = sorted(path for path in PIPELINE.rglob("*.py") if path.stem != "__init__")


def name_of(path: Path) -> str:
    return f"{path.parent.name}.{path.stem}"


def floor_of(name: str) -> int:
    return next(number for number, floor in enumerate(FLOORS) if name in floor)


def imports(path: Path) -> Iterator[tuple[str, str | None]]:
    """(outside library, None) or ("pipeline", file) for every import, wherever it stands in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are absolute"
            assert node.module is not None
            is_package = node.module.startswith("pipeline.") and node.module.count(".") == 1
            names = [f"{node.module}.{a.name}" for a in node.names] if is_package else [node.module]
        else:
            continue
        for name in names:
            parts = name.split(".")
            yield parts[0], ".".join(parts[1:3]) if parts[0] == "pipeline" else None


def test_every_file_has_a_floor() -> None:
    assert {name_of(path) for path in FILES} == EVERYWHERE


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_fall_downward(path: Path) -> None:
    for library, inner in imports(path):
        if library == "pipeline":
            assert inner is not None
            assert floor_of(inner) < floor_of(name_of(path)), f"{path.stem} imports {inner}, which is not below it"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_one_library_behind_one_door(path: Path) -> None:
    for library, inner in imports(path):
        if inner is None and library not in sys.stdlib_module_names:
            assert name_of(path) in DOORS.get(library, set()), f"{path.stem} imports {library} past its door"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_functions_and_files_stay_readable(path: Path) -> None:
    text = path.read_text()
    allowed_lines = {"config.schema": 500, "training.worker": 330}  # every option in one place; one story in one file
    assert len(text.splitlines()) <= allowed_lines.get(name_of(path), 300)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
            length = node.end_lineno - node.lineno + 1
            assert length <= (80 if node.name == "run" else 45), f"{path.stem}.{node.name}: {length} lines"


def test_words_not_used() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            name = getattr(node, "id", None) or getattr(node, "name", None) or getattr(node, "arg", None)
            if isinstance(name, str):
                assert not name.startswith("n_"), f"{path.stem}: say num_, not {name}"
                assert name not in ("labels", "probs", "utils", "helper", "manager", "misc"), f"{path.stem}: {name}"
