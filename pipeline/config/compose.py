"""What Hydra composes beside the files of `conf/`: the schemas, and the layers of options of a study."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import get_type_hints

from hydra.core.config_store import ConfigStore

from pipeline.config.commands import ROOTS, StudyCommand, StudyConfig
from pipeline.config.groups import CONF_DIR
from pipeline.config.layers import command_layers, experiment_layers, without_groups
from pipeline.config.study import Study, read_study
from pipeline.core.types import InputError

SECTION = "section"  # a group whose one choice, used, turns a section that is null into its declared defaults


def register(study: Study | None = None, *, chosen: Iterable[str] = (), roots: Iterable[str] = tuple(ROOTS)) -> None:
    """Make known to Hydra what is not a file of `conf/`: the schemas, and the layers of options of a study.

    Every conf root reads `<root>_schema` and `<root>_study`, every experiment `study_of/<experiment>`; without a study
    the last two are empty. Groups `chosen` on the command line replace what the study says of them. Only the schemas of
    `roots` become known: each takes time.
    """
    store, groups = ConfigStore.instance(), set(chosen)
    for name, schema in ((f"{root}_schema", ROOTS[root]) for root in roots):
        if f"{name}.yaml" not in store.repo:
            store.store(name=name, node=schema)
    store.store(group=SECTION, name="used", node={})
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
    return open_study(given[0], config_dir(arguments)), rest


def open_study(given: str, folder: str | None) -> Study:
    """The study of a name or file as it is given on the command line."""
    return read_study(find_study(given, folder), given=given, config_dir=folder)


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
        f"study: expected a file {' or '.join(map(str, places))}, found none; {hint}; scripts/study.py init writes one"
    )


def config_dir(arguments: list[str]) -> str | None:
    """The folder of Hydra's flag --config-dir, where a user keeps studies and experiments."""
    for argument, following in zip(arguments, [*arguments[1:], None], strict=False):
        if argument in ("--config-dir", "-cd"):
            return following
        if argument.startswith("--config-dir="):
            return argument.removeprefix("--config-dir=")
    return None


def chosen_groups(arguments: list[str]) -> list[str]:
    """The groups that are chosen on the command line, as in loss=weak."""
    return [name for name in ("loss", "deepspeed", "adapter") if any(one.startswith(f"{name}=") for one in arguments)]


def study_arguments(arguments: list[str], options: type[StudyCommand] = StudyConfig) -> list[str]:
    """The arguments of scripts/study.py, or of another script with more `options`, as Hydra reads them.

    `seeds=1,2` is a list and no sweep; options that only scripts/train.py has are collected in `overrides`.
    """
    hints = get_type_hints(options)
    lists = {name for name, hint in hints.items() if "list" in str(hint)}
    kept: list[str] = []
    of_students: list[str] = []
    for argument in arguments:
        name, is_option, value = argument.partition("=")
        if name == "hydra/launcher":
            raise InputError(
                f"{argument}: expected hydra_launcher={value}, which scripts/study.py gives to its students"
            )
        if not is_option or argument.startswith("-") or name.startswith("hydra") or name == "study":
            kept.append(argument)
        elif name.lstrip("+").partition(".")[0] not in hints:
            of_students.append(argument)
        elif name in lists and not value.startswith("[") and value != "null":
            items = value.split(";" if name == "grid" else ",")
            kept.append(f"{name}={quoted(items)}")
        else:
            kept.append(argument)
    return kept + ([f"overrides={quoted(of_students)}"] if of_students else [])


def quoted(values: Iterable[str]) -> str:
    """A list of strings in Hydra's grammar."""
    return "[" + ",".join("'" + value.replace("'", "\\'") + "'" for value in values) + "]"
