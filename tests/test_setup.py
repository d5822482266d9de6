"""scripts/setup with a stand-in for the environment's Python: when it installs, and what it warns of."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support.commands import ROOT

PYTHON = """#!/usr/bin/env bash
case "$*" in
    -I*) cat "$0.installed" 2>/dev/null || echo none ;;
    *install*) echo "$*" >> "$0.log"; pwd -P > "$0.installed" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout whose .venv/bin/python installs nothing."""
    folder = tmp_path / "checkout"
    (folder / ".venv" / "bin").mkdir(parents=True)
    python = folder / ".venv" / "bin" / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    (folder / "scripts").mkdir()
    for name in ("scripts/setup", "setup.cfg", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def setup(checkout: Path) -> tuple[int, str]:
    """Run it; the number of installations so far, and what it warned of."""
    environment = os.environ | {"PYTHON": sys.executable}
    command = [str(checkout / "scripts" / "setup"), "demo"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return len((checkout / ".venv" / "bin" / "python.log").read_text().splitlines()), done.stderr


def test_it_installs_once(checkout: Path) -> None:
    assert setup(checkout) == (1, "")
    assert setup(checkout) == (1, "")
    with (checkout / "constraints.txt").open("a") as file:
        file.write("# changed\n")
    assert setup(checkout) == (2, "")


def test_an_environment_that_runs_another_checkout_is_taken_over_with_a_warning(checkout: Path) -> None:
    setup(checkout)
    other = checkout.with_name("other")
    shutil.copytree(checkout, other, ignore=shutil.ignore_patterns(".venv"))
    (other / ".venv").symlink_to(checkout / ".venv")
    count, warning = setup(other)
    assert count == 2
    assert warning == f"warning: .venv runs the code of {checkout}; from now on it runs that of {other}\n"
    assert setup(other) == (2, "")
    assert setup(checkout)[0] == 3
