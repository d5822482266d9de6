"""What the README says works as it stands there."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

from support.commands import ROOT, script
from support.tiny import write_lines

README = (ROOT / "README.md").read_text()


def blocks() -> list[str]:
    """Indented blocks of the README, dedented."""
    found = re.findall(r"(?:^    .*\n(?:^\n(?=    ))?)+", README, re.MULTILINE)
    return [re.sub(r"^    ", "", block, flags=re.MULTILINE) for block in found]


def test_the_first_command_comes_early_and_the_whole_is_short() -> None:
    lines = README.splitlines()
    assert len(lines) <= 150
    assert next(number for number, line in enumerate(lines, 1) if line.startswith("    ")) <= 25
    assert "TABLE" not in README


def test_your_own_data_and_models(student: Path, teacher: Path, tmp_path: Path) -> None:
    """The two commands for one's own data, with our tiny models in the place of STRONG and WEAK."""
    (block,) = (b for b in blocks() if "STRONG" in b)
    write_lines(
        tmp_path / "corpus" / "a.jsonl", [{"text": f"the weak model supervises the strong one {i}"} for i in range(40)]
    )
    for split in ("gold", "dev", "test"):
        rows = [{"prompt": f"{split} {i}:", "completion": f" the strong one {i}"} for i in range(8)]
        write_lines(tmp_path / f"{split}.jsonl", rows)
    commands = [line for line in block.replace("\\\n", " ").splitlines() if line.strip()]
    assert len(commands) == 2
    for command, extra in zip(commands, ([], ["steps=2", "epochs=null", "student.dtype=float32"]), strict=True):
        command = (
            command.replace("WEAK", str(teacher)).replace("STRONG", str(student)).replace("window=512", "window=64")
        )
        _, path, *arguments = shlex.split(command)
        script(Path(path).stem, *arguments, *extra, cwd=tmp_path)
    (result,) = tmp_path.glob("runs/mine-*/result.json")
    assert result.exists()


def test_a_tokens_top_entries_as_text(cache: Path, teacher: Path, tmp_path: Path) -> None:
    (block,) = (b for b in blocks() if "scan_parquet" in b)
    block = block.replace("caches/demo/demo-*", str(cache)).replace("data/demo/smollm2-135m", str(teacher))
    block = block.replace(", 64\n", ", 8\n")
    assert len(block.strip().splitlines()) == 5
    done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == 2
    assert ", 0.0), (" in done.stdout
