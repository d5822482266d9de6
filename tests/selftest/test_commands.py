"""`scripts/selftest.py`: its table, what fails in it, where output goes, and all of it on this machine."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.config.commands import SelftestConfig
from pipeline.core.types import InputError
from pipeline.selftest import commands
from pipeline.selftest.commands import CHECKS, chosen
from pipeline.selftest.outcomes import judged, skipped
from pipeline.selftest.place import Place
from support.commands import ROOT


def test_a_check_that_raises_has_failed_and_the_others_go_on(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(place: Place) -> None:
        subprocess.run([sys.executable, "-c", "print('a rank ended')"], check=True)
        raise RuntimeError("no such kernel")

    checks = {"one": broken, "two": lambda _: judged(True, "3 (4)"), "three": lambda _: skipped("no GPU")}
    monkeypatch.setattr(commands, "CHECKS", checks)
    monkeypatch.setattr(commands, "build", lambda folder: place)
    out = tmp_path / "rows.json"
    assert commands.run(SelftestConfig(out=str(out))) == 1
    rows = {row["check"]: row for row in json.loads(out.read_text())}
    assert [rows[name]["outcome"] for name in ("prepare", *checks)] == ["PASS", "FAIL", "PASS", "SKIPPED"]
    assert rows["one"]["figures"] == "RuntimeError: no such kernel"
    printed, errors = capfd.readouterr()
    assert re.search(r"^three +\| SKIPPED \| no GPU +\| +0\.0$", printed, re.MULTILINE)
    assert "2 PASS, 1 FAIL, 1 SKIPPED" in printed
    assert "a rank ended" not in printed  # what checks print is shown only of those that fail
    assert "a rank ended" in errors
    monkeypatch.setattr(commands, "CHECKS", {"two": checks["two"], "three": checks["three"]})
    assert commands.run(SelftestConfig()) == 0


def test_without_a_place_there_is_nothing_to_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(folder: Path) -> Place:
        raise OSError("no space left")

    monkeypatch.setattr(commands, "build", full)
    assert commands.run(SelftestConfig()) == 1


IN_A_FILE = """
import subprocess, sys
from pathlib import Path
from pipeline.selftest.commands import row_of
from pipeline.selftest.outcomes import judged
def check():
    print("from this process")
    subprocess.run(["echo", "from another"])
    print("an error", file=sys.stderr)
    return judged(True, "")
print("before")
row_of("quiet", check, Path(sys.argv[1]))
print("after")
"""


def test_only_what_a_check_prints_goes_into_the_file(tmp_path: Path) -> None:
    command = [sys.executable, "-c", IN_A_FILE, str(tmp_path / "output.txt")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "before\nafter\n"
    found = (tmp_path / "output.txt").read_text().splitlines()
    assert {"from another", "from this process", "an error"} <= {*found}


def test_only_known_checks_can_be_chosen() -> None:
    assert chosen([]) == list(CHECKS)
    assert chosen(["zero_3", "copies"]) == ["copies", "zero_3"]
    with pytest.raises(InputError, match="checks: expected any of capture_cpu, .*, found zero_4"):
        chosen(["zero_4"])


def test_the_document_names_every_check() -> None:
    named = re.findall(r"^\| `(\w+)`", (ROOT / "docs" / "selftest.md").read_text(), re.MULTILINE)
    assert named == list(CHECKS)


def test_without_a_gpu_the_summary_of_pytest_names_what_was_not_checked() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/selftest"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert f"SKIPPED [{len(CHECKS)}] tests/selftest/test_on_gpus.py" in done.stdout
    assert "needs 1 GPU, found no GPU" in done.stdout


@pytest.mark.slow(minutes=4)
def test_this_machine_passes(tmp_path: Path) -> None:
    """Without a GPU every check that needs one is named, with the reason; the others pass."""
    command = [sys.executable, str(ROOT / "scripts" / "selftest.py"), f"out={tmp_path / 'rows.json'}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["check"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert list(rows) == ["prepare", *CHECKS]
    assert "FAIL" not in {row["outcome"] for row in rows.values()}
    if not torch.cuda.is_available():
        skipped_rows = [row for row in rows.values() if row["outcome"] == "SKIPPED"]
        assert len(skipped_rows) == 11
        assert all(row["figures"].startswith("no GPU") for row in skipped_rows)
