"""Scores belong to a model and a text: made where they are missing, without training again."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from pipeline.config.options import load_config
from pipeline.config.schema import TrainConfig
from pipeline.core.files import RunPaths
from pipeline.core.types import InputError, RunFailed
from pipeline.training import driver, finish, identity, scorer
from support.commands import merged, only, train_arguments
from support.scoring import scored
from support.tiny import prompts, write_lines

Train = Callable[..., float | None]


@pytest.fixture
def train(student: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """The command, in this process: what a run exports is the student itself. `ranks` are what it has started."""
    ranks = []

    def run_ranks(config: TrainConfig, paths: RunPaths, num_ranks: int, lock: int) -> int:
        if paths.result.exists():
            ranks.append("scores")
            try:
                scorer.run(paths.folder)
            except KeyError:
                return 1
            return 0
        ranks.append("trains")
        shutil.copytree(student, paths.model)
        rows = [{"step": step, "seconds": 1.0, "data_wait_seconds": 0.5} for step in (1, 2, 3)]
        write_lines(paths.metrics, rows)
        scorer.run(paths.folder)
        return 0

    def command(*more: str, **changes: Any) -> float | None:
        chosen = {"experiment": "gold_only", "gold_fraction": 1, "steps": 3, "runs_dir": tmp_path / "runs", **changes}
        return driver.run(merged([*train_arguments(student, data, "null", **chosen), *more]))

    command.ranks = ranks  # type: ignore[attr-defined]
    monkeypatch.setattr(driver, "run_ranks", run_ranks)
    monkeypatch.setattr(identity, "check_model", lambda config, tokenizer: None)  # takes a second
    return command


def result_in(tmp_path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((only(tmp_path / "runs") / "result.json").read_text())
    return found


def news_of(tmp_path: Path, count: int = 7) -> str:
    """An option with a further test text."""
    file = write_lines(tmp_path / f"news-{count}.jsonl", prompts(count, labeled=True, first=200))
    return f"+more_tests={{news: {{files: [{file}], targets: completion}}}}"


def modified(run: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}


def test_a_finished_run_is_scored_on_a_further_text(train: Any, student: Path, data: Path, tmp_path: Path) -> None:
    """The scores are those of the exported model; what was there stays; a third time there is nothing to do."""
    objective = train()
    first, run = result_in(tmp_path), only(tmp_path / "runs")
    assert (first["steps"], first["train_seconds"]) == (3, 4.5)
    before = modified(run)
    assert train(news_of(tmp_path), "out_of_domain=[news]") == objective
    assert train.ranks == ["trains", "scores"]
    result = result_in(tmp_path)
    assert {key: value for key, value in result.items() if key != "more"} == first
    expected, table = scored(student, tmp_path / "news-7.jsonl", batch_tokens=4096)
    assert result["more"]["news"].items() >= dataclasses.asdict(expected).items()
    assert result["more"]["news"]["out_of_domain"] is True
    found = pl.read_parquet(run / "predictions-news.parquet")
    assert found["record_key"].to_list() == table["record_key"].to_list()
    after = modified(run)
    assert {name for name in after if after[name] != before.get(name)} == {
        *("result.json", "config.yaml", "identity.json", "README.md", "log.txt", "lock", "state.json"),
        "predictions-news.parquet",
    }
    assert "| news (out of domain) | 7 |" in (run / "model" / "README.md").read_text()
    assert "news" in load_config(run / "config.yaml", TrainConfig).more_tests
    train(news_of(tmp_path), "out_of_domain=[news]")
    train()  # without it: its scores stay
    assert train.ranks == ["trains", "scores"]
    assert result_in(tmp_path) == result
    assert modified(run) == after


def test_another_text_under_the_same_name(train: Any, student: Path, data: Path, tmp_path: Path) -> None:
    """By content: a copy elsewhere is the same, one record more is not, nor is another way to read it."""
    train(news_of(tmp_path))
    texts = [result_in(tmp_path)["more"]["news"]["text"]]
    file = shutil.copy(tmp_path / "news-7.jsonl", tmp_path / "copy.jsonl")
    train(f"+more_tests={{news: {{files: [{file}], targets: completion}}}}")
    assert train.ranks == ["trains"]
    train(news_of(tmp_path, 8))
    texts.append(result_in(tmp_path)["more"]["news"]["text"])
    assert result_in(tmp_path)["more"]["news"]["num_records"] == 8
    train(f"+more_tests={{news: {{files: [{file}], targets: completion, end_token: false}}}}")
    texts.append(result_in(tmp_path)["more"]["news"]["text"])
    assert len(set(texts)) == 3
    assert train.ranks == ["trains", "scores", "scores"]
    # test and dev alike: dev decides nothing here
    objective = train(test__files=f"[{data}/dev.jsonl]", dev__files=f"[{data}/test.jsonl]")
    expected, _ = scored(student, data / "test.jsonl", end_token=False)
    assert objective == expected.accuracy
    result = result_in(tmp_path)
    assert (result["test"]["num_records"], result["dev"]["num_records"]) == (10, 20)
    assert len(pl.read_parquet(only(tmp_path / "runs") / "predictions-dev.parquet")) == 20
    assert train.ranks == ["trains", "scores", "scores", "scores"]


def test_exact_match_is_measured_when_asked_for(train: Any, data: Path, tmp_path: Path) -> None:
    lines = [{"prompt": row["prompt"], "completion": row["completion"]} for row in prompts(4, labeled=True, first=300)]
    free = {"test__files": f"[{write_lines(tmp_path / 'free.jsonl', lines)}]", "test__end_token": True}
    train(**free)
    assert result_in(tmp_path)["test"]["exact_match"] is None
    train(**free, scoring__max_new_tokens=3)
    assert result_in(tmp_path)["test"]["num_free_records"] == 4
    assert train.ranks == ["trains", "scores"]


def test_a_model_that_was_deleted_is_not_trained_again(
    train: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    objective = train()
    run, before = only(tmp_path / "runs"), result_in(tmp_path)
    shutil.rmtree(run / "model")
    assert train() == objective
    warning = "expected the exported model, to score it on news, found none; restore it, or delete"
    assert warning not in capsys.readouterr().err
    assert train(news_of(tmp_path)) == objective
    assert warning in capsys.readouterr().err
    assert train.ranks == ["trains"]
    assert result_in(tmp_path) == before


def test_another_teacher_changes_the_agreement_alone(
    train: Any, teacher: Path, student: Path, data: Path, tmp_path: Path
) -> None:
    """Without the model: it was deleted. The teacher's predictions on a further text lie beside those on test."""
    train(news_of(tmp_path))
    run, before = only(tmp_path / "runs"), result_in(tmp_path)
    shutil.rmtree(run / "model")
    for name, text in (("test", data / "test.jsonl"), ("news", tmp_path / "news-7.jsonl")):
        (tmp_path / "theirs").mkdir(exist_ok=True)
        scored(teacher, text)[1].write_parquet(tmp_path / "theirs" / f"predictions-{name}.parquet")
    choice = {"scoring__teacher_predictions": tmp_path / "theirs" / "predictions-test.parquet"}
    train(news_of(tmp_path), **choice)
    result = result_in(tmp_path)
    for name, old, new in (("test", before, result), ("news", before["more"], result["more"])):
        assert old[name]["agreement"] is None
        table = pl.read_parquet(run / f"predictions-{name}.parquet")
        theirs = pl.read_parquet(tmp_path / "theirs" / f"predictions-{name}.parquet")
        same = (table["predicted"] == theirs["predicted"]).mean()
        assert new[name]["agreement"] == same == table["agreement"].mean()
        unchanged = {key for key in old[name] if key not in ("agreement", "teacher_predictions")}
        assert {key: new[name][key] for key in unchanged} == {key: old[name][key] for key in unchanged}
    assert 0 < result["test"]["agreement"] < 1
    train(news_of(tmp_path))  # without a teacher: its agreement stays
    assert train.ranks == ["trains", "scores"]
    train(news_of(tmp_path), "out_of_domain=[news]")
    assert result_in(tmp_path)["more"]["news"] == result["more"]["news"] | {"out_of_domain": True}
    # it has no prediction of another text: refused, before anything is scored
    with pytest.raises(InputError, match=r"predictions-news.parquet: expected the teacher's prediction for each of 8"):
        train(news_of(tmp_path, 8), **choice)


def test_killed_while_it_is_scored_again_a_result_does_not_mix_two_texts(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(news_of(tmp_path))
    before = result_in(tmp_path)["more"]["news"]
    monkeypatch.setattr(finish, "write_table", lambda table, file: {}["killed"])
    with pytest.raises(RunFailed):
        train(news_of(tmp_path, 8))
    assert "news" not in result_in(tmp_path)["more"]
    monkeypatch.undo()
    assert before["num_records"] == 7
