"""The law of the house, read from the map in DESIGN.md: what imports what, which library stands behind which door."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.commands import ROOT

PIPELINE = ROOT / "pipeline"
FILES = sorted(path for path in PIPELINE.glob("*/*.py") if path.stem != "__init__" and not path.parent.is_symlink())
Function = ast.FunctionDef | ast.AsyncFunctionDef

LONGER_FILES = {"config/schema.py": 660}  # every option in one place
MAX_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS = 300, 45, 7


@dataclass(frozen=True)
class Room:
    """A row of the map."""

    floor: int
    files: tuple[str, ...]
    """In the order in which they may import each other: each only those before it."""
    doors: dict[str, set[str]]
    """Outside library -> the files that may import it; empty: all of the package."""


def read_map() -> dict[str, Room]:
    """| floor | `package` | its one job | `file` `file` ... | library, library (`file` `file`), ... |"""
    text = (ROOT / "DESIGN.md").read_text()
    table = text.split("<!-- map -->")[1].split("<!-- end of map -->")[0]
    rooms = {}
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.strip()[1:-1].split("|")]
        if len(cells) == 5 and cells[0].isdigit():
            doors = {
                m[1]: set(re.findall(r"`(\w+)`", m[2] or "")) for m in re.finditer(r"(\w+)( \([^)]*\))?", cells[4])
            }
            rooms[cells[1].strip("`")] = Room(int(cells[0]), tuple(re.findall(r"`(\w+)`", cells[3])), doors)
    return rooms


MAP = read_map()


def name_of(path: Path) -> str:
    return str(path.relative_to(PIPELINE))


def imports(path: Path) -> Iterator[tuple[str, str, str]]:
    """(library, package, file) of every import, wherever it stands in the file; the last two only of our own."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}: imports are absolute"
            assert node.module is not None
            is_package = node.module.startswith("pipeline.") and node.module.count(".") == 1
            names = [f"{node.module}.{alias.name}" for alias in node.names] if is_package else [node.module]
        else:
            continue
        for name in names:
            library, package, file = (*name.split("."), "", "")[:3]
            yield library, package, file


def functions(path: Path) -> Iterator[Function]:
    return (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, Function))


def test_the_map_names_every_file() -> None:
    """Beside the packages stands only the command that runs the scripts."""
    found = {f"{package}/{file}.py" for package, room in MAP.items() for file in room.files}
    assert found == {name_of(path) for path in FILES}
    assert {path.name for path in PIPELINE.glob("*.py")} == {"__init__.py", "__main__.py"}
    assert {package for _, package, _ in imports(PIPELINE / "__main__.py")} == {"", "config"}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_fall_downward(path: Path) -> None:
    room, below = MAP[path.parent.name], MAP[path.parent.name].files
    for library, package, file in imports(path):
        if library != "pipeline":
            continue
        if package == path.parent.name:
            assert below.index(file) < below.index(path.stem), f"{name_of(path)} imports {file}, which is not before it"
        else:
            assert MAP[package].floor < room.floor, f"{name_of(path)} imports {package}, which is not below it"


@pytest.mark.parametrize("package", MAP)
def test_each_library_stands_behind_its_doors(package: str) -> None:
    """And no door is named that nobody uses."""
    room, used = MAP[package], dict[str, set[str]]()
    for file in room.files:
        for library, _, _ in imports(PIPELINE / package / f"{file}.py"):
            if library not in sys.stdlib_module_names and library != "pipeline":
                used.setdefault(library, set()).add(file)
    assert used.keys() == room.doors.keys()
    for library, files in room.doors.items():
        assert not files or used[library] == files, f"{library} in {package}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_functions_and_files_stay_readable(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= LONGER_FILES.get(name_of(path), MAX_LINES)
    for node in functions(path):
        length = (node.end_lineno or node.lineno) - node.lineno + 1
        assert length <= (80 if node.name == "run" else MAX_FUNCTION_LINES), f"{node.name}: {length} lines"
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        named = [argument.arg for argument in arguments if argument.arg not in ("self", "cls")]
        assert len(named) <= MAX_PARAMETERS, f"{node.name}: {len(named)} parameters"


# ---------------------------------------------------------------------------------------------- words

RIDDLES = (  # ways to say it that were found here once, and that nobody searches for
    "the end before the end",
    "refuse what cannot be meant",
    "sum with nobody",
    "not for nothing",
    "are no numbers",
    "what it thought at each token",
    "nobody at work there",
    "somebody is at work there",
    "wants to be heard",
    "a machine's moods",
    "mend the record",
    "to count such and go on",
    "nobody has spoken about",
)
SAYING = re.compile(r"\b(say|says|said|speak|speaks|spoken|heard|told)\b", re.IGNORECASE)


def test_words_not_used() -> None:
    for path in FILES:
        text = " ".join(re.sub(r"[\"'#]", " ", path.read_text()).lower().split())
        assert not [riddle for riddle in RIDDLES if riddle in text], name_of(path)
        for node in ast.walk(ast.parse(path.read_text())):
            name = getattr(node, "id", None) or getattr(node, "name", None) or getattr(node, "arg", None)
            if isinstance(name, str):
                assert not name.startswith("n_"), f"{name_of(path)}: write num_, not {name}"
                assert name not in ("labels", "probs", "utils", "helper", "manager", "misc"), f"{name_of(path)}: {name}"


def test_models_generate_and_distributions_are_recorded() -> None:
    """Nothing here talks: at most 20 lines use a word of speech, each about a person or a document."""
    found = [
        f"{name_of(path)}: {line.strip()}"
        for path in FILES
        for line in path.read_text().splitlines()
        if SAYING.search(line)
    ]
    assert len(found) <= 20, "\n".join(found)


def test_no_test_module_is_imported_by_another() -> None:
    for path in (ROOT / "tests").rglob("*.py"):
        names = [library for library, _, _ in imports(path)] if path.is_file() else []
        assert not [name for name in names if name.startswith("test_") or name == "conftest"], path
