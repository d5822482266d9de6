"""Run folders -> their states.

What decides, in this order:

1. state.json holds how the last command on the run ended: finished, stopped, failed. Nothing else is asked then.
2. It holds running, and the lock is held (flock): a process works there, on this machine or on another one whose locks
   the file system shares. It is *silent* if its newest file is older than `silent_seconds`, and also older than five of
   the longest of its last steps; else *running*.
3. It holds running, and the lock is free. If that process ran on this machine and is gone, it was killed: *failed*. If
   it ran on another one, the file system may not share locks, so the age of the newest file decides as in 2.
4. Without state.json (earlier versions) the lock, then the result, the newest checkpoint and the log decide.

A process that hangs and one that computes a very long step look alike until `silent_seconds` have passed. So do a
process that was killed on another machine and one that works there, where locks are not shared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.core.files import RunPaths
from pipeline.core.processes import description, has_ended
from pipeline.core.progress import readable_duration
from pipeline.core.run_state import last_error
from pipeline.report.arms import short_name, shown, varying_names
from pipeline.report.runs import options_and_inputs
from pipeline.status.evidence import Evidence, json_object, read_evidence, step_seconds
from pipeline.status.folders import age_of, trouble
from pipeline.status.values import RunStatus

LOADING = "loading"
SCORES_LEFT = "the same command makes the scores that are missing"
MAX_VALUE = 24  # characters of an option's value in a label


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FoundRun:
    """The status of a run without its label, and what the label is made of."""

    status: RunStatus
    described: Mapping[str, Any]
    """Options that decide the result, and inputs, by name; empty where identity.json cannot be read."""


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run, begun or finished."""
    paths = RunPaths(folder=folder)
    return any(path.exists() for path in (paths.config, paths.lock, paths.identity, paths.metrics))


def find_run(folder: Path, *, silent_seconds: float) -> FoundRun:
    """One run from its folder; whatever is wrong with its files is a note, or its state is `unreadable`."""
    try:
        return _find_run(RunPaths(folder=folder), silent_seconds)
    except Exception as error:  # any content may stand in these files, and the other runs are to be shown
        status = RunStatus(folder=str(folder), state="unreadable", note=trouble(folder, error))
        return FoundRun(status=status, described={})


def _find_run(paths: RunPaths, silent_seconds: float) -> FoundRun:
    problems: list[str] = []
    found = read_evidence(paths, problems, silent_seconds)
    name, note = judge(found)
    if any(problem.startswith(f"{paths.result.name}: ") for problem in problems):
        name = "unreadable"
    described, seed = _described(json_object(paths.identity, problems) or {}, problems)
    if note == LOADING and described.get("steps") == 0:
        note = "loading or scoring"  # without training nothing is written before the scores
    if name == "waiting" and found.state is not None and described.get("steps") == 0:
        name, note = "stopped", SCORES_LEFT
    status = RunStatus(
        folder=str(paths.folder),
        state=name,
        name=paths.folder.name.rpartition("-")[0] or paths.folder.name,
        seed=seed,
        checkpoint_step=found.checkpoint_step,
        age_seconds=age_of(paths.result.stat().st_mtime) if name == "finished" else found.age_seconds,
        process="" if found.state is None else description(found.state.process),
        note=_one_line("; ".join([note] * bool(note) + problems)),
    )
    if not paths.folder.exists():  # its files are missing because the folder is
        raise FileNotFoundError(paths.folder)
    recorded = None if found.state is None else found.state.num_steps
    num_steps = recorded if recorded is not None else described.get("steps")
    return FoundRun(
        status=_with_progress(_with_scores(status, found.result), found.rows, num_steps), described=described
    )


# ------------------------------------------------------------------------------------------- state


def judge(found: Evidence) -> tuple[str, str]:
    """The state of a run, and a note on it; the head of this file tells what decides."""
    state, locked = found.state, found.locked
    if state is None:
        return _alive(found) if locked else _without_state(found)
    if state.state == "failed":
        return "failed", state.reason or "no reason recorded"
    if state.state != "running":
        return _ended(found)
    if locked:
        return _alive(found)
    if has_ended(state.process):
        return _killed(found)
    unsure = "the lock is not held as seen from here" if locked is False else "the lock cannot be read from here"
    name, note = _alive(found)
    return name, "; ".join(part for part in (note, f"{description(state.process)}: {unsure}") if part)


def _alive(found: Evidence) -> tuple[str, str]:
    """Silent or running, by the age of the newest file, and with what."""
    if found.age_seconds > found.limit_seconds:
        return "silent", f"no sign of life for {readable_duration(found.age_seconds)}"
    if found.paths.stop.exists():
        return "running", "asked to stop"
    if found.result is not None:
        return "running", "scoring a further text"
    if found.paths.model.exists():
        return "running", "scoring"
    is_loading = found.state is not None and not any_since(found.paths.metrics, found.state.since)
    return "running", LOADING if is_loading else ""


