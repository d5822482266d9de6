"""The command line: Hydra composes `conf/`, the result becomes a typed configuration, a stage is called."""

from __future__ import annotations

import contextlib
import difflib
import errno
import functools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import MISSING
from omegaconf.errors import OmegaConfBaseException

from pipeline.config.options import RENAMED_FILES, RENAMED_OPTIONS, RENAMED_VALUES, options, to_plain, to_typed
from pipeline.config.study import ROOTS, Study, command_layers, experiment_layers, read_study, without_groups
from pipeline.config.validate import check_files, urls_in
from pipeline.core.stopping import EXIT_STOPPED, Stopped, interrupt, stop_signals_handled_by
from pipeline.core.types import InputError, RunFailed

PACKAGE = Path(__file__).resolve().parents[1]
CONF_DIR = PACKAGE / "conf"
PLACE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)  # the place is to blame, and not this code


def register(study: Study | None = None, *, chosen: Iterable[str] = ()) -> None:
    """Make known to Hydra what is not a file of `conf/`: the schemas, and the layers of options of a study.

    Every conf root reads `<root>_schema` and `<root>_study`, every experiment `study_of/<experiment>`; without a study
    the last two are empty. Groups `chosen` on the command line replace what the study says of them.
    """
    store, groups = ConfigStore.instance(), set(chosen)
    for root, schema in ROOTS.items():
        store.store(name=f"{root}_schema", node=schema)
    for root, layer in command_layers(study).items():
        store.store(name=f"{root}_study", node=without_groups(layer, groups))
    for experiment, layer in experiment_layers(study).items():
        store.store(
            group="study_of", name=experiment, node=without_groups(layer, groups), package="_global_", provider="study"
        )


def take_study(arguments: list[str]) -> tuple[Study | None, list[str]]:
    """The study that `study=NAME` or `study=FILE.yaml` names, and the arguments without it."""
    given = [argument.removeprefix("study=") for argument in arguments if argument.startswith("study=")]
    if not given:
        return None, arguments
    if len(given) > 1 or "," in given[0]:
        raise InputError(f"study: expected one study, found {given}; run one after the other")
    rest = [argument for argument in arguments if not argument.startswith("study=")]
    return read_study(find_study(given[0], config_dir(arguments))), rest


def find_study(name: str, folder: str | None) -> Path:
    """The file of a study: the file itself, else `study/NAME.yaml` in `folder` or in this project's `conf`."""
    if name.endswith((".yaml", ".yml")):
        places = [Path(name)]
    else:
        places = [place / "study" / f"{name}.yaml" for place in ([Path(folder)] if folder else []) + [CONF_DIR]]
    for place in places:
        if place.is_file():
            return place
    known = sorted({path.stem for place in places for path in place.parent.glob("*.yaml")})
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known) or 'none'}"
    raise InputError(
        f"study: expected a file {' or '.join(map(str, places))}, found none; {hint}; `scripts/study.py init` writes one"
    )


def config_dir(arguments: list[str]) -> str | None:
    """The folder of Hydra's flag --config-dir, where a user keeps studies and experiments."""
    for argument, following in zip(arguments, [*arguments[1:], None], strict=True):
        if argument in ("--config-dir", "-cd"):
            return following
        if argument.startswith("--config-dir="):
            return argument.removeprefix("--config-dir=")
    return None


def chosen_groups(arguments: list[str]) -> list[str]:
    """The groups that are chosen on the command line, as in loss=weak."""
    return [name for name in ("loss", "deepspeed", "adapter") if any(one.startswith(f"{name}=") for one in arguments)]


def help_text(root: str, story: str) -> str:
    """What `--help` prints: the story of the script, its groups with their choices, every option."""
    lines = [story.strip(), "", "Groups (name=choice):"]
    for group, choices in _groups().items():
        lines.append(f"  {group:<14} {', '.join(choices)}")
    lines += ["", "Options (name=value; -m and a comma-separated list sweep over values):"]
    for name, default, help in options(ROOTS[root]):
        shown = "must be given" if default is MISSING else to_plain(default)
        lines.append(f"  {name} = {shown}\n      {help}")
    return "\n".join([*lines, "", "Hydra's own flags: --hydra-help.  The configuration as composed: --cfg job."])


def _groups() -> dict[str, list[str]]:
    return {
        folder.name: sorted(path.stem for path in folder.glob("*.yaml"))
        for folder in sorted(CONF_DIR.iterdir())
        if folder.is_dir()
    }


# ------------------------------------------------------------------------------------------- checks


