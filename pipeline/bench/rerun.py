"""What a capture that is finished costs when a sweep asks for it again."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from pipeline.bench.capture import CORPUS, MODEL, ROOT
from pipeline.bench.timing import Findings, figure, in_turn, seconds, shown, table


def run(quick: bool) -> Findings:
    """Seconds of `scripts/capture.py`, the whole command, on the demo's corpus after it was captured."""
    with tempfile.TemporaryDirectory() as name:
        corpus = Path(name) / "corpus.jsonl"
        lines = CORPUS.read_text().splitlines(keepends=True)
        corpus.write_text("".join(lines[: 50 if quick else len(lines)]))
        arguments = ["name=bench", f"caches_dir={name}/caches", f"teacher.path={MODEL}", f"corpus.files=[{corpus}]"]
        arguments += ["teacher.num_layers=1"]  # how long the first run takes is not the question
        command = [sys.executable, str(ROOT / "scripts/capture.py"), *arguments]

        def again() -> None:
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            assert "capturing" not in done.stderr

        first = seconds(lambda: subprocess.run(command, check=True, capture_output=True))
        found = figure(in_turn({"again": lambda: seconds(again)}, runs=3 if quick else 5)["again"])
    rows = [["", "seconds"], ["first (a teacher of one layer)", f"{first:.1f}"], ["again", shown(found)]]
    print(table("rerun: the same capture command again", rows))
    return {"rerun.seconds": found}
