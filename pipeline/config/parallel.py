"""Several jobs of a sweep at a time on this machine, each a process with its own share of the cores and the GPUs.

The parent starts the processes, waits, passes on requests to stop, and prints how each job ended. Each process is the
plain command of its job: it takes its place from one environment variable, and leaves its outcome as every job does.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config.groups import PACKAGE
from pipeline.config.outcomes import JobOutcome, Outcome, State, read_outcomes, write_outcome
from pipeline.config.overrides import flags_and_options
from pipeline.config.study import Study
from pipeline.config.sweeps import JOBS_OPTION, Sweep, is_new
from pipeline.core.processes import cores_in_order, end_with
from pipeline.core.stopping import EXIT_STOPPED, STOP_SIGNALS, stop_signals_handled_by
from pipeline.core.types import InputError

VARIABLE = "PIPELINE_JOB"
STARTED_VARIABLE = "PIPELINE_STARTED"
"""When the command started, in seconds since 1970: its time may be limited, and the time of a job is the command's."""
MULTIRUN_FLAGS = ("-m", "--multirun")
POLL_SECONDS = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What of the machine one job at a time uses."""

    cores: tuple[int, ...]
    gpus: tuple[str, ...]
    """As CUDA_VISIBLE_DEVICES names them; empty on a machine without."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedJob:
    """What the process of a job has to know, beside its command."""

    folder: str
    """Of the sweep's outcomes."""
    number: int
    label: str
    cores: tuple[int, ...]
    parent: int
    """PID of the process that runs the sweep."""

    def write(self, outcome: Outcome) -> None:
        """Leave the outcome for the parent's table."""
        write_outcome(Path(self.folder), JobOutcome(number=self.number, label=self.label, outcome=outcome))


# ------------------------------------------------------------------------------------------- places


