"""How the jobs of a sweep ended: a small file each, written by whichever process ran the job, and the table of all."""

from __future__ import annotations

import dataclasses
import enum
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.files import write_json
from pipeline.core.stopping import EXIT_STOPPED, Stopped
from pipeline.core.types import Busy

EXIT_FAILED = 2


class State(enum.Enum):
    """What became of a job."""

    finished = "finished"
    stopped = "stopped"
    failed = "failed"
    busy = "busy"
    to_do = "to do"
    """Of a dry run: not begun, or to continue."""
    missing = "no outcome"
    """Its process wrote none: it was not started, or killed."""


FAILED = (State.failed, State.missing)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How one job ended."""

    state: State
    folder: str | None = None
    """Its run folder, where it has one."""
    score: float | None = None
    note: str = ""
    """Why it has no result; of a dry run, where it stands."""
    asked_to_stop: bool = False
    """Also of a job that finished all the same: whoever asked wants no further one."""
    signals: tuple[int, ...] = ()
    """Those that asked it to stop."""

    @property
    def first_line(self) -> str:
        """The first line of the note."""
        return self.note.partition("\n")[0]


def ended_by(error: Exception, folder: str | None = None) -> Outcome:
    """The outcome of a job that ended with an error or with a request to stop."""
    if isinstance(error, Stopped):
        return Outcome(
            state=State.finished if error.is_finished else State.stopped,
            folder=folder,
            score=error.score,
            note="" if error.is_finished else str(error),
            asked_to_stop=True,
            signals=error.signals,
        )
    return Outcome(state=State.busy if isinstance(error, Busy) else State.failed, folder=folder, note=str(error))


# -------------------------------------------------------------------------------------------- files


@dataclass(frozen=True, slots=True, kw_only=True)
class JobOutcome:
    """A line of a sweep's table."""

    number: int
    """From 1."""
    label: str
    """The options in which the jobs differ: `combined loss.kd.weight=0.5 seed=2`."""
    outcome: Outcome


def write_outcome(folder: Path, job: JobOutcome) -> None:
    """Leave a job's outcome in the folder of its sweep; a job that ran again replaces its earlier one."""
    content = dataclasses.asdict(job.outcome) | {"state": job.outcome.state.name}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{job.number:05d}.json", {"number": job.number, "label": job.label, **content})


def read_outcomes(folder: Path) -> dict[int, JobOutcome]:
    """The outcomes of a sweep so far, by number."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        number, label = content.pop("number"), content.pop("label")
        content |= {"state": State[content["state"]], "signals": tuple(content["signals"])}
        found[number] = JobOutcome(number=number, label=label, outcome=Outcome(**content))
    return found


# -------------------------------------------------------------------------------------------- table


def table(jobs: Sequence[JobOutcome]) -> str:
    """All jobs, one a line, and above them how many ended in which way."""
    counts = Counter(job.outcome.state for job in jobs)
    rows = [
        (
            str(job.number),
            job.label,
            job.outcome.state.value,
            "" if job.outcome.score is None else f"{job.outcome.score:.4f}",
            job.outcome.first_line or job.outcome.folder or "",
        )
        for job in jobs
    ]
    head = ("", "run", "outcome", "score", "folder, or why it has no result")
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(4)]
    lines = [
        f"{number:>{widths[0]}}  {label:<{widths[1]}}  {state:<{widths[2]}}  {score:>{widths[3]}}  {last}".rstrip()
        for number, label, state, score, last in [head, *rows]
    ]
    ended = ", ".join(f"{counts[state]} {state.value}" for state in State if counts[state])
    return "\n".join([f"{len(jobs)} runs: {ended}", "", *lines])


def exit_code(jobs: Sequence[JobOutcome]) -> int:
    """That of a sweep: 75 if a job was stopped, because the same command continues it; else 2 if one failed; else 0."""
    if any(job.outcome.state is State.stopped for job in jobs):
        return EXIT_STOPPED
    return EXIT_FAILED if any(job.outcome.state in FAILED for job in jobs) else 0
