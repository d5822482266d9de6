"""A sweep of jobs that only sleep, each in a process of its own; as a script, such a sweep in the working directory."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

from pipeline.config.parallel import run_jobs
from pipeline.config.sweeps import Sweep

JOB = """
import os, sys, time
from pathlib import Path
from pipeline.config.outcomes import Outcome, State
from pipeline.config.parallel import take_place
from pipeline.core.stopping import interrupt, stop_signals_handled_by
job = take_place()
with stop_signals_handled_by(interrupt):
    try:
        Path(f"begun-{job.number}").write_text(str(os.getpid()))
        print(*sorted(os.sched_getaffinity(0)), time.time())
        sys.stdout.flush()
        if "fail" in sys.argv:
            raise SystemExit("a reason")
        time.sleep(float(sys.argv[1]))
        print(time.time())
    except KeyboardInterrupt:
        sys.exit(75)
job.write(Outcome(state=State.finished, score=job.number / 10, asked_to_stop="asked" in sys.argv))
"""


def sweep_of(folder: Path, num_jobs: int, **changes: object) -> Sweep:
    sweep = Sweep(
        folder=folder / "sweep",
        varied=("seed",),
        job_labels=tuple(f"combined seed={number}" for number in range(1, num_jobs + 1)),
        num_jobs=num_jobs,
        launcher="basic",
        jobs_at_once=2,
        of_all_jobs=(),
        job_overrides=tuple((f"seed={number}",) for number in range(1, num_jobs + 1)),
        dry_run=False,
        started=time.time(),
    )
    return dataclasses.replace(sweep, **changes)  # type: ignore[arg-type]


def job(*arguments: str) -> list[str]:
    return [sys.executable, "-c", JOB, *arguments]


def start_sweep(folder: Path, num_jobs: int) -> subprocess.Popen[bytes]:
    """A sweep of jobs that sleep a minute, in a process of its own; it ends with 75 where it is asked to stop."""
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"PYTHONPATH": f"{root}:{root / 'tests'}"}
    return subprocess.Popen([sys.executable, __file__, str(num_jobs)], cwd=folder, env=environment)


if __name__ == "__main__":
    number = int(sys.argv[1])
    started_sweep = sweep_of(Path.cwd(), number)
    sys.exit(75 if run_jobs(started_sweep, [job("60")] * number, started=started_sweep.started) else 0)
