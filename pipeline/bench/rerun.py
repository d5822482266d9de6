"""The cost of a finished capture when a sweep runs the same command again."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from pipeline.bench.capture import CORPUS, MODEL, ROOT
from pipeline.bench.timing import Results, format_figure, run_in_turns, seconds, summarize, table


def run(quick: bool) -> Results:
    """Seconds of the complete command `scripts/capture.py` on the demo's corpus, after that corpus was captured."""
    with tempfile.TemporaryDirectory() as name:
        corpus = Path(name) / "corpus.jsonl"
        lines = CORPUS.read_text().splitlines(keepends=True)
        corpus.write_text("".join(lines[: 50 if quick else len(lines)]))
        arguments = ["name=bench", f"caches_dir={name}/caches", f"teacher.path={MODEL}", f"corpus.files=[{corpus}]"]
        arguments += ["teacher.num_layers=1"]  # a fast first run: its time is not the subject of this part
        command = [sys.executable, str(ROOT / "scripts/capture.py"), *arguments]

        def run_again() -> None:
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            assert "capturing" not in done.stderr

        first_seconds = seconds(lambda: subprocess.run(command, check=True, capture_output=True))
        times = run_in_turns({"again": lambda: seconds(run_again)}, runs=3 if quick else 5)
        again = summarize(times["again"])
    rows = [
        ["", "seconds"],
        ["first (a teacher of one layer)", f"{first_seconds:.1f}"],
        ["again", format_figure(again)],
    ]
    print(table("rerun: the same capture command again", rows))
    return {"rerun.seconds": again}
