"""An evaluation may take longer than the watchdog's time; one of its batches may not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.commands import ROOT
from support.tiny import prompts, write_lines

LIMIT_SECONDS = 6
CODE = """
import sys, time
from pathlib import Path
import torch
from pipeline.core.watchdog import watched
from pipeline.evaluation.scoring import score
from pipeline.models.loading import load_model
from support.scoring import exam_of

student, text, hanging, limit = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
model, seconds = load_model(student, dtype="float32", device=torch.device("cpu")), []

def forward(*_):
    seconds.append(60 if len(seconds) + 1 == hanging else 1)
    time.sleep(seconds[-1])

model.model.layers[0].register_forward_pre_hook(forward)
exam = exam_of(student, text)
began = time.monotonic()
with watched(limit):
    score(model, exam, batch_tokens=128, teacher_predictions=None, log_every_seconds=60)
assert time.monotonic() - began > limit
print("scored")
"""


@pytest.mark.parametrize("hanging", [0, 3])
def test_the_watchdog_counts_from_batch_to_batch(hanging: int, student: Path, tmp_path: Path) -> None:
    text = write_lines(tmp_path / "a.jsonl", prompts(60, labeled=True))
    command = [sys.executable, "-c", CODE, str(student), str(text), str(hanging), str(LIMIT_SECONDS)]
    variables = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=180, check=False)
    if hanging:
        assert done.returncode == 1
        assert f"Timeout (0:00:0{LIMIT_SECONDS})!" in done.stderr
        assert "in _batch_log_probs" in done.stderr  # where it waits
    else:
        assert (done.returncode, done.stdout) == (0, "scored\n"), done.stderr