def divided(num_places: int, cores: Sequence[int], gpus: Sequence[str]) -> list[Place]:
    """Places that share nothing and leave nothing: neighbouring cores, sizes as equal as can be, and as many GPUs each.

    The number of GPUs is that of a run's ranks, which must not depend on the place that it gets.
    """
    given = f"launcher.jobs={num_places}: expected"
    if num_places > len(cores):
        raise InputError(f"{given} at least one core for each, found {len(cores)}; use launcher.jobs={len(cores)}")
    if gpus and num_places > len(gpus):
        raise InputError(
            f"{given} at least one GPU for each, found {len(gpus)} ({','.join(gpus)}); use launcher.jobs={len(gpus)} "
            "or less, or hide the GPUs with CUDA_VISIBLE_DEVICES="
        )
    if len(gpus) % num_places:
        fitting = ", ".join(str(number) for number in range(1, len(gpus) + 1) if len(gpus) % number == 0)
        raise InputError(
            f"{given} a number that divides the GPUs into equal parts, found {len(gpus)} ({','.join(gpus)}); use one "
            f"of {fitting}, or choose the GPUs with CUDA_VISIBLE_DEVICES"
        )
    core_ends = [len(cores) * number // num_places for number in range(num_places + 1)]
    gpu_ends = [len(gpus) * number // num_places for number in range(num_places + 1)]
    return [
        Place(cores=tuple(cores[core_ends[i] : core_ends[i + 1]]), gpus=tuple(gpus[gpu_ends[i] : gpu_ends[i + 1]]))
        for i in range(num_places)
    ]


def places_here(num_places: int) -> list[Place]:
    """What this process may use, divided."""
    from pipeline.core.runtime import visible_gpus  # here: torch is slow to load, and --help needs none

    return divided(num_places, cores_in_order(), visible_gpus())


def take_place() -> PlacedJob | None:
    """In the process of a job, before it loads anything: use the cores of its place, and end with the parent."""
    text = os.environ.pop(VARIABLE, None)
    if text is None:
        return None
    content = json.loads(text)
    job = PlacedJob(**content | {"cores": tuple(content["cores"])})
    os.sched_setaffinity(0, job.cores)
    end_with(job.parent)
    return job


# ------------------------------------------------------------------------------------------ commands


def job_commands(root: str, study: Study | None, arguments: Sequence[str], sweep: Sweep) -> list[list[str]]:
    """The plain command of each job of a sweep; `arguments` are those of the sweep, without its study."""
    flags = [flag for flag in flags_and_options(arguments)[0] if flag not in MULTIRUN_FLAGS]
    script = [sys.executable, str(PACKAGE / "scripts" / f"{root}.py"), *flags]
    of_study = [] if study is None else [f"study={study.given}"]
    own = [[one for one in overrides if not one.startswith(JOBS_OPTION)] for overrides in sweep.job_overrides]
    return [[*script, *of_study, *overrides] for overrides in own]


# ------------------------------------------------------------------------------------------ the sweep


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningJob:
    """A job at work."""

    number: int
    process: subprocess.Popen[bytes]
    place: Place


def run_jobs(sweep: Sweep, commands: Sequence[Sequence[str]], *, started: float) -> bool:
    """Run the jobs of a sweep, some at a time; whether a request to stop has ended it.

    A request to this process, or to one of the jobs, is passed on to all that run, and no further one is started.
    `started`: when this command did, in seconds since 1970, for the time limit that its jobs share.
    """
    free = places_here(sweep.jobs_at_once)
    waiting = deque(enumerate(commands, 1))
    running = list[RunningJob]()
    requests, num_passed_on = list[int](), 0
    sweep.folder.mkdir(parents=True, exist_ok=True)
    with stop_signals_handled_by(lambda number, frame: requests.append(number)):
        while running or (waiting and not requests):
            while waiting and free and not requests:
                number, command = waiting.popleft()
                running.append(start_job(sweep, number, command, free.pop(0), started=started))
            time.sleep(POLL_SECONDS)
            for job in [job for job in running if job.process.poll() is not None]:
                running.remove(job)
                free.append(job.place)
                if end_job(sweep, job).asked_to_stop and not requests:
                    requests.append(signal.SIGTERM)
            num_seen = len(requests)  # a handler may add to them at any time
            for request in requests[num_passed_on:num_seen]:
                for job in running:
                    job.process.send_signal(request)
            num_passed_on = num_seen
    return bool(requests)


def start_job(sweep: Sweep, number: int, command: Sequence[str], place: Place, *, started: float) -> RunningJob:
    """Start the process of a job, its output in a file of the sweep's folder."""
    label = sweep.job_labels[number - 1]
    print(f"==> {sweep.head(number)} {label}", flush=True)
    job = PlacedJob(folder=str(sweep.folder), number=number, label=label, cores=place.cores, parent=os.getpid())
    variables = os.environ | {VARIABLE: json.dumps(dataclasses.asdict(job)), STARTED_VARIABLE: str(started)}
    if place.gpus:
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(place.gpus)
    with log_of(sweep, number).open("wb") as output:
        # a session of its own: Ctrl-C reaches the parent alone, which passes it on once
        process = subprocess.Popen(
            command, env=variables, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    return RunningJob(number=number, process=process, place=place)


def log_of(sweep: Sweep, number: int) -> Path:
    """The output of a job's process."""
    return sweep.folder / f"{number:05d}.log"


def end_job(sweep: Sweep, job: RunningJob) -> Outcome:
    """The outcome of a job whose process has ended, printed; one that left none gets one."""
    log = log_of(sweep, job.number)
    found = read_outcomes(sweep.folder).get(job.number)
    if found is None:
        label = sweep.job_labels[job.number - 1]
        found = JobOutcome(number=job.number, label=label, outcome=outcome_without_word(job.process.returncode, log))
        write_outcome(sweep.folder, found)
    outcome, head = found.outcome, sweep.head(job.number)
    if outcome.state is State.failed and is_new(sweep, found):
        print(f"error: {head} {outcome.note}; its output: {log}", file=sys.stderr)
    print(f"    {head} {sweep.progress(outcome)}", flush=True)
    return outcome


def outcome_without_word(exit_code: int, log: Path) -> Outcome:
    """Of a process that left no outcome: asked to stop before its run began, or ended by an error or from outside."""
    if exit_code == EXIT_STOPPED or -exit_code in STOP_SIGNALS:
        note = "stopped before its run began; the same command begins it"
        return Outcome(state=State.stopped, note=note, asked_to_stop=True)
    lines = log.read_text(errors="replace").splitlines() or ["it printed nothing"]
    return Outcome(state=State.failed, note=f"its process ended with exit code {exit_code}: {lines[-1]}")
