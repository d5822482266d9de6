"""scripts/status.py as a user runs it: tables, JSON, exit codes, repetition, what it imports, how long it takes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.config.commands import StatusConfig
from pipeline.core.files import RunPaths
from pipeline.core.types import InputError
from pipeline.status import commands
from support.commands import ROOT, composed, script, wait_for
from support.status_folders import ELSEWHERE, make_run, write_checkpoint, write_result, write_state, write_steps


def finish(paths: RunPaths) -> None:
    write_steps(paths, 60)
    write_result(paths)
    write_state(paths, "finished", num_steps=60)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Three runs: one finished, one at work, one failed."""
    finish(make_run(tmp_path / "runs" / "combined-1"))
    failed = make_run(tmp_path / "runs" / "combined-2", options={"loss.kd.weight": 0.3, "seed": 2})
    write_steps(failed, 7)
    write_state(failed, "failed", reason="FloatingPointError: step 8")
    at_work = make_run(tmp_path / "runs" / "gold_only-3")
    write_steps(at_work, 30)
    write_state(at_work, "running", process=ELSEWHERE)
    (tmp_path / "runs" / "report").mkdir()
    return tmp_path / "runs"


def test_table_json_and_exit_codes(runs: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = StatusConfig(runs=[f"{runs}/*"], caches=[str(cache)])
    assert commands.run(config) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["run", "options", "seed", "step", "tokens/s", "left", "seen", "score", "texts", "note"]
    groups = [line for line in lines if line and not line.startswith(" ")]
    assert groups[:-1] == ["failed (1)", "running (1)", "finished (1)", "finished (1)"]
    assert lines[-1] == "3 runs: 1 failed, 1 running, 1 finished; 1 capture: 1 finished"
    assert re.search(r"^  combined-2 +kd 0.3 +2 +7/60 .*FloatingPointError: step 8$", lines[2])
    assert re.search(r"gold_only-3 .* 30/60 +1,030 +60 s ", lines[4])
    assert re.search(r"combined-1 +kd 1 +1 +60 .* accuracy 75.0% +2$", lines[6])
    assert len({line.index("combined") for line in lines if "combined" in line}) == 1
    config.json = True
    assert commands.run(config) == 1
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(one["kind"], one["state"]) for one in found] == [
        *(("run", "finished"), ("run", "failed"), ("run", "running"), ("capture", "finished"))
    ]
    assert found[1]["folder"] == str(runs / "combined-2")
    assert found[3]["num_committed"] == found[3]["num_shards"]
    config.runs = [f"{runs}/gold_only-*"]
    assert commands.run(config) == 3
    config.runs = [f"{runs}/combined-1"]
    assert commands.run(config) == 0


def test_nothing_to_show_is_an_input_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="runs and caches: expected folders or globs, found none"):
        commands.run(StatusConfig())
    with pytest.raises(InputError, match="expected run folders or caches, found none in"):
        commands.run(StatusConfig(runs=[f"{tmp_path}/*"], caches=["s3://bucket/*"]))
    assert capsys.readouterr().err == "not shown: s3://bucket/*; only caches in local folders are\n"
    with pytest.raises(InputError, match="watch: expected more than 0, found 0"):
        commands.run(StatusConfig(runs=["x"], watch=0.0))


def test_the_folders_of_a_study() -> None:
    config = composed("status", "study=demo")
    assert (config.runs, config.caches, config.plans_dir) == (["runs/demo/*"], ["caches/demo/*"], None)


def test_the_script_needs_no_torch(runs: Path, cache: Path, tmp_path: Path) -> None:
    for name in ("torch", "transformers", "polars"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name} takes seconds to load')")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    arguments = (f"runs=[{runs}/*]", f"caches=[{cache.parent}/*]")
    done = script("status", *arguments, cwd=tmp_path, check=False, env=environment)
    assert done.returncode == 1, done.stderr
    assert "3 runs: 1 failed" in done.stdout
    assert not (tmp_path / "outputs").exists()


def test_it_is_repeated_until_all_are_finished(runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    def meanwhile(seconds: float) -> None:
        assert seconds == 5.0
        for folder in runs.glob("*-*"):
            finish(RunPaths(folder=folder))

    monkeypatch.setattr(time, "sleep", meanwhile)
    assert commands.run(StatusConfig(runs=[f"{runs}/*"], watch=5.0)) == 0
    printed = capsys.readouterr().out
    assert "3 runs: 1 failed, 1 running, 1 finished\n" in printed
    assert printed.endswith("3 runs: 3 finished\n")


def test_ctrl_c_ends_with_the_code_of_the_last_time(runs: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "status.py"), f"runs=[{runs}/gold_only-3]", "watch=0.2"]
    with (tmp_path / "output.txt").open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, cwd=tmp_path)
    wait_for(lambda: "1 running" in (tmp_path / "output.txt").read_text(), process)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 3, (tmp_path / "output.txt").read_text()
    assert "Traceback" not in (tmp_path / "output.txt").read_text()


def test_a_narrow_terminal_cuts_and_marks_rows(runs: Path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    commands.run(StatusConfig(runs=[f"{runs}/*"]))
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert all(len(row) == 40 and row.endswith("…") for row in rows)


@pytest.mark.slow
def test_a_thousand_runs_take_seconds(tmp_path: Path) -> None:
    for index in range(1000):
        paths = make_run(tmp_path / f"combined-{index:04d}", options={"seed": index % 5, "loss.kd.weight": index / 1e3})
        write_steps(paths, 60)
        if index % 3 == 0:
            finish(paths)
        elif index % 3 == 1:
            write_checkpoint(paths, 60)
            write_state(paths, "stopped")
        else:
            write_state(paths, "running", process=ELSEWHERE)
    started = time.process_time()
    found = commands.find(StatusConfig(runs=[f"{tmp_path}/*"]))
    seconds = time.process_time() - started  # of this process: 2 s on a busy machine
    assert len({status.label for status in found}) == 1000
    assert seconds < 6
