"""A request to stop while a run is scored: it ends with exit code 75, and the same command makes the scores."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import psutil
import pytest
import torch

from pipeline.core.runtime import Ranks, StopRequest
from pipeline.core.stopping import Stopped
from pipeline.evaluation import scoring
from pipeline.models.loading import load_model
from support.commands import labeled, only, script, start, train_arguments, wait_for
from support.scoring import exam_of
from support.tiny import prompts, write_lines


@pytest.mark.parametrize("kind", ["likelihoods", "answers"])
def test_scoring_looks_between_two_batches(
    kind: str, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once asked, no further batch goes through the model."""
    rows = [{"prompt": f"the weak {number}", "completion": " a" * 60} for number in range(8)]
    exam = exam_of(student, write_lines(tmp_path / "a.jsonl", rows), max_new_tokens=3)
    model = load_model(student, dtype="float32", device=torch.device("cpu"))
    ranks = Ranks(rank=0, world_size=1, device=torch.device("cpu"), stop=StopRequest(tmp_path / "stop"))
    name = "hidden_states" if kind == "likelihoods" else "generate"
    really, calls = getattr(scoring, name), []

    def counted(*arguments: object, **named: object) -> object:
        calls.append(1)
        (tmp_path / "stop").touch()
        return really(*arguments, **named)

    monkeypatch.setattr(scoring, name, counted)
    with pytest.raises(Stopped, match="scoring ends; the same command scores again"):
        scoring.score(model, exam, batch_tokens=1, teacher_predictions=None, log_every_seconds=60, ranks=ranks)
    assert len(calls) == 1


@pytest.mark.slow(minutes=2)
@pytest.mark.parametrize("steps", [0, 2])
def test_a_command_that_is_asked_while_it_scores(
    steps: int, student: Path, data: Path, cache: Path, tmp_path: Path
) -> None:
    """USR1 to the driver, as SLURM warns a job; then TERM to every process, as it ends one."""
    write_lines(tmp_path / "test.jsonl", prompts(1500, labeled=True, first=82))
    changes = {**labeled("test", tmp_path), "scoring.batch_tokens": 1, "launcher.log_every_seconds": 0.2, "dev": "null"}
    arguments = train_arguments(student, data, str(cache), steps=steps, **changes)
    for number in (signal.SIGUSR1, signal.SIGTERM):
        (tmp_path / "output.txt").unlink(missing_ok=True)
        process = start(arguments, tmp_path)
        wait_for(lambda: " score " in (tmp_path / "output.txt").read_text(), process, seconds=600)
        children = psutil.Process(process.pid).children(recursive=True)
        for one in [process, *children] if number == signal.SIGTERM else [process]:
            one.send_signal(number)
        said = (tmp_path / "output.txt").read_text
        assert process.wait(120) == 75, said()[-3000:]
        assert "stop requested: scoring ends" in said()
        assert "the same command scores it again" in said()
        assert "failed" not in said()
        assert not list(tmp_path.glob("runs/*/result.json"))
    script("train", *arguments, "scoring.batch_tokens=4096", cwd=tmp_path)
    result = json.loads((only(tmp_path / "runs") / "result.json").read_text())
    assert (result["test"]["num_records"], result["steps"]) == (1500, steps)
