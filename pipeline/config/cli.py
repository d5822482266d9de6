"""The command line: Hydra composes `conf/`, the result becomes a typed configuration, a stage is called."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf.errors import OmegaConfBaseException

from pipeline.config import parallel, sweeps
from pipeline.config.commands import ROOTS, StudyCommand
from pipeline.config.compose import chosen_groups, register, study_arguments, take_study
from pipeline.config.groups import CONF_DIR, PACKAGE
from pipeline.config.help import help_text, help_words
from pipeline.config.outcomes import EXIT_FAILED, JobOutcome, Outcome, State, ended_by, write_outcome
from pipeline.config.overrides import completed_overrides, renamed_hint
from pipeline.config.sweeps import Check, Sweep
from pipeline.core.processes import collect_less
from pipeline.core.stopping import EXIT_STOPPED, Stopped, hand_over, interrupt, stop_signals_handled_by
from pipeline.core.types import InputError, RunFailed

Body = Callable[[Any], "Outcome | float | None"]
ENDS_HERE = "the sweep ends here, as requested; the same command continues with its other runs"
PLACE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)  # the place is to blame, and not this code


# ------------------------------------------------------------------------------------------- checks


def check_checkout() -> None:
    """Reject a script of one checkout that would run the code and the configuration of another."""
    code = Path(sys.argv[0]).resolve().parents[1] / "pipeline"
    if Path(sys.argv[0]).parent.name == "scripts" and code.is_dir() and code != PACKAGE:
        raise InputError(
            f"expected to run the code of {code}, found {PACKAGE} installed in this environment; use the environment "
            f"of that checkout (its scripts/setup makes one), or set PYTHONPATH={code.parent}"
        )


def warn_of_another_checkout() -> None:
    """For a command without a place of its own (weak-to-strong, python -m): the current folder may hold other code."""
    code = Path.cwd() / "pipeline"
    if (code / "config" / "schema.py").is_file() and code.resolve() != PACKAGE:
        print(
            f"warning: this runs the code of {PACKAGE}, and not that of the current folder; for that one use its own "
            "environment (scripts/setup) and its scripts/",
            file=sys.stderr,
        )


def no_check(config: Any) -> None:
    """Of a script whose options are wrong only where their types or files are."""


# --------------------------------------------------------------------------------------------- main


def hydra_main(root: str, story: str, body: Body, check: Check = no_check) -> None:
    """Run a script: compose `conf/<root>.yaml` with the command line, make it typed, call `body`.

    `check` finds what is wrong with the options of a job in about a second; a sweep calls it for all jobs before the
    first. An InputError ends the process with exit code 2 and its message alone, a signal that asks to stop with 75.
    """
    if help_words(sys.argv[1:]) is not None:
        with contextlib.suppress(BrokenPipeError):
            print(help_text(root, story, sys.argv[1:]), flush=True)
        return
    collect_less()
    # Hydra would wrap errors in its own messages; this way ours reach the user
    os.environ["HYDRA_FULL_ERROR"] = "1"
    with _exit_codes(), stop_signals_handled_by(interrupt):
        placed = parallel.take_place()
        check_checkout()
        study, sys.argv[1:] = take_study(sys.argv[1:])
        is_of_studies = issubclass(ROOTS[root], StudyCommand)
        if is_of_studies:
            sys.argv[1:] = study_arguments(sys.argv[1:], ROOTS[root])
        register(study, chosen=chosen_groups(sys.argv[1:]), roots=ROOTS if is_of_studies else [root])
        sys.argv[1:], notes = completed_overrides(root, sys.argv[1:])
        for note in notes:
            print(note, file=sys.stderr)
        sweep = sweeps.begin(root, sys.argv[1:], check)
        if sweep is not None and sweep.dry_run:  # elsewhere there is nothing to do
            sweep = dataclasses.replace(sweep, launcher=sweeps.BASIC)
            others = [argument for argument in sys.argv[1:] if not argument.startswith("hydra/launcher=")]
            sys.argv[1:] = [*others, f"hydra/launcher={sweeps.BASIC}"]
        one = functools.partial(_run_alone, root, body, placed)
        job = one if sweep is None else functools.partial(_run_job, root, body, sweep)
        functools.update_wrapper(job, _run_job)  # Hydra reads the name of the function
        call = hydra.main(config_path=str(CONF_DIR), config_name=root, version_base="1.3")(job)
        if sweep is None:
            call()
        elif sweep.jobs_at_once == 1 or sweep.dry_run:
            _run_sweep(sweep, call)
        else:
            commands = parallel.job_commands(root, study, sys.argv[1:], sweep)
            _run_sweep(sweep, functools.partial(_run_side_by_side, sweep, commands))


@contextlib.contextmanager
def _exit_codes() -> Iterator[None]:
    """End the process with one line and an exit code where the reason lies in the input, the disk or a request."""
    try:
        yield
    except (InputError, RunFailed) as error:
        exit_with_error(error)
    except (OmegaConfBaseException, hydra.errors.HydraException) as error:
        cause = "" if error.__cause__ is None else f": {str(error.__cause__).splitlines()[0]}"
        exit_with_error(InputError(f"{error}{cause}{renamed_hint(str(error))}"))
    except KeyboardInterrupt as request:
        print(f"stopped by {request}; the same command continues with what is left", file=sys.stderr)
        sys.exit(EXIT_STOPPED)
    except Stopped:
        sys.exit(EXIT_STOPPED)


def _run_alone(root: str, body: Body, placed: parallel.PlacedJob | None, node: Any) -> float | None:
    """The only job of a command: its end is the end of the process. One of a sweep leaves its outcome there."""
    outcome = _outcome(root, body, node, in_sweep=placed is not None)
    if placed is not None:
        placed.write(outcome)
    if outcome.state is State.failed:
        exit_with_error(RunFailed(outcome.note))
    if outcome.state is State.stopped:
        sys.exit(EXIT_STOPPED)
    if outcome.note:
        print(outcome.note)
    return outcome.score


def _run_job(root: str, body: Body, sweep: Sweep, node: Any) -> float | None:
    """One job of a sweep, in whatever process its launcher runs it: it writes its outcome and raises nothing.

    Other jobs do not depend on it, and a launcher may take an exception of one for the end of all. But a request to
    stop ends a sweep that runs in this process, and submitit gets back the job that it wanted to end.
    """
    job = HydraConfig.get()
    number, label = job.job.num + 1, sweep.label(job.overrides.task)
    if not sweep.dry_run:
        print(f"==> {sweep.head(number)} {label}", flush=True)
    outcome = _outcome(root, body, node, in_sweep=True)
    of_job = JobOutcome(number=number, label=label, outcome=outcome)
    if outcome.state is State.failed and sweeps.is_new(sweep, of_job):
        print(f"error: {outcome.note}", file=sys.stderr)
    write_outcome(sweep.folder, of_job)
    if not sweep.dry_run:
        print(f"    {sweep.progress(outcome)}", flush=True)
    if outcome.asked_to_stop and job.runtime.choices["hydra/launcher"] == sweeps.BASIC:
        print(ENDS_HERE, file=sys.stderr)
        sys.exit(EXIT_STOPPED)
    if outcome.state is State.stopped:
        try:
            hand_over(outcome.signals)  # may end this process
        except Exception as error:  # submitit does not start it again
            outcome = dataclasses.replace(outcome, note=f"{outcome.note} ({error})")
            write_outcome(sweep.folder, dataclasses.replace(of_job, outcome=outcome))
    return outcome.score


def _outcome(root: str, body: Body, node: Any, *, in_sweep: bool = False) -> Outcome:
    """How a job ends: options made typed and checked, then the script's body. A fault of the code ends a job alone."""
    try:
        config = sweeps.check_options(root, node)
        with _place_errors():
            result = body(config)
    except (Stopped, InputError, RunFailed) as error:
        return ended_by(error)
    except Exception as error:
        if not in_sweep:
            raise
        traceback.print_exc()
        return ended_by(RunFailed(f"{type(error).__name__}: {error}"))
    return result if isinstance(result, Outcome) else Outcome(state=State.finished, score=result)


