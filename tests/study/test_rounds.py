"""Rounds of pools: who learns from which cache, and when they end. Nothing is trained here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pipeline.config.commands import StudyConfig
from pipeline.core.types import InputError
from pipeline.study import rounds
from pipeline.study.forecast import Composer
from pipeline.study.plan import Job
from pipeline.study.students import Teacher

JOBS = [Job(experiment="pooled", seed=seed, overrides=()) for seed in (1, 2)]
TEACHER = Teacher(model="model", folder=Path("teacher"))


def sources_of(
    monkeypatch: pytest.MonkeyPatch, scores: Sequence[float], *, most: int = 5, fails_in: int | None = None
) -> tuple[list[tuple[int, str]], list[Path], list[str]]:
    """(round, cache that its members learn from) of each round; and what `run_rounds` returns.

    `scores`: on dev, of the students of each round; `fails_in`: in this round a member fails.
    """
    seen: list[tuple[int, str]] = []

    def make_pool(config: Any, composer: Any, teacher: Any, cache: str, *, source: str, number: int) -> str:
        assert cache == "capture"
        if number == fails_in:
            raise InputError("a member failed")
        seen.append((number, source))
        return f"pool {number}"

    def run_jobs(config: Any, composer: Any, jobs: Any, inputs: Sequence[str]) -> tuple[list[Path], list[str]]:
        assert set(inputs) == {f"pool {len(seen)}"}
        return [Path(f"{len(seen)} {job.seed}") for job in jobs], []

    def read_run(paths: Any) -> Any:
        number, seed = map(int, str(paths.folder).split())
        return SimpleNamespace(result={"dev": {"accuracy": scores[number - 1] + 0.1 * (seed - 1.5)}})

    for name, value in {"make_pool": make_pool, "run_jobs": run_jobs, "read_run": read_run}.items():
        monkeypatch.setattr(rounds, name, value)
    monkeypatch.setattr(rounds, "with_inputs", lambda composer, job, teacher, cache: cache)
    config = StudyConfig(study="demo", experiments=["pooled"], rounds=most)
    made, failed = rounds.run_rounds(config, cast(Composer, None), JOBS, TEACHER, "capture")
    return seen, made, failed


def test_each_round_learns_from_the_pool_of_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, made, failed = sources_of(monkeypatch, [0.6, 0.7, 0.8], most=3)
    assert seen == [(1, "capture"), (2, "pool 1"), (3, "pool 2")]
    assert (len(made), failed) == (6, [])


@pytest.mark.parametrize(("scores", "number"), [([0.6, 0.5, 0.9], 2), ([0.6, 0.6, 0.9], 2), ([0.5, 0.6, 0.55], 3)])
def test_rounds_end_where_dev_gains_no_more(
    scores: list[float], number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The mean over seeds decides; the round that did not gain is shown beside the others."""
    seen, made, _ = sources_of(monkeypatch, scores)
    assert (len(seen), len(made)) == (number, 2 * number)
    assert "the rounds end here" in capsys.readouterr().out


def test_one_round_reads_no_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """A study without dev has one."""
    assert sources_of(monkeypatch, [], most=1)[0] == [(1, "capture")]


def test_a_pool_that_cannot_be_made_fails_its_students_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, made, failed = sources_of(monkeypatch, [0.6, 0.7], fails_in=2)
    assert (len(seen), len(made)) == (1, 2)
    assert failed == [f"pooled seed {seed} (without its pool: a member failed)" for seed in (1, 2)]
