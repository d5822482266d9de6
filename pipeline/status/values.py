"""What is known of a run, a capture or a plan from its folder, and what all of them together mean."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

STATES = ("unreadable", "failed", "silent", "running", "stopped", "waiting", "finished")
"""As they are listed: first those that need somebody."""
NEED_SOMEBODY = ("unreadable", "failed", "silent")
EXIT_FINISHED, EXIT_TROUBLE, EXIT_UNFINISHED = 0, 1, 3


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatus:
    """One training run."""

    kind: str = "run"
    folder: str
    state: str
    """One of `STATES`."""
    name: str = ""
    """The experiment."""
    seed: int | None = None
    label: str = ""
    """The options in which it differs from the other runs of its experiment."""
    step: int | None = None
    """Optimizer steps done."""
    num_steps: int | None = None
    checkpoint_step: int | None = None
    """The step from which the same command goes on; None without a checkpoint."""
    tokens_per_second: float | None = None
    """Of the last step."""
    seconds_left: float | None = None
    """Until the last step, by the mean of the last steps; scoring is not in it."""
    age_seconds: float | None = None
    """Since the last sign of life: the newest file. Of a finished run, since its result."""
    score: float | None = None
    metric: str | None = None
    """What the score is: accuracy, exact_match or perplexity."""
    scored_on: str | None = None
    """test, or dev where there is no test text."""
    num_texts: int = 0
    """Held-out texts with scores."""
    process: str = ""
    """The process that works, or worked, on it."""
    note: str = ""
    """Why it is in this state, and what was found damaged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """A shard that a worker holds."""

    shard: int
    holder: str
    age_seconds: float
    """Since it was renewed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureStatus:
    """One cache, finished or not; or the plan of one that is being made."""

    kind: str = "capture"
    """capture; plan: the corpus is tokenized, and there is no cache yet."""
    folder: str
    state: str
    label: str = ""
    """Teacher, entries kept, window."""
    num_shards: int | None = None
    num_committed: int = 0
    """Of a plan: shards whose text is tokenized."""
    leases: tuple[Lease, ...] = ()
    num_targets: int = 0
    """Captured so far."""
    bytes: int = 0
    """Of the committed shards."""
    targets_per_second: float | None = None
    seconds_left: float | None = None
    age_seconds: float | None = None
    """Since the last file was written."""
    note: str = ""


Status = RunStatus | CaptureStatus


def exit_code(found: Sequence[Status]) -> int:
    """0: all are finished; 1: something failed, is silent or cannot be read; 3: something is left, nothing failed."""
    states = {status.state for status in found}
    if states & {*NEED_SOMEBODY}:
        return EXIT_TROUBLE
    return EXIT_FINISHED if states <= {"finished"} else EXIT_UNFINISHED


def summary(found: Sequence[Status]) -> str:
    """How many there are in each state: "12 runs: 1 failed, 4 running, 7 finished; 1 capture: 1 finished"."""
    parts = []
    for kind in ("run", "capture", "plan"):
        counts = Counter(status.state for status in found if status.kind == kind)
        if counts:
            states = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])
            parts.append(f"{counts.total()} {kind}{'s' * (counts.total() != 1)}: {states}")
    return "; ".join(parts)
