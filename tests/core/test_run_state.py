"""state.json: how the last command on a run ended, and why; a damaged one holds no run up."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
from pathlib import Path

import pytest

from pipeline.core.files import RunPaths
from pipeline.core.processes import description, has_ended, this_process
from pipeline.core.progress import log, start_logging
from pipeline.core.run_state import (
    RunState,
    known_steps,
    read_state,
    record_finished,
    record_steps,
    recorded_state,
    write_state,
)
from pipeline.core.stopping import Stopped
from pipeline.core.types import RunFailed


def fail_with_errors_in_the_log(paths: RunPaths) -> None:
    with contextlib.suppress(RunFailed), recorded_state(paths):
        log_error(paths, "first")
        log_error(paths, "step 3: expected a finite loss\nsecond line")
        log.info("12/60 steps")
        raise RunFailed("failed (exit code 1)")


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    return RunPaths(folder=tmp_path)


def log_error(paths: RunPaths, text: str) -> None:
    """As a rank does it."""
    start_logging(paths.log, level=logging.INFO)
    try:
        raise FloatingPointError(text)
    except FloatingPointError:
        log.exception("rank 0 failed")


def test_a_process_is_seen_at_work_and_its_steps_stay(paths: RunPaths) -> None:
    with recorded_state(paths):
        state = read_state(paths)
        assert state is not None
        assert (state.state, state.num_steps) == ("running", None)
        assert description(state.process).startswith(f"process {os.getpid()} on ")
        assert not has_ended(state.process)
        record_steps(paths, 600)
    state = read_state(paths)
    assert state is not None
    assert (state.state, state.num_steps, state.reason) == ("finished", 600, None)
    with recorded_state(paths):
        assert known_steps(paths) == 600


def test_the_state_of_a_command_that_took_the_run_over_stays(paths: RunPaths) -> None:
    with contextlib.suppress(RunFailed), recorded_state(paths):
        own = read_state(paths)
        assert own is not None
        theirs = dataclasses.replace(own, process="node7 boot/pid 12 345")
        write_state(paths, theirs)
        raise RunFailed("this machine was frozen")
    assert read_state(paths) == theirs


def test_a_killed_command_whose_work_is_no_longer_asked_for_leaves_a_finished_run(paths: RunPaths) -> None:
    ended = " ".join([*this_process().split()[:3], "1"])  # this PID, given again
    at_work = RunState(state="running", since=1.0, process=this_process())
    for state, expected in (
        (dataclasses.replace(at_work, process=ended), "finished"),
        (dataclasses.replace(at_work, state="stopped"), "finished"),
        (dataclasses.replace(at_work, state="failed", reason="x"), "finished"),
        (at_work, "running"),
        (dataclasses.replace(at_work, process="node7 boot/pid 12 345"), "running"),  # unknown from here
    ):
        write_state(paths, state)
        record_finished(paths)
        found = read_state(paths)
        assert found is not None
        assert (found.state, found.reason) == (expected, None)


@pytest.mark.parametrize(("is_finished", "expected"), [(False, "stopped"), (True, "finished")])
def test_a_request_to_stop(paths: RunPaths, is_finished: bool, expected: str) -> None:
    with pytest.raises(Stopped), recorded_state(paths):
        raise Stopped("asked", is_finished=is_finished)
    state = read_state(paths)
    assert state is not None
    assert state.state == expected


def test_the_reason_of_a_failure_is_the_last_error_in_the_log_of_this_command(paths: RunPaths) -> None:
    log_error(paths, "of an earlier command")
    with pytest.raises(RunFailed), recorded_state(paths):
        raise RunFailed("failed (exit code 1)\nmore")
    state = read_state(paths)
    assert state is not None
    assert (state.state, state.reason) == ("failed", "failed (exit code 1)")
    fail_with_errors_in_the_log(paths)
    state = read_state(paths)
    assert state is not None
    assert state.reason == "FloatingPointError: step 3: expected a finite loss"
    record_finished(paths)
    state = read_state(paths)
    assert state is not None
    assert (state.state, state.reason) == ("finished", None)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"state": "running", "new": 1}'])
def test_a_damaged_file_is_named_and_replaced(paths: RunPaths, content: str) -> None:
    paths.state.write_text(content)
    with pytest.raises(ValueError, match=r"state.json: expected the state of a run"):
        read_state(paths)
    record_steps(paths, 3)
    record_finished(paths)
    assert paths.state.read_text() == content
    with recorded_state(paths):
        pass
    assert json.loads(paths.state.read_text())["state"] == "finished"


def test_a_name_of_a_process_that_is_not_complete_is_no_ended_process() -> None:
    words = this_process().split()
    assert len(words) == 4
    for count in range(4):
        assert not has_ended(" ".join(words[:count]))
    assert has_ended(" ".join([*words[:3], str(int(words[3]) - 1)]))  # its PID was given again
