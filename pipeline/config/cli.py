"""The command line: Hydra composes `conf/`, the result becomes a typed configuration, a stage is called."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf.errors import OmegaConfBaseException

from pipeline.config.compose import chosen_groups, register, study_arguments, take_study
from pipeline.config.groups import CONF_DIR, PACKAGE
from pipeline.config.help import help_text, help_words
from pipeline.config.options import to_typed
from pipeline.config.overrides import completed_overrides, renamed_hint
from pipeline.config.study import ROOTS, RunsConfig
from pipeline.config.validate import check_files, urls_in
from pipeline.core.files import explain
from pipeline.core.stopping import EXIT_STOPPED, Stopped, interrupt, stop_signals_handled_by
from pipeline.core.types import InputError, RunFailed

SWEEPS = """\
What Hydra keeps of the last sweep (-m): multirun.yaml, its options as composed. Nothing reads it, and it may be
deleted; the runs lie in the folders beside this one.
"""
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


# --------------------------------------------------------------------------------------------- main


def hydra_main(root: str, story: str, body: Callable[[Any], float | None]) -> None:
    """Run a script: compose `conf/<root>.yaml` with the command line, make it typed, call `body`.

    An InputError ends the process with exit code 2 and its message alone, a signal that asks to stop with 75.
    """
    if help_words(sys.argv[1:]) is not None:
        with contextlib.suppress(BrokenPipeError):
            print(help_text(root, story, sys.argv[1:]), flush=True)
        return
    # Hydra would wrap errors in its own messages; this way ours reach the user
    os.environ["HYDRA_FULL_ERROR"] = "1"
    failures: Counter[str] = Counter()
    with _exit_codes(), stop_signals_handled_by(interrupt):
        check_checkout()
        study, sys.argv[1:] = take_study(sys.argv[1:])
        is_of_studies = issubclass(ROOTS[root], RunsConfig)
        if is_of_studies:
            sys.argv[1:] = study_arguments(sys.argv[1:], ROOTS[root])
        register(study, chosen=chosen_groups(sys.argv[1:]), roots=ROOTS if is_of_studies else [root])
        sys.argv[1:], notes = completed_overrides(root, sys.argv[1:])
        for note in notes:
            print(note, file=sys.stderr)
        job = functools.partial(_run_job, root, body, failures)
        functools.update_wrapper(job, _run_job)  # Hydra reads the name of the function
        hydra.main(config_path=str(CONF_DIR), config_name=root, version_base="1.3")(job)()
        if failures:
            _end_of_failed_sweep(failures)


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


def _run_job(root: str, body: Callable[[Any], float | None], failures: Counter[str], node: Any) -> float | None:
    """One job of a sweep, or the only one: options made typed and checked, then the script's body.

    The errors of a sweep that runs here are counted in `failures`, each printed once; the other jobs follow.
    """
    try:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            explain(Path(HydraConfig.get().sweep.dir), SWEEPS)
        config: Any = to_typed(node, ROOTS[root])
        check_files(config)
        for name, url in urls_in(config):
            from pipeline.core.object_store import check_url  # here: pyarrow is slow to load, and most need none

            check_url(url, name, writing=root == "capture")
        with _place_errors():
            return body(config)
    except Stopped as stopped:
        return _after_stop(stopped)
    except (InputError, RunFailed) as error:  # here, before Hydra adds its own words
        if HydraConfig.get().mode != RunMode.MULTIRUN:
            exit_with_error(error)
        if not failures[str(error)]:
            print(f"error: {error}", file=sys.stderr)
        failures[str(error)] += 1
        choices = HydraConfig.get().runtime.choices
        if (choices["hydra/launcher"], choices["hydra/sweeper"]) == ("basic", "basic"):
            return None  # `hydra_main` ends the process; Hydra would print all overrides and the error once more
        raise


def _end_of_failed_sweep(failures: Counter[str]) -> NoReturn:
    """End a sweep some of whose jobs failed: how many did, and how often the same reason was found."""
    repeated = [f"{count} for the same reason ({error.partition(':')[0]})" for error, count in failures.items()]
    num_failed = failures.total()
    shown = f", {', '.join(repeated)}" if num_failed > len(failures) else ""
    exit_with_error(RunFailed(f"{num_failed} of the sweep's jobs failed{shown}; the reasons stand above"))


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


def _after_stop(stopped: Stopped) -> float | None:
    """What a request to stop means beyond its run: Hydra's basic launcher, which waits here, starts no further run.

    It catches every Exception and would go on; SystemExit ends it. Another launcher may have sent its runs to other
    processes and machines: it sees a failed run, or the result of a finished one.
    """
    job = HydraConfig.get()
    if job.mode == RunMode.MULTIRUN and job.runtime.choices["hydra/launcher"] == "basic":
        print("the sweep ends here, as requested; the same command continues with its other runs", file=sys.stderr)
        sys.exit(EXIT_STOPPED)
    if stopped.is_finished:
        return stopped.score
    if job.mode != RunMode.MULTIRUN:
        sys.exit(EXIT_STOPPED)
    raise stopped


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
