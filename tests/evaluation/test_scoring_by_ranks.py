"""Several ranks score one text together: whole batches are dealt to them, and all get the same result."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from torch import Tensor

from pipeline.evaluation import scoring
from pipeline.evaluation.predictions import Scores
from pipeline.evaluation.scoring import score
from pipeline.models.loading import load_model
from support.scoring import exam_of
from support.tiny import prompts, write_lines


class Meeting:
    """What the ranks of one process, each a thread, add up together."""

    def __init__(self, world_size: int) -> None:
        self.barrier = threading.Barrier(world_size)
        self.brought: dict[int, Tensor] = {}

    def total(self, rank: int, values: Tensor) -> Tensor:
        self.brought[rank] = values.clone()
        self.barrier.wait(60)
        total = sum(self.brought.values())
        self.barrier.wait(60)
        assert isinstance(total, Tensor)
        return total


@dataclass
class ThreadRanks:
    """As `core.runtime.Ranks`; counts its collectives, which would wait for ever where ranks make different ones."""

    rank: int
    world_size: int
    meeting: Meeting
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def all_reduce(self, values: Tensor) -> Tensor:
        return values.copy_(self.meeting.total(self.rank, values))

    def any(self, flag: bool) -> bool:
        return bool(self.all_reduce(torch.tensor(int(flag))).item())

    def leave_if_asked(self) -> None:
        """All ranks agree whether to stop: no one asks."""
        assert not self.any(False)


def scored_by(world_size: int, student: Path, exam: Any, calls: list[list[str]]) -> list[tuple[Scores, pl.DataFrame]]:
    """What each rank gets; `calls` receives the modules that each has run, in order."""
    meeting, results = Meeting(world_size), dict[int, tuple[Scores, pl.DataFrame]]()
    models = [load_model(student, dtype="float32", device=torch.device("cpu")) for _ in range(world_size)]

    def work(rank: int) -> None:
        model, mine = models[rank], calls[rank]
        for name, module in (("layer", model.model.layers[0]), ("head", model.lm_head)):
            module.register_forward_hook(lambda *_, name=name: mine.append(name))
        ranks: Any = ThreadRanks(rank, world_size, meeting)
        results[rank] = score(
            model, exam, batch_tokens=256, teacher_predictions=None, log_every_seconds=60, ranks=ranks
        )

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return [results[rank] for rank in range(world_size)]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Choices and free answers of different lengths."""
    rows = prompts(40, labeled=True)
    free = [{"prompt": row["prompt"] * (1 + i % 3), "completion": row["completion"]} for i, row in enumerate(rows[:11])]
    return write_lines(tmp_path / "a.jsonl", rows + free)


@pytest.mark.parametrize("heads", [512, 16])
def test_scores_do_not_depend_on_the_number_of_ranks(
    heads: int, text: Path, student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit; and the ranks run the same modules in the same order, as ZeRO 3 needs it."""
    monkeypatch.setattr(scoring, "HEAD_POSITIONS", heads)
    exam = exam_of(student, text, max_new_tokens=6)
    alone_calls: list[list[str]] = [[]]
    ((scores, table),) = scored_by(1, student, exam, alone_calls)
    assert scores.num_choice_records == 40
    assert scores.num_free_records == 11
    for world_size in (2, 3):
        calls: list[list[str]] = [[] for _ in range(world_size)]
        for other_scores, other_table in scored_by(world_size, student, exam, calls):
            assert other_scores == scores
            assert other_table.equals(table)
        assert all(one == calls[0] for one in calls)
        assert len(calls[0]) < 0.75 * len(alone_calls[0])  # each has made a part of the work


def test_a_single_batch_is_scored_by_one_rank(student: Path, tmp_path: Path) -> None:
    """The others repeat it, and what they find is not counted."""
    exam = exam_of(student, write_lines(tmp_path / "a.jsonl", prompts(2, labeled=True)))
    ((scores, _),) = scored_by(1, student, exam, [[]])
    assert [found for found, _ in scored_by(3, student, exam, [[], [], []])] == [scores] * 3
