"""What the files of a run folder hold that decides about its state, and what is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.files import RunPaths
from pipeline.core.run_state import RunState, read_state
from pipeline.status.folders import age_of, is_locked, last_rows, newest_write

STEPS_OF_SILENCE = 5  # so many of the longest of the last steps without a sign of life are silence, however slow it is


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Evidence:
    """What the files of a run hold that decide about its state."""

    paths: RunPaths
    state: RunState | None
    locked: bool | None
    """None where nobody asked, or where there was no answer."""
    rows: Sequence[Mapping[str, Any]]
    """The last steps."""
    result: Mapping[str, Any] | None
    checkpoint_step: int | None
    age_seconds: float
    limit_seconds: float
    """A longer age is silence."""


def read_evidence(paths: RunPaths, problems: list[str], silent_seconds: float) -> Evidence:
    """What decides about a run; `problems` receives what is wrong with its files.

    The state is read again after the probe: a driver writes how it ended, and then frees the lock.
    """
    state, locked = state_of(paths, []), None
    if state is None or state.state == "running":
        locked = is_locked(paths.lock)
    state = state_of(paths, problems)
    rows, damage = last_rows(paths.metrics)
    problems += [damage] if damage else []
    if paths.config.exists() and paths.config.stat().st_size == 0:
        problems.append(f"{paths.config.name}: empty")
    limit = max(silent_seconds, STEPS_OF_SILENCE * max(map(step_seconds, rows), default=0.0))
    age = age_of(newest_write(paths.folder))
    if age > limit and (state is None or state.state == "running"):  # before that is silence, checkpoints are looked at
        age = age_of(newest_write(paths.folder, deep=True))
    return Evidence(
        paths=paths,
        state=state,
        locked=locked,
        rows=rows,
        result=json_object(paths.result, problems),
        checkpoint_step=(json_object(paths.published, problems) or {}).get("state", {}).get("step"),
        age_seconds=age,
        limit_seconds=limit,
    )


def step_seconds(row: Mapping[str, Any]) -> float:
    """How long a step took, with the wait for its data and an evaluation on dev after it."""
    return float(sum(row.get(name) or 0.0 for name in ("seconds", "data_wait_seconds", "dev_seconds")))


def state_of(paths: RunPaths, problems: list[str]) -> RunState | None:
    """The content of state.json; where it is damaged, that is a problem, and there is none."""
    try:
        return read_state(paths)
    except ValueError as error:
        problems.append(str(error))
        return None


def json_object(path: Path, problems: list[str]) -> dict[str, Any] | None:
    """A JSON object; None where there is none, with its problem unless the file is missing."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        problems.append(f"{path.name}: not JSON ({error})")
        return None
    if isinstance(found, dict):
        return found
    problems.append(f"{path.name}: expected an object, found {type(found).__name__}")
    return None
