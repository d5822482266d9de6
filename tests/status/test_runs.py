"""Each state of a run, from real files; damaged files are a note in the run's row."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.files import RunPaths
from pipeline.status.folders import is_locked
from pipeline.status.runs import find_run, is_run, labeled
from pipeline.status.values import RunStatus
from support.status_folders import (
    ELSEWHERE,
    ended_process,
    let_age,
    locked,
    make_run,
    write_checkpoint,
    write_result,
    write_state,
    write_steps,
)


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    return make_run(tmp_path / "combined-0123456789ab")


def found(paths: RunPaths, silent_seconds: float = 600) -> RunStatus:
    (status,) = labeled([find_run(paths.folder, silent_seconds=silent_seconds)])
    return status


# ------------------------------------------------------------------------------------------- states


def test_waiting(paths: RunPaths) -> None:
    status = found(paths)
    assert (status.state, status.step, status.num_steps, status.name, status.seed) == (
        "waiting",
        None,
        60,
        "combined",
        1,
    )
    write_state(paths, "stopped")
    assert found(paths).state == "waiting"


def test_running_and_its_speed(paths: RunPaths) -> None:
    write_steps(paths, 12)
    write_state(paths, "running", num_steps=50)
    write_steps(paths, 12)
    with locked(paths):
        status = found(paths)
    assert (status.state, status.step, status.num_steps, status.note) == ("running", 12, 50, "")
    assert (status.tokens_per_second, status.seconds_left) == (1012.0, 38 * 2.0)
    assert status.age_seconds is not None
    assert status.age_seconds < 60


@pytest.mark.parametrize(
    ("prepare", "note"),
    [
        (lambda paths: None, "loading"),
        (lambda paths: paths.stop.touch(), "asked to stop"),
        (lambda paths: paths.model.mkdir(), "scoring"),
        (lambda paths: write_result(paths), "scoring a further text"),
    ],
)
def test_what_a_running_one_does(paths: RunPaths, prepare: Callable[[RunPaths], Any], note: str) -> None:
    write_state(paths, "running")
    prepare(paths)
    with locked(paths):
        assert (found(paths).state, found(paths).note) == ("running", note)


def test_silent_is_one_whose_files_are_all_old(paths: RunPaths) -> None:
    write_steps(paths, 12)
    write_state(paths, "running")
    write_checkpoint(paths, 10)
    let_age(paths.folder, 700)
    with locked(paths):
        status = found(paths)
        assert (status.state, status.note) == ("silent", "no sign of life for 12 min")
        assert found(paths, silent_seconds=800).state == "running"
        saving = paths.checkpoints / "step-00000012" / "weights"  # a checkpoint that is being written
        saving.parent.mkdir()
        saving.touch()
        let_age(saving.parent, 5)
        assert found(paths).state == "running"


def test_a_renewed_lease_is_no_sign_of_life(paths: RunPaths) -> None:
    """A thread renews it, also where the ranks hang."""
    write_steps(paths, 12)
    write_state(paths, "running")
    let_age(paths.folder, 700)
    paths.lease.touch()
    let_age(paths.folder, 700)
    paths.lease.touch()
    with locked(paths):
        assert found(paths).state == "silent"


def test_slow_steps_are_no_silence(paths: RunPaths) -> None:
    paths.metrics.write_text('{"step": 1, "seconds": 150}\n{"step": 2, "seconds": 2}\n')
    write_state(paths, "running")
    let_age(paths.folder, 700)
    with locked(paths):
        assert found(paths).state == "running"
        let_age(paths.folder, 760)
        assert found(paths).state == "silent"


def test_stopped(paths: RunPaths) -> None:
    write_steps(paths, 12)
    write_checkpoint(paths, 12)
    write_state(paths, "stopped")
    let_age(paths.folder, 9000)
    status = found(paths)
    assert (status.state, status.checkpoint_step) == ("stopped", 12)
    assert status.note == "the same command goes on from step 12"


def test_failed_with_its_reason(paths: RunPaths) -> None:
    write_steps(paths, 12)
    write_state(paths, "failed", reason="FloatingPointError: step 13")
    assert (found(paths).state, found(paths).note) == ("failed", "FloatingPointError: step 13")


def test_killed_here(paths: RunPaths) -> None:
    """The lock is free, and the process that state.json names has ended."""
    write_state(paths, "running", process=ended_process())
    assert found(paths).state == "failed"
    assert found(paths).note == "killed, or the machine restarted; the same command goes on from the beginning"
    write_checkpoint(paths, 10)
    assert found(paths).note.endswith("goes on from step 10")
    write_result(paths)  # it was killed after its last work
    assert found(paths).state == "finished"


@pytest.mark.parametrize(("state", "expected"), [("stopped", "stopped"), ("running", "failed")])
def test_stopped_or_killed_while_a_further_text_was_scored(paths: RunPaths, state: str, expected: str) -> None:
    write_result(paths)
    let_age(paths.folder, 100)
    write_state(paths, state, process=ended_process())
    status = found(paths)
    assert status.state == expected
    assert status.note.endswith("the same command makes the scores that are missing")


def test_without_training_nothing_shows_when_loading_ends(paths: RunPaths) -> None:
    paths.identity.write_text(json.dumps({"options": {"steps": 0, "seed": 1}}))
    with locked(paths):
        write_state(paths, "running")
        assert (found(paths).state, found(paths).note) == ("running", "loading or scoring")


def test_on_another_machine_the_age_decides_where_no_lock_is_seen(paths: RunPaths) -> None:
    write_steps(paths, 12)
    write_state(paths, "running", process=ELSEWHERE)
    status = found(paths)
    assert status.state == "running"
    assert "process 12 on node7: the lock is not held as seen from here" in status.note
    let_age(paths.folder, 700)
    assert found(paths).state == "silent"
    with locked(paths):
        let_age(paths.folder, 10)
        assert "as seen from here" not in found(paths).note


def test_finished(paths: RunPaths) -> None:
    write_steps(paths, 60)
    write_state(paths, "finished", num_steps=60)
    write_result(paths, more={"news": {"accuracy": 0.5}})
    status = found(paths)
    assert (status.state, status.score, status.metric, status.scored_on) == ("finished", 0.75, "accuracy", "test")
    assert (status.num_texts, status.step, status.tokens_per_second) == (3, 60, None)


def test_a_result_whose_further_text_failed(paths: RunPaths) -> None:
    write_result(paths)
    write_state(paths, "failed", reason="InputError: no such file")
    assert (found(paths).state, found(paths).score) == ("failed", 0.75)


@pytest.mark.parametrize(
    ("prepare", "state"),
    [
        (lambda paths: write_result(paths), "finished"),
        (lambda paths: write_checkpoint(paths, 3), "stopped"),
        (lambda paths: write_steps(paths, 3), "failed"),
        (lambda paths: paths.log.write_text("x\nTraceback (most recent call last):\n  File\nKeyError: 1\n"), "failed"),
    ],
)
def test_folders_of_earlier_versions(paths: RunPaths, prepare: Callable[[RunPaths], Any], state: str) -> None:
    prepare(paths)
    assert found(paths).state == state
    with locked(paths):
        assert found(paths).state == "running"


# ------------------------------------------------------------------------------------------- damage


def test_a_torn_last_line_is_not_read(paths: RunPaths) -> None:
    write_steps(paths, 12)
    with paths.metrics.open("a") as file:
        file.write('{"step": 13, "sec')
    assert (found(paths).step, found(paths).note) == (12, "ended without a reason and without a checkpoint")
    with paths.metrics.open("a") as file:
        file.write("\n")
    assert found(paths).step == 12
    assert "metrics.jsonl: 1 damaged line" in found(paths).note


def test_only_the_end_of_long_metrics_is_read(paths: RunPaths) -> None:
    with paths.metrics.open("w") as file:
        file.write("no JSON\n" * 100_000)
    with paths.metrics.open("a") as file:
        file.write("".join(f'{{"step": {step}}}\n' for step in range(1, 31)))
    assert (found(paths).step, "damaged" in found(paths).note) == (30, False)


@pytest.mark.parametrize(
    ("name", "content", "state", "note"),
    [
        ("config.yaml", "", "waiting", "config.yaml: empty"),
        ("identity.json", "{", "waiting", "identity.json: not JSON"),
        ("identity.json", '{"gold": "a hash"}', "waiting", "identity.json: not that of this version"),
        ("state.json", "", "waiting", "state.json: expected the state of a run"),
        ("result.json", "{", "unreadable", "result.json: not JSON"),
        ("result.json", "[1]", "unreadable", "result.json: expected an object, found list"),
        ("result.json", '{"test": 3}', "unreadable", "AttributeError"),
        ("result.json", '{"accuracy": 0.5}', "finished", ""),
    ],
)
def test_damaged_files_are_named(paths: RunPaths, name: str, content: str, state: str, note: str) -> None:
    (paths.folder / name).write_text(content)
    assert found(paths).state == state
    assert note in found(paths).note


def test_a_folder_that_is_deleted_meanwhile(paths: RunPaths) -> None:
    paths.result.mkdir()  # cannot be read as a file
    assert found(paths).state == "unreadable"
    shutil.rmtree(paths.folder)
    assert (found(paths).state, found(paths).note) == ("unreadable", "deleted while it was read")


def test_what_is_a_run(paths: RunPaths, tmp_path: Path) -> None:
    (tmp_path / "report").mkdir()
    assert (is_run(paths.folder), is_run(tmp_path / "report"), is_run(paths.config)) == (True, False, False)


# ------------------------------------------------------------------------------------------- the rest


def test_nothing_is_written_and_no_lock_is_kept(paths: RunPaths) -> None:
    write_steps(paths, 3)
    write_state(paths, "running", process=ELSEWHERE)
    before = {path: path.stat().st_mtime_ns for path in [paths.folder, *paths.folder.rglob("*")]}
    found(paths)
    with locked(paths):
        assert is_locked(paths.lock) is True
        found(paths)
    assert is_locked(paths.lock) is False
    assert {path: path.stat().st_mtime_ns for path in [paths.folder, *paths.folder.rglob("*")]} == before


def test_labels_are_the_options_that_differ(tmp_path: Path) -> None:
    folders = [
        make_run(tmp_path / f"combined-{index}", options=options).folder
        for index, options in enumerate(
            [
                {"loss.kd.weight": 0.3, "seed": 1},
                {"loss.kd.weight": 1.0, "seed": 2},
                {"loss.kd.weight": 1.0, "optimizer.learning_rate": 0.01, "seed": 2},
            ]
        )
    ]
    folders.append(make_run(tmp_path / "gold_only-9", options={"loss.kd.weight": 7.0}).folder)
    statuses = labeled([find_run(folder, silent_seconds=600) for folder in folders])
    learning_rate = statuses[0].label.split("lr ")[1]
    assert [status.label for status in statuses] == [
        f"kd 0.3  lr {learning_rate}",
        f"kd 1  lr {learning_rate}",
        "kd 1  lr 0.01",
        "",
    ]
    assert [status.seed for status in statuses] == [1, 2, 2, 1]