def check_override_names(root: str, arguments: list[str]) -> None:
    """Reject an option that does not exist, naming the nearest that do, before Hydra composes anything."""
    known = {name for name, _, _ in options(ROOTS[root])}
    nodes = {name[:i] for name in known for i, letter in enumerate(name) if letter == "."}
    free_form = [name for name, default, _ in options(ROOTS[root]) if default == {}]  # such as deepspeed.overrides
    overrides = [argument for argument in arguments if "=" in argument and not argument.startswith("--")]
    for override in OverridesParser.create().parse_overrides(overrides):
        key = override.key_or_group.replace("/", ".")
        check_renamed(key, str(override.get_value_element_as_str()) if override.is_sweep_override() is False else "")
        if key in _groups() and not override.is_sweep_override() and override.value() is None:
            name = override.package or key
            raise InputError(f"{override.input_line}: expected one of {_groups()[key]}; for none use {name}=null")
        if key.split(".")[0] == "hydra" or key in known | nodes or key in _groups():
            continue
        if any(key.startswith(f"{name}.") for name in free_form):
            continue
        near = difflib.get_close_matches(key, sorted(known | nodes), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "--help lists all options"
        raise InputError(f"expected the name of an option, found {key!r}; {hint}")


def check_renamed(key: str, value: str) -> None:
    """Reject an old name of an option or of a value, naming the new one."""
    for old, new in RENAMED_OPTIONS.items():
        if key == old or key.startswith(f"{old}."):
            raise InputError(f"expected {new + key[len(old) :]}, found its old name {key}; use the new one")
    if (renamed := RENAMED_VALUES.get(key, {}).get(value)) is not None:
        raise InputError(f"{key}: expected {renamed}, found its old name {value}; use the new one")


def check_checkout() -> None:
    """Reject a script of one checkout that would run the code and the configuration of another."""
    code = Path(sys.argv[0]).resolve().parents[1] / "pipeline"
    if Path(sys.argv[0]).parent.name == "scripts" and code.is_dir() and code != PACKAGE:
        raise InputError(
            f"expected to run the code of {code}, found {PACKAGE} installed in this environment; use the environment "
            f"of that checkout (its scripts/setup makes one), or set PYTHONPATH={code.parent}"
        )


# --------------------------------------------------------------------------------------------- main


def hydra_main(root: str, story: str, body: Callable[[Any], float | None]) -> None:
    """Run a script: compose `conf/<root>.yaml` with the command line, make it typed, call `body`.

    An InputError ends the process with exit code 2 and its message alone, a signal that asks to stop with 75.
    """
    if {"--help", "-h"} & set(sys.argv[1:]):
        register()
        with contextlib.suppress(BrokenPipeError):
            print(help_text(root, story), flush=True)
        return
    # Hydra would wrap errors in its own messages; this way ours reach the user
    os.environ["HYDRA_FULL_ERROR"] = "1"
    with _exit_codes(), stop_signals_handled_by(interrupt):
        check_checkout()
        study, sys.argv[1:] = take_study(sys.argv[1:])
        register(study, chosen=chosen_groups(sys.argv[1:]))
        check_override_names(root, sys.argv[1:])
        job = functools.partial(_run_job, root, body)
        functools.update_wrapper(job, _run_job)  # Hydra reads the name of the function
        hydra.main(config_path=str(CONF_DIR), config_name=root, version_base="1.3")(job)()


@contextlib.contextmanager
def _exit_codes() -> Iterator[None]:
    """End the process with one line and an exit code where the reason lies in the input, the disk or a request."""
    try:
        yield
    except (InputError, RunFailed) as error:
        exit_with_error(error)
    except (OmegaConfBaseException, hydra.errors.HydraException) as error:
        cause = "" if error.__cause__ is None else f": {str(error.__cause__).splitlines()[0]}"
        exit_with_error(InputError(f"{error}{cause}{_renamed_hint(str(error))}"))
    except AssertionError as error:  # OmegaConf's answer to options below a null
        if "Unexpected type for root: NoneType" not in str(error):
            raise
        given = " ".join(sys.argv[1:])
        exit_with_error(
            InputError(
                f"expected options of groups that are chosen, found one of a null in {given}; choose it, as "
                "in adapter=lora or text@gold=own"
            )
        )
    except KeyboardInterrupt as request:
        print(f"stopped by {request}; the same command continues with what is left", file=sys.stderr)
        sys.exit(EXIT_STOPPED)
    except Stopped:
        sys.exit(EXIT_STOPPED)


def _run_job(root: str, body: Callable[[Any], float | None], node: Any) -> float | None:
    """One job of a sweep, or the only one: options made typed and checked, then the script's body."""
    try:
        config: Any = to_typed(node, ROOTS[root])
        check_files(config)
        for name, url in urls_in(config):
            from pipeline.core.object_store import check_url  # here: pyarrow is slow to load, and most need none

            check_url(url, name, writing=root == "capture")
        with _place_errors():
            return body(config)
    except Stopped as stopped:
        return _after_stop(stopped)
    except InputError as error:  # here, before Hydra adds its own words; a sweep continues with its other runs
        if HydraConfig.get().mode != RunMode.MULTIRUN:
            exit_with_error(error)
        print(f"error: {error}", file=sys.stderr)
        raise


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


def _renamed_hint(message: str) -> str:
    """For a YAML of the user's own that holds an old name."""
    names = {old.rsplit(".", 1)[-1]: new for old, new in RENAMED_OPTIONS.items()} | RENAMED_FILES
    return "".join(f"; {old} is called {new} now" for old, new in names.items() if old in message)


def pop_action(actions: Mapping[str, str], story: str) -> str:
    """Take the first word off the command line; `--help` passes, a missing or unknown one ends with exit code 2.

    `actions` maps each action to one sentence.
    """
    word = next(iter(sys.argv[1:]), "")
    if word in actions:
        return sys.argv.pop(1)
    if {"--help", "-h"} & set(sys.argv[1:]):
        return ""
    listed = "\n".join(f"  {name:<8} {sentence}" for name, sentence in actions.items())
    found = f"{word!r}" if word else "nothing"
    error = f"expected an action as the first word, found {found}; give one of these, or --help:\n{listed}"
    return exit_with_error(InputError(error))


def exit_with_error(error: Exception) -> NoReturn:
    """End the process with the message alone."""
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
