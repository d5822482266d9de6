"""The architecture is the file list: imports fall downward, one library behind one door."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PIPELINE = Path(__file__).resolve().parent.parent / "pipeline"

FLOORS = [
    {"types"},
    {"options"},
    {"config", "files", "progress", "runtime", "measure"},
    {
        "topk",
        "order",
        "ramps",
        "schema",
        "statistics",
        "store",
        "hub",
        "checks",
        "distillkit",
        "pictures",
        "logits",
        "classes",
        "health",
        "mirrors",
        "card",
        "curriculum",
        "layout",
    },
    {"checks_train", "divergences", "gates", "manifest", "claims", "downloads", "text", "models", "columns"},
    {"adapters", "generation", "losses", "shards", "corpus", "ledger", "recall", "sources", "content", "samples"},
    {"diagnostics", "groups", "dataset", "teacher", "exam", "plan", "foreign", "verify", "summary"},
    {"head", "recipe", "evaluate", "complete", "replay"},
    {"engine", "worker", "imports", "checkpoints", "looks"},
    {"train"},
    {"capture", "launch", "report", "command", "audit", "probe"},
    {"bench_capture", "bench_read", "bench_loss"},
    {"bench_rerun", "bench_fidelity", "bench_step"},
    {"bench_train"},
    {"bench"},
]

EVERYWHERE = set.union(*FLOORS)
DOORS = {
    # without torch in these, a wrong option and a finished cache are known within a second
    "torch": EVERYWHERE
    - {
        "options",
        "config",
        "checks",
        "checks_train",
        "command",
        "files",
        "progress",
        "hub",
        "text",
        "recall",
        "capture",
    }
    - {"store", "manifest", "claims", "downloads"},
    "omegaconf": {"options", "config", "command", "sources"},
    "hydra": {"command"},
    "tqdm": {"progress"},
    "numpy": {"schema", "corpus", "distillkit", "foreign", "columns", "content", "samples", "verify", "summary"},
    "pyarrow": {
        "schema",
        "manifest",
        "shards",
        "store",
        "text",
        "plan",
        "probe",
        "sources",
        "foreign",
        "columns",
        "samples",
        "verify",
    },
    "polars": {"evaluate", "report"},
    "transformers": {"models"},
    "huggingface_hub": {"hub"},
    "deepspeed": {"engine"},
    "altair": {"pictures"},
    "peft": {"adapters"},
    "wandb": {"mirrors"},
    "mlflow": {"mirrors"},
}

FILES = sorted(path for path in PIPELINE.glob("*.py") if path.stem != "__init__")


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
            names = [f"pipeline.{a.name}" for a in node.names] if node.module == "pipeline" else [node.module]
        else:
            continue
        for name in names:
            parts = name.split(".")
            yield parts[0], parts[1] if parts[0] == "pipeline" else None


def test_every_file_has_a_floor() -> None:
    assert {path.stem for path in FILES} == EVERYWHERE


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_imports_fall_downward(path: Path) -> None:
    for library, inner in imports(path):
        if library == "pipeline":
            assert inner is not None
            assert floor_of(inner) < floor_of(path.stem), f"{path.stem} imports {inner}, which is not below it"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_one_library_behind_one_door(path: Path) -> None:
    for library, inner in imports(path):
        if inner is None and library not in sys.stdlib_module_names:
            assert path.stem in DOORS.get(library, set()), f"{path.stem} imports {library} past its door"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_functions_and_files_stay_readable(path: Path) -> None:
    text = path.read_text()
    allowed_lines = {"config": 500, "train": 330}  # every option in one place; one story in one file
    assert len(text.splitlines()) <= allowed_lines.get(path.stem, 300)
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
