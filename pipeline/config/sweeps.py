"""A sweep (-m): its jobs are known and checked before the first one starts, and each has a short label."""

from __future__ import annotations

import dataclasses
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import setup_globals

from pipeline.config.commands import ROOTS
from pipeline.config.groups import CONF_DIR
from pipeline.config.options import to_typed
from pipeline.config.outcomes import JobOutcome, Outcome, State, exit_code, read_outcomes, table
from pipeline.config.schema import IfBusy
from pipeline.config.validate import check_files, urls_in
from pipeline.core.files import explain
from pipeline.core.progress import readable_duration
from pipeline.core.types import InputError, RunFailed

ABOUT = """\
What Hydra keeps of the last sweep (-m): multirun.yaml, its options as composed. Nothing reads it. Each folder here has
the outcomes of one sweep, a JSON file for each of its jobs. All of this may be deleted; the runs lie in the folders
beside this one.
"""
Check = Callable[[Any], None]
JOBS_OPTION = "launcher.jobs="
BASIC = "basic"  # the name of Hydra's own launcher, and of its own sweeper


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """What all jobs of a sweep need to know of it, in whatever process they run."""

    folder: Path
    """Of the outcomes."""
    varied: tuple[str, ...]
    """Options with several values."""
    job_labels: tuple[str, ...]
    """Of each job; empty where a sweeper chooses them one after the other."""
    num_jobs: int | None
    """None: not known before the end."""
    launcher: str
    jobs_at_once: int
    """Of launcher.jobs; 1: one after the other, or as another launcher does it."""
    of_all_jobs: tuple[str, ...]
    """Overrides that a process of each job gets beside its own."""
    job_overrides: tuple[tuple[str, ...], ...]
    """Of each job; empty where a sweeper chooses them one after the other."""
    dry_run: bool
    started: float
    """Seconds since 1970."""

    def head(self, number: int) -> str:
        """`[7/12]`."""
        return f"[{number}]" if self.num_jobs is None else f"[{number}/{self.num_jobs}]"

    def progress(self, outcome: Outcome) -> str:
        """How a job ended, and the time so far."""
        score = "" if outcome.score is None else f"score {outcome.score:.4f}; "
        return f"{outcome.state.value}; {score}{readable_duration(time.time() - self.started)} so far"

    def label(self, overrides: Iterable[str]) -> str:
        """The options in which a job differs from the others, after its experiment."""
        given = {name.lstrip("+"): value for name, _, value in (override.partition("=") for override in overrides)}
        options = [f"{name}={value}" for name, value in given.items() if name in self.varied and name != "experiment"]
        return " ".join([given["experiment"], *options] if "experiment" in given else options) or "as given"


def begin(root: str, arguments: Sequence[str], check: Check) -> Sweep | None:
    """The sweep that the arguments ask for, None if they ask for none; InputError if one of its jobs cannot run.

    `check` is called with the options of each job. Of a sweeper that chooses jobs by the scores of earlier ones, only
    what all have in common can be checked.
    """
    given = get_args_parser().parse_args([*arguments])
    if given.cfg or given.info or given.hydra_help:
        return None
    if not given.multirun:
        check_one_run(given.overrides)
        return None
    place = [] if given.config_dir is None else [f"hydra.searchpath=[file://{Path(given.config_dir).resolve()}]"]
    setup_globals()  # the resolvers of Hydra, such as ${now:}
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        parsed = parser.parse_overrides(given.overrides)
        fixed = [str(override.input_line) for override in parsed if not override.is_sweep_override()]
        node = compose(root, overrides=[*fixed, *place], return_hydra_config=True)
        hydra = node.hydra
        params = [f"{name}={value}" for name, value in (hydra.sweeper.get("params") or {}).items()]
        parsed = [*parser.parse_overrides(params), *parsed]
        sweep = _sweep(node, parsed)
        check_at_once(sweep, hydra.runtime.choices["hydra/sweeper"])
        if hydra.runtime.choices["hydra/sweeper"] == BASIC:
            jobs = BasicSweeper.split_arguments(parsed, None)[0]
            sweep = _checked(root, sweep, jobs, place, check)
        else:
            check_search(root, hydra.runtime.choices["hydra/sweeper"], node)
        explain(Path(hydra.sweep.dir), ABOUT)
    return sweep


def _sweep(node: Any, parsed: Sequence[Override]) -> Sweep:
    hydra, launcher = node.hydra, node.get("launcher") or {}
    return Sweep(
        folder=new_folder(Path(hydra.sweep.dir)),
        varied=tuple(override.get_key_element().lstrip("+") for override in parsed if override.is_sweep_override()),
        job_labels=(),
        num_jobs=hydra.sweeper.get("n_trials"),
        launcher=hydra.runtime.choices["hydra/launcher"],
        jobs_at_once=launcher.get("jobs", 1),
        of_all_jobs=jobs_side_by_side(launcher.get("if_busy")),
        job_overrides=(),
        dry_run=False,
        started=time.time(),
    )


def new_folder(place: Path) -> Path:
    """For the outcomes of one sweep; several commands may share the place."""
    return place.resolve() / f"{time.strftime('%Y-%m-%d-%H%M%S')}-{secrets.token_hex(3)}"


def jobs_side_by_side(if_busy: IfBusy | None) -> tuple[str, ...]:
    """What jobs at the same time need: two may be the same run, trained once, and the second waits for the first."""
    return ("launcher.if_busy=wait",) if if_busy is IfBusy.fail else ()