def any_since(file: Path, since: float) -> bool:
    """Whether a file was written after a time."""
    try:
        return file.stat().st_mtime >= since
    except FileNotFoundError:
        return False


def _ended(found: Evidence) -> tuple[str, str]:
    """A run that its driver ended, without an error."""
    is_stopped = found.state is not None and found.state.state == "stopped"
    if found.result is not None:
        return ("stopped", SCORES_LEFT) if is_stopped else ("finished", "")
    if is_stopped and found.paths.model.exists():
        return "stopped", SCORES_LEFT
    if found.checkpoint_step is not None:
        return "stopped", f"the same command goes on from step {found.checkpoint_step}"
    return "waiting", "stopped before its first checkpoint"


def _killed(found: Evidence) -> tuple[str, str]:
    """The driver ended without a word. With a result it had nothing left to do; else the same command goes on."""
    assert found.state is not None
    if any_since(found.paths.result, found.state.since):
        return "finished", ""
    step = found.checkpoint_step
    goes_on = f"the same command goes on from {'the beginning' if step is None else f'step {step}'}"
    if found.result is not None or found.paths.model.exists():
        goes_on = SCORES_LEFT
    reason = last_error(found.paths.log) if any_since(found.paths.log, found.state.since) else None
    last = f"; last error in the log: {reason}" if reason else ""
    return "failed", f"killed, or the machine restarted; {goes_on}{last}"


def _without_state(found: Evidence) -> tuple[str, str]:
    """A run of an earlier version on which no process of this machine works."""
    if found.result is not None:
        return "finished", ""
    reason = last_error(found.paths.log)
    if reason is not None:
        return "failed", reason
    if found.checkpoint_step is not None or not found.rows:
        return _ended(found) if found.checkpoint_step is not None else ("waiting", "no step yet")
    return "failed", "ended without a reason and without a checkpoint"


# ------------------------------------------------------------------------------------------- parts


def _with_scores(status: RunStatus, result: Mapping[str, Any] | None) -> RunStatus:
    """With the score on test, else on dev: accuracy over choices, else exact match, else perplexity."""
    if result is None:
        return status
    texts = {split: result.get(split) for split in ("test", "dev")} | dict(result.get("more") or {})
    scored = {name: scores for name, scores in texts.items() if scores}
    where = next((split for split in ("test", "dev") if split in scored), None)
    if where is None:
        return replace(status, num_texts=len(scored))
    names = ("accuracy", "exact_match", "perplexity")
    metric = next((name for name in names if scored[where].get(name) is not None), None)
    score = None if metric is None else float(scored[where][metric])
    return replace(status, score=score, metric=metric, scored_on=where, num_texts=len(scored))


def _with_progress(status: RunStatus, rows: Sequence[Mapping[str, Any]], num_steps: int | None) -> RunStatus:
    """With the step, and for a run that works the speed and the time left."""
    step = rows[-1]["step"] if rows else None
    status = replace(status, step=step, num_steps=num_steps)
    if status.state != "running" or not rows:
        return status
    left = None
    if num_steps is not None:
        left = (num_steps - rows[-1]["step"]) * sum(map(step_seconds, rows)) / len(rows)
    return replace(status, tokens_per_second=rows[-1].get("tokens_per_second"), seconds_left=left)


def _described(identity: Mapping[str, Any], problems: list[str]) -> tuple[dict[str, Any], int | None]:
    """Options and inputs by name, without name and seed, and the seed."""
    if not identity:
        return {}, None
    try:
        options, inputs = options_and_inputs(identity)
    except (AttributeError, KeyError, TypeError) as error:
        problems.append(f"identity.json: not that of this version ({type(error).__name__}: {error})")
        return {}, None
    options.pop("name", None)
    seed = options.pop("seed", None)
    return options | {name: value[:8] for name, value in inputs.items()}, seed


def _one_line(text: str) -> str:
    return " ".join(text.split())


# ------------------------------------------------------------------------------------------- labels


def labeled(found: Sequence[FoundRun]) -> list[RunStatus]:
    """The statuses, each with the options in which its run differs from the others of the same name."""
    by_name: dict[str, list[FoundRun]] = {}
    for run in found:
        by_name.setdefault(run.status.name, []).append(run)
    varying = {name: varying_names([run.described for run in runs]) for name, runs in by_name.items()}
    return [replace(run.status, label=label_of(run, varying[run.status.name])) for run in found]


def label_of(run: FoundRun, varying: Sequence[str]) -> str:
    """The values of some options, in the words of the report's tables."""
    values = ((short_name(name, varying), shown(run.described[name])) for name in varying if name in run.described)
    return "  ".join(
        f"{name} {value if len(value) <= MAX_VALUE else value[: MAX_VALUE - 1] + '…'}" for name, value in values
    )
