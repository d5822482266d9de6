"""scripts/audit.py: what verify prints, exit codes, a wrong command line, the help."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.audit import commands
from pipeline.config.commands import AuditConfig
from pipeline.core.types import InputError
from support.commands import ROOT, script


def test_verify_prints_totals_or_each_finding(cache_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = AuditConfig(cache=str(cache_copy))
    assert commands.run("verify", config) == 0
    assert ": complete and correct: 60 records (0 skipped), " in capsys.readouterr().out
    (cache_copy / "shards/foreign.parquet").touch()
    assert commands.run("verify", config) == 1
    assert capsys.readouterr().out.endswith(f"{cache_copy}: 1 finding\n")
    shard = cache_copy / "shards/00002.parquet"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert commands.run("verify", config) == 1
    printed = capsys.readouterr().out
    assert printed.count("expected") == 2
    assert printed.endswith(f"{cache_copy}: 2 findings\n")


def test_exit_codes_of_the_script(cache_copy: Path, teacher: Path, tmp_path: Path) -> None:
    shown = script("audit", "show", f"cache={cache_copy}", f"teacher.path={teacher}", "rows=1", cwd=tmp_path)
    assert shown.returncode == 0
    assert "(tail)" in shown.stdout
    (cache_copy / "shards/foreign.parquet").touch()
    damaged = script("audit", "verify", f"cache={cache_copy}", cwd=tmp_path, check=False)
    assert (damaged.returncode, damaged.stdout.count("expected")) == (1, 1)
    (cache_copy / "manifest.json").unlink()
    unreadable = script("audit", "verify", f"cache={cache_copy}", cwd=tmp_path, check=False)
    assert (unreadable.returncode, "manifest.json" in unreadable.stderr) == (2, True)


@pytest.mark.parametrize("arguments", [[], ["verfiy", "cache=."], ["cache=."], ["verify", "cash=."], ["verify"]])
def test_a_wrong_command_line_is_refused(tmp_path: Path, arguments: list[str]) -> None:
    done = script("audit", *arguments, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    if not arguments or arguments[0] != "verify":
        assert all(f"  {action} " in done.stderr for action in ("plan", "verify", "summary", "replay", "show"))


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), (["show", "record=0"], 141)])
def test_output_that_nobody_reads_is_no_error(
    arguments: list[str], code: int, cache: Path, teacher: Path, tmp_path: Path
) -> None:
    """As in `audit.py show ... | head`, when head has ended."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, str(ROOT / "scripts" / "audit.py"), *arguments]
    command += [] if "--help" in arguments else [f"cache={cache}", f"teacher.path={teacher}"]
    done = subprocess.run(command, cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert done.returncode == code
    assert "Broken pipe" not in done.stderr
    assert "Traceback" not in done.stderr


def test_help_explains_the_actions(tmp_path: Path) -> None:
    text = script("audit", "--help", cwd=tmp_path).stdout
    assert "Exit codes" in text
    assert "teacher.path" in text


def test_a_folder_that_cannot_be_written_is_refused_before_the_cache_is_read(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "summarize", lambda *_, **__: pytest.fail("the cache was read"))
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="out: expected a folder to write into, found Not a directory"):
        commands.run("summary", AuditConfig(cache=str(cache), out=str(tmp_path / "file" / "out")))