# ------------------------------------------------------------------------------------------- checks


def check_options(root: str, node: Any) -> Any:
    """The typed options of a job; InputError where they are wrong, or name a file or an address that is not there."""
    config: Any = to_typed(node, ROOTS[root])
    check_files(config)
    for name, url in urls_in(config):
        from pipeline.core.object_store import check_url  # here: pyarrow is slow to load, and most need none

        check_url(url, name, writing=root == "capture" and name != "also_ids")
    return config


def check_search(root: str, sweeper: str, node: Any) -> None:
    """Refuse a sweeper that chooses jobs by the scores of earlier ones where it would decide on test."""
    if node.get("dry_run"):
        raise InputError(f"dry_run: expected jobs that are known before, found a search ({sweeper}); leave out one")
    if root == "train" and node.get("dev") is None:
        raise InputError(
            f"dev: expected a held-out text by whose score the search ({sweeper}) decides, found null; give dev, "
            "because test is no test any more once it decides"
        )


def check_one_run(overrides: Sequence[str]) -> None:
    """Refuse several runs at a time on the command line of one; in a study's file it waits for a sweep."""
    for override in overrides:
        if override.startswith(JOBS_OPTION) and override != f"{JOBS_OPTION}1":
            raise InputError(f"{override}: expected a sweep (-m), found one run; add -m, or leave it out")


def check_at_once(sweep: Sweep, sweeper: str) -> None:
    """Refuse several jobs at a time where this command does not start them itself, or does not know them before."""
    if "launcher.jobs" in sweep.varied:
        raise InputError("launcher.jobs: expected one number for all jobs of a sweep, found several; give one")
    if sweep.jobs_at_once <= 1:
        return
    given = f"launcher.jobs={sweep.jobs_at_once}: expected"
    if sweep.launcher != BASIC:
        raise InputError(
            f"{given} Hydra's own launcher, whose jobs run on this machine, found hydra/launcher={sweep.launcher}, "
            "which decides itself how many work at a time (submitit: hydra.launcher.array_parallelism); leave out one"
        )
    if sweeper != BASIC:
        raise InputError(
            f"{given} jobs that are known before, found a search ({sweeper}), which waits for the score of each; "
            "leave out one of the two"
        )


def _checked(root: str, sweep: Sweep, jobs: Sequence[Sequence[str]], place: list[str], check: Check) -> Sweep:
    """The sweep with its jobs. A reason is printed once, and of jobs that differ in the seed alone one is checked."""
    job_labels = [sweep.label(overrides) for overrides in jobs]
    reasons, dry_run, found = dict[str, list[int]](), False, dict[tuple[str, ...], str]()
    for number, overrides in enumerate(jobs, 1):
        apart_from_seed = tuple(override for override in overrides if not override.startswith("seed="))
        if apart_from_seed not in found:  # composing takes Hydra a moment
            node = compose(root, overrides=[*overrides, *place])
            dry_run = dry_run or bool(node.get("dry_run"))
            found[apart_from_seed] = _reason_against(root, node, check)
        if reason := found[apart_from_seed]:
            reasons.setdefault(reason, []).append(number)
    for reason, numbers in reasons.items():
        print(f"error: {_which(numbers, job_labels)}: {reason}", file=sys.stderr)
    if reasons:
        num_wrong = sum(map(len, reasons.values()))
        raise InputError(f"expected {len(jobs)} jobs that can run, found {num_wrong} that cannot; none was started")
    return dataclasses.replace(
        sweep,
        job_labels=tuple(job_labels),
        job_overrides=tuple((*overrides, *sweep.of_all_jobs) for overrides in jobs),
        num_jobs=len(jobs),
        dry_run=dry_run,
    )


def _reason_against(root: str, node: Any, check: Check) -> str:
    """Why a job cannot run; empty where nothing is known."""
    try:
        check(check_options(root, node))
    except (InputError, RunFailed) as error:
        return str(error)
    return ""


def _which(numbers: Sequence[int], job_labels: Sequence[str]) -> str:
    """`job 7 (combined seed=2)`, or how many they are."""
    if len(numbers) == 1:
        return f"job {numbers[0]} ({job_labels[numbers[0] - 1]})"
    return f"{len(numbers)} of {len(job_labels)} jobs ({', '.join(map(str, numbers))})"


def is_new(sweep: Sweep, job: JobOutcome) -> bool:
    """Whether no other job of the sweep ended for the same reason, which is printed once."""
    others = [one for number, one in read_outcomes(sweep.folder).items() if number != job.number]
    return all(one.outcome.note != job.outcome.note for one in others)


# ------------------------------------------------------------------------------------------ the end


def end(sweep: Sweep, *, is_complete: bool) -> int:
    """Print the table of a sweep; returns the exit code. `is_complete`: no job is to come, or at work elsewhere."""
    found = read_outcomes(sweep.folder)
    num_jobs = max([sweep.num_jobs or 0, *found]) if sweep.job_labels else max(found, default=0)
    missing = Outcome(state=State.missing, note="its process left no word; see the launcher's log" * is_complete)
    jobs = []
    for number in range(1, num_jobs + 1):
        label = sweep.job_labels[number - 1] if sweep.job_labels else ""
        jobs.append(found.get(number, JobOutcome(number=number, label=label, outcome=missing)))
    print(f"\n{table(jobs)}\n\n{readable_duration(time.time() - sweep.started)}; outcomes: {sweep.folder}", flush=True)
    return exit_code(jobs)
