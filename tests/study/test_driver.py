"""A whole study of tiny models by its command: killed in each of its parts, stopped, and continued."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from support.commands import BIT_BY_BIT, ROOT, losses_of, script, wait_for, wait_for_steps
from support.tiny_study import write_tiny_study

CHOSEN = ["study=tiny", "experiments=gold_only,combined", "seeds=1", "probe_seconds=0"]


def start_study(folder: Path) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "scripts" / "study.py"), "--config-dir", str(folder), *CHOSEN]
    with (folder / "output.txt").open("a") as output:
        return subprocess.Popen(command, cwd=folder, stdout=output, stderr=output)


@pytest.mark.slow(minutes=4)
def test_a_study_killed_in_each_part_is_the_undisturbed_one(
    teacher: Path, student: Path, data: Path, tmp_path: Path
) -> None:
    """SIGKILL in the capture and in the first student, SIGTERM in the last; the same command each time."""
    folder, undisturbed = tmp_path / "disturbed", tmp_path / "undisturbed"
    for place in (folder, undisturbed):
        write_tiny_study(place, teacher=teacher, student=student, data=data, steps=60)

    process = start_study(folder)
    wait_for(lambda: list(folder.glob("caches/tiny-*/shards/*.parquet")), process)
    process.kill()
    process.wait()
    process = start_study(folder)
    wait_for_steps(folder / "runs", 5, process)
    process.kill()
    process.wait()
    process = start_study(folder)
    wait_for_steps(folder / "runs", 90, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 75, (folder / "output.txt").read_text()[-3000:]
    assert "the study ends here, as requested" in (folder / "output.txt").read_text()
    assert not (folder / "runs" / "report" / "report.html").exists()
    process = start_study(folder)
    assert process.wait(300) == 0, (folder / "output.txt").read_text()[-3000:]

    script("study", "--config-dir", str(undisturbed), *CHOSEN, cwd=undisturbed)
    found, expected = (
        {path.parent.name: path.parent for path in place.glob("runs/*/result.json")} for place in (folder, undisturbed)
    )
    assert found.keys() == expected.keys()
    assert len(found) == 3
    for name in found:
        if name.startswith("teacher"):
            continue
        assert losses_of(found[name]) == losses_of(expected[name])
        for part in BIT_BY_BIT:
            assert (found[name] / "model" / part).read_bytes() == (expected[name] / "model" / part).read_bytes()
    scores = [
        {name: json.loads((run / "result.json").read_text())["test"] for name, run in of.items()}
        for of in (found, expected)
    ]
    assert scores[0] == scores[1]
    shards = [
        {path.name: path.read_bytes() for path in place.glob("caches/*/shards/*.parquet")}
        for place in (folder, undisturbed)
    ]
    assert shards[0] == shards[1]
    for name in ("report.html", "report.md", "arms.parquet"):
        assert (folder / "runs" / "report" / name).exists()
