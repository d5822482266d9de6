"""The command line: Hydra composes `conf/`, the result becomes a typed configuration, a stage is called."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import MISSING
from omegaconf.errors import OmegaConfBaseException

from pipeline.config.options import options, to_plain, to_typed
from pipeline.config.schema import ROOTS
from pipeline.config.validate import check_files, urls_in
from pipeline.core.types import InputError, RunFailed

CONF_DIR = Path(__file__).resolve().parents[2] / "conf"


def register() -> None:
    """Make the dataclasses known to Hydra as `<root>_schema`; every conf root begins with its own."""
    for name, schema in ROOTS.items():
        ConfigStore.instance().store(name=f"{name}_schema", node=schema)


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


def check_override_names(root: str, arguments: list[str]) -> None:
    """Refuse an option that does not exist, naming the nearest that do, before Hydra composes anything."""
    known = {name for name, _, _ in options(ROOTS[root])}
    nodes = {name[:i] for name in known for i, letter in enumerate(name) if letter == "."}
    for override in OverridesParser.create().parse_overrides(
        [a for a in arguments if "=" in a and not a.startswith("--")]
    ):
        key = override.key_or_group.replace("/", ".")
        if key.split(".")[0] == "hydra" or key in known | nodes or key in _groups():
            continue
        if any(key.startswith(f"{name}.") for name, default, _ in options(ROOTS[root]) if default == {}):
            continue  # inside a free-form dict such as deepspeed.overrides
        near = difflib.get_close_matches(key, sorted(known | nodes), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "--help lists all options"
        raise InputError(f"expected the name of an option, found {key!r}; {hint}")


def hydra_main(root: str, story: str, body: Callable[[Any], float | None]) -> None:
    """Run a script: compose `conf/<root>.yaml` with the command line, make it typed, call `body`.

    An InputError ends the process with exit code 2 and its message alone.
    """
    register()
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(help_text(root, story))
        return

    def job(node: Any) -> float | None:
        try:
            config: Any = to_typed(node, ROOTS[root])
            check_files(config)
            for name, location in urls_in(config):
                from pipeline.core.object_store import (
                    check_url,  # here: pyarrow is slow to load, and most need none
                )

                check_url(location, name, writing=root == "capture")
            return body(config)
        except InputError as error:  # here, before Hydra adds its own words; a sweep goes on with its other runs
            if HydraConfig.get().mode != RunMode.MULTIRUN:
                exit_with_error(error)
            print(f"error: {error}", file=sys.stderr)
            raise

    # Hydra would fold errors into its own words; this way ours reach the person who reads them.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        check_override_names(root, sys.argv[1:])
        hydra.main(config_path=str(CONF_DIR), config_name=root, version_base="1.3")(job)()
    except (InputError, RunFailed, OmegaConfBaseException, hydra.errors.HydraException) as error:
        exit_with_error(error)
    except AssertionError as error:  # how OmegaConf says it
        if "Unexpected type for root: NoneType" not in str(error):
            raise
        given = " ".join(sys.argv[1:])
        exit_with_error(
            InputError(
                f"expected options of groups that are chosen, found one of a null in {given}; choose it, as "
                "in adapter=lora or text@gold=own"
            )
        )
    except KeyboardInterrupt:
        print("interrupted; the same command goes on with what is left", file=sys.stderr)
        sys.exit(130)


def pop_action(actions: Mapping[str, str], story: str) -> str:
    """Take the first word off the command line; `--help` passes, no or an unknown action ends with exit code 2.

    `actions` is each action with its sentence.
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
