"""state.json of a run folder: what the last command on that run did, and why it ended. It changes nothing in a run.

A reader cannot tell from the other files whether a run was stopped or its process was killed, how many steps it takes
where the length is given in epochs, and why it failed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.files import RunPaths, write_json
from pipeline.core.processes import has_ended, this_process
from pipeline.core.stopping import Stopped

ERROR = re.compile(r"^Traceback \(most recent call last\):\n(?:[ \t].*\n)+(\S.*)$", re.MULTILINE)
MAX_LOG_BYTES = 1 << 18  # of the log, read for the reason of a failure
MAX_REASON = 1000  # characters of it that are kept


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """The content of state.json."""

    state: str
    """running, finished, stopped (on request) or failed; running also where the process was killed."""
    since: float
    """When that began: seconds since 1970, by the clock of the machine."""
    process: str
    """The driver, as `processes.this_process` names it."""
    num_steps: int | None = None
    """Optimizer steps of the whole run; None before the ranks know it."""
    reason: str | None = None
    """Why the run failed: the last error in its log, else that of the driver."""


def read_state(paths: RunPaths) -> RunState | None:
    """What state.json holds; None without one, as in the folders of earlier versions; ValueError if it is damaged."""
    try:
        plain: dict[str, Any] = json.loads(paths.state.read_text())
        names = [item.name for item in dataclasses.fields(RunState)]
        return RunState(**{name: value for name, value in plain.items() if name in names})
    except FileNotFoundError:
        return None
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{paths.state.name}: expected the state of a run, found another content ({error})") from error


def write_state(paths: RunPaths, state: RunState) -> None:
    """Replace state.json at once. Where that is not possible, as on a full disk, the run goes on without it."""
    with contextlib.suppress(OSError):
        write_json(paths.state, dataclasses.asdict(state))


@contextlib.contextmanager
def recorded_state(paths: RunPaths) -> Iterator[None]:
    """Record that this process works on a run while the body runs, and how that ended."""
    log_bytes = paths.log.stat().st_size if paths.log.exists() else 0
    running = RunState(state="running", since=time.time(), process=this_process(), num_steps=known_steps(paths))
    write_state(paths, running)
    try:
        yield
    except Stopped as stopped:
        record_end(paths, running, "finished" if stopped.is_finished else "stopped")
        raise
    except BaseException as error:
        reason = last_error(paths.log, start=log_bytes) or str(error).partition("\n")[0] or type(error).__name__
        record_end(paths, running, "failed", reason=reason[:MAX_REASON])
        raise
    record_end(paths, running, "finished")


def record_end(paths: RunPaths, running: RunState, state: str, *, reason: str | None = None) -> None:
    """Replace the state of a run that this process worked on, unless another command has taken the run over."""
    with contextlib.suppress(ValueError):
        found = read_state(paths)
        if found is not None and found.process != running.process:
            return
    steps = known_steps(paths)
    write_state(paths, dataclasses.replace(running, state=state, since=time.time(), num_steps=steps, reason=reason))


def record_finished(paths: RunPaths) -> None:
    """Nothing is left to do: a run that did not add scores on a text that is no longer asked for is finished."""
    with contextlib.suppress(ValueError):
        state = read_state(paths)
        is_at_work = state is not None and state.state == "running" and not has_ended(state.process)
        if state is not None and state.state != "finished" and not is_at_work:
            write_state(paths, dataclasses.replace(state, state="finished", reason=None))


def record_steps(paths: RunPaths, num_steps: int) -> None:
    """Record how many steps a run takes, which its ranks find out; ranks without a driver record nothing."""
    with contextlib.suppress(ValueError):
        state = read_state(paths)
        if state is not None:
            write_state(paths, dataclasses.replace(state, num_steps=num_steps))


def known_steps(paths: RunPaths) -> int | None:
    """The number of steps that the ranks have recorded; a damaged file is replaced, and holds no run up."""
    with contextlib.suppress(ValueError):
        state = read_state(paths)
        return None if state is None else state.num_steps
    return None


def last_error(log: Path, *, start: int = 0) -> str | None:
    """The error in which the last traceback of a log ends, one line; None where there is none after byte `start`."""
    with contextlib.suppress(OSError), log.open("rb") as file:
        file.seek(max(start, file.seek(0, 2) - MAX_LOG_BYTES))
        found = ERROR.findall(file.read().decode(errors="replace"))
        return found[-1] if found else None
    return None
