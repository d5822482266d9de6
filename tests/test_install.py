"""`pip install .` into another folder gives a working command, with its configuration."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.commands import ROOT
from support.tiny import prompts, write_lines


@pytest.mark.slow
def test_an_installed_package_runs_from_any_folder(student: Path, tmp_path: Path) -> None:
    clone, site = tmp_path / "clone", tmp_path / "site"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(clone)]
    subprocess.run(install, check=True, capture_output=True, timeout=300)
    held_out = write_lines(tmp_path / "elsewhere" / "test.jsonl", prompts(4, labeled=True))
    command = [str(site / "bin" / "weak-to-strong"), "evaluate", f"model.path={student}", "model.dtype=float32"]
    command += ["text=own", f"text.files=[{held_out}]", "text.targets=completion", "out=scores"]
    environment = os.environ | {"PYTHONPATH": str(site)}
    done = subprocess.run(
        command, cwd=held_out.parent, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "accuracy" in done.stdout
    assert (held_out.parent / "scores" / "scores.json").exists()
