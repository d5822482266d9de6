"""Statuses as an aligned table for a terminal, grouped by state, or as lines of JSON."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pipeline.core.progress import readable, readable_duration
from pipeline.status.values import STATES, CaptureStatus, Lease, RunStatus, Status

GAP = "  "
MAX_LEASES = 2  # named in a row; the others are counted
LEFT = ("run", "capture", "plan", "options", "leases", "note")  # aligned to the left: texts


def json_lines(found: Sequence[Status]) -> Iterator[str]:
    """One object for each status; a field that is not known is null."""
    for status in found:
        yield json.dumps(dataclasses.asdict(status))


def table(found: Sequence[Status]) -> Iterator[str]:
    """A table for each kind, its rows grouped by state."""
    by_kind: dict[str, list[Status]] = {"run": [], "capture": [], "plan": []}
    for status in found:
        by_kind[status.kind].append(status)
    for kind, statuses in by_kind.items():
        if statuses:
            names = row_names(statuses)
            yield from _grouped(statuses, [_cells(kind, *pair) for pair in zip(statuses, names, strict=True)])
            yield ""


def _cells(kind: str, status: Status, name: str) -> Mapping[str, str]:
    return {kind: name} | (run_cells(status) if isinstance(status, RunStatus) else capture_cells(status))


def row_names(found: Sequence[Status]) -> list[str]:
    """The names of the folders, with their paths where these differ in more than the name."""
    folders = [Path(status.folder) for status in found]
    is_one = len({folder.parent for folder in folders}) == 1
    return [folder.name if is_one else str(folder) for folder in folders]


def run_cells(status: RunStatus) -> dict[str, str]:
    """The row of a run; an empty cell where nothing is known."""
    step = "" if status.step is None else str(status.step)
    is_short = status.step is not None and status.step != status.num_steps
    total = "" if status.num_steps is None or not is_short else f"/{status.num_steps}"
    return {
        "options": status.label,
        "seed": "" if status.seed is None else str(status.seed),
        "step": step + total,
        "tokens/s": "" if status.tokens_per_second is None else f"{status.tokens_per_second:,.0f}",
        "left": _duration(status.seconds_left),
        "seen": _duration(status.age_seconds),
        "score": score_cell(status),
        "texts": str(status.num_texts or ""),
        "note": status.note,
    }


def score_cell(status: RunStatus) -> str:
    """A score with what it is: a rate in percent, or a perplexity."""
    if status.score is None or status.metric is None:
        return ""
    where = "" if status.scored_on == "test" else f" ({status.scored_on})"
    if status.metric == "perplexity":
        return f"perplexity {status.score:.4g}{where}"
    return f"{status.metric.replace('_', ' ')} {status.score:.1%}{where}"


def capture_cells(status: CaptureStatus) -> dict[str, str]:
    """The row of a capture or plan."""
    of = "" if status.num_shards is None else f"/{status.num_shards}"
    return {
        "options": status.label,
        "shards": f"{status.num_committed}{of}",
        "targets": f"{status.num_targets:,}" if status.num_targets else "",
        "size": readable(status.bytes) if status.bytes else "",
        "targets/s": "" if status.targets_per_second is None else f"{status.targets_per_second:,.0f}",
        "left": _duration(status.seconds_left),
        "seen": _duration(status.age_seconds),
        "leases": leases_cell(status.leases) if status.kind == "capture" else "",
        "note": status.note,
    }


def leases_cell(leases: Sequence[Lease]) -> str:
    """The shards that workers hold: "3 by process 12 on host, 5 s ago"."""
    named = [
        f"{lease.shard} by {lease.holder or 'a process'}, {readable_duration(lease.age_seconds)} ago"
        for lease in leases[:MAX_LEASES]
    ]
    more = len(leases) - len(named)
    return "; ".join(named + [f"{more} more"] * (more > 0))


def _duration(seconds: float | None) -> str:
    return "" if seconds is None else readable_duration(seconds)


def _grouped(found: Sequence[Status], rows: Sequence[Mapping[str, str]]) -> Iterator[str]:
    """The rows, in the order of the states, below the heads of those columns that have content."""
    heads = [head for head in rows[0] if any(row[head] for row in rows)]
    widths = {head: max(len(head), *(len(row[head]) for row in rows)) for head in heads}
    counts = Counter(status.state for status in found)
    yield _line({head: head for head in heads}, widths)
    for state in (state for state in STATES if counts[state]):
        yield f"{state} ({counts[state]})"
        for status, row in zip(found, rows, strict=True):
            if status.state == state:
                yield _line(row, widths)


def _line(row: Mapping[str, str], widths: Mapping[str, int]) -> str:
    """A row; on a terminal that is narrower, its end is cut and marked."""
    cells = (row[head].ljust(width) if head in LEFT else row[head].rjust(width) for head, width in widths.items())
    line = GAP + GAP.join(cells).rstrip()
    columns = shutil.get_terminal_size().columns
    return line if not sys.stdout.isatty() or len(line) <= columns else f"{line[: columns - 1]}…"