def _run_sweep(sweep: Sweep, call: Callable[[], None]) -> NoReturn:
    """All jobs of a sweep, then its table; the process ends with an exit code that shows how they ended."""
    try:
        call()
    except (KeyboardInterrupt, SystemExit):
        sweeps.end(sweep, is_complete=False)
        raise
    except Exception as error:
        if sweep.launcher == sweeps.BASIC:  # its jobs raise nothing: the sweeper itself, or this code, is at fault
            raise
        print(f"error: {sweep.launcher}: {error}", file=sys.stderr)
        sweeps.end(sweep, is_complete=False)
        sys.exit(EXIT_FAILED)
    sys.exit(sweeps.end(sweep, is_complete=True))


def _run_side_by_side(sweep: Sweep, commands: Sequence[Sequence[str]]) -> None:
    """The jobs of a sweep in processes of their own; SystemExit where a request to stop ended it."""
    if parallel.run_jobs(sweep, commands, started=sweep.started):
        print(ENDS_HERE, file=sys.stderr)
        sys.exit(EXIT_STOPPED)


@contextlib.contextmanager
def _place_errors() -> Iterator[None]:
    """Turn the errors of full disks and of missing permissions into an InputError."""
    try:
        yield
    except OSError as error:
        if error.errno not in PLACE_ERRORS:
            raise
        raise InputError(
            f"{error.filename or 'disk'}: expected to read and write there, found {error.strerror}; make room or "
            "correct the permissions, and run the same command again"
        ) from error


def pop_action(actions: Mapping[str, str], story: str) -> str:
    """Take the first word off the command line; `--help` passes, a missing or unknown one ends with exit code 2.

    `actions` maps each action to one sentence.
    """
    word = next(iter(sys.argv[1:]), "")
    if word in actions:
        return sys.argv.pop(1)
    if help_words(sys.argv[1:]) is not None:
        return ""
    listed = "\n".join(f"  {name:<8} {sentence}" for name, sentence in actions.items())
    found = f"{word!r}" if word else "nothing"
    error = f"expected an action as the first word, found {found}; give one of these, or --help:\n{listed}"
    return exit_with_error(InputError(error))


def exit_with_error(error: Exception) -> NoReturn:
    """End the process with the message alone."""
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
