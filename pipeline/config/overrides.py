"""What stands on the command line: its names and values are checked before Hydra composes anything, and what follows
from an option is added."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from hydra import compose
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from pipeline.config.commands import ROOTS
from pipeline.config.compose import SECTION, chosen_groups, config_dir, register
from pipeline.config.groups import groups, places
from pipeline.config.options import (
    RENAMED_FILES,
    RENAMED_OPTIONS,
    RENAMED_VALUES,
    option_types,
    options,
    sections,
    to_typed,
)
from pipeline.config.study import Study
from pipeline.config.synonyms import SYNONYMS, nearest_options
from pipeline.config.values import check_values
from pipeline.core.types import InputError

FLAGS_WITH_VALUE = (
    "--config-dir",
    "-cd",
    "--config-name",
    "-cn",
    "--config-path",
    "-cp",
    "--cfg",
    "-c",
    "--package",
    "-p",
)
"""Flags of Hydra that a value follows."""
EXCLUSIVE = (("steps", "epochs"), ("epochs", "steps"))  # the given one of two replaces the other


def completed_overrides(root: str, arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments of a script with those that follow from them, and a note on each that replaces another option.

    Flags come first: argparse, which Hydra uses, takes no options on both sides of one.
    An option of a section that may be null, as gold.files, turns the section on. Of steps and epochs the given one
    replaces the other. InputError for a wrong name or value, and for options that contradict each other.
    """
    types = option_types(ROOTS[root])
    parsed = check_override_names(root, arguments)
    names = [override.key_or_group.replace("/", ".") for override in parsed.values()]
    optional = [name for name, may_be_null, _ in sections(ROOTS[root]) if may_be_null]
    completed, notes = list[str](), list[str]()
    turned_on = {one.package for one in parsed.values() if one.key_or_group == SECTION}  # of a completed command line
    for argument in arguments:
        key = parsed[argument].key_or_group if argument in parsed else ""
        for section in optional:
            if key.startswith(f"{section}.") and section not in turned_on:
                _check_not_null(section, argument, parsed.values())
                turned_on.add(section)
                completed.append(f"+{SECTION}@{section}=used")
        completed.append(argument)
        for given, other in EXCLUSIVE:
            is_given = key == given and argument in parsed and not _is_null(parsed[argument])
            if is_given and other not in names and other in types:
                completed.append(f"{other}=null")
                notes.append(f"{argument} replaces {other}: {other}=null")
    return flags_first(completed), notes


def flags_first(arguments: Sequence[str]) -> list[str]:
    """The flags with their values, then the options, each in the order in which they are given."""
    flags, others = flags_and_options(arguments)
    return flags + others


def flags_and_options(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The flags with their values, and the options."""
    flags, others = list[str](), list[str]()
    for before, word in zip(["", *arguments], arguments, strict=False):
        (flags if word.startswith("-") or before in FLAGS_WITH_VALUE else others).append(word)
    return flags, others


def compose_job(root: str, overrides: Iterable[str], study: Study | None = None) -> Any:
    """The typed options of another command, from within a command that Hydra runs.

    A group chosen among the overrides, as in loss=fading, replaces what `study` holds of it; None: the layers that
    Hydra knows are taken as they are.
    """
    completed, _ = completed_overrides(root, [*overrides])
    if study is None:
        return to_typed(compose(root, overrides=completed), ROOTS[root])
    register(study, chosen=chosen_groups(completed), roots=[root])
    try:
        return to_typed(compose(root, overrides=completed), ROOTS[root])
    finally:
        register(study, roots=[root])


def _check_not_null(section: str, argument: str, overrides: Iterable[Override]) -> None:
    """Reject an option of a section that the same command line sets to null."""
    for override in overrides:
        is_no_adapter = override.key_or_group == "adapter" and section.endswith("adapter")
        is_none = is_no_adapter and override.value() == "none"
        if is_none or (override.key_or_group == section and _is_null(override)):
            raise InputError(
                f"{argument}: expected {section} to be in use, found {override.input_line}; leave out one of the two"
            )


def _is_null(override: Override) -> bool:
    return not override.is_sweep_override() and override.value() is None


# --------------------------------------------------------------------------------- names and values


def check_override_names(root: str, arguments: Sequence[str]) -> dict[str, Override]:
    """Reject an option that does not exist, naming those that may be meant, or a value that does not fit its type.

    Returns the overrides among the arguments, parsed.
    """
    for argument in arguments:
        _check_dashes(root, argument)
    given = [argument for argument in arguments if "=" in argument and not argument.startswith("-")]
    parsed = dict(zip(given, OverridesParser.create().parse_overrides(given), strict=True))
    known_groups = groups(config_dir([*arguments])) | {SECTION: ["used"]}
    for override in parsed.values():
        _check_override(root, override, known_groups)
    return parsed


def _check_override(root: str, override: Override, known_groups: dict[str, list[str]]) -> None:
    key = override.key_or_group.replace("/", ".")
    types, free_form = option_types(ROOTS[root]), [n for n, default, _ in options(ROOTS[root]) if default == {}]
    check_renamed(key, "" if override.is_sweep_override() else str(override.get_value_element_as_str()))
    if key in known_groups:
        if _is_null(override):
            name = override.package or key
            raise InputError(f"{override.input_line}: expected one of {known_groups[key]}; for none use {name}=null")
        if override.package is None and (used := places(root, key)):
            listed = " or ".join(f"{place}=" for place in used)
            raise InputError(f"{override.input_line}: expected the place that takes it, found none; write {listed}")
    elif key in types:
        if not override.is_delete():
            check_values(key, types[key], override)
    elif key in (known := {name for name, *_ in sections(ROOTS[root])}):
        if not override.is_sweep_override() and isinstance(override.value(), (str, int, float)):
            below = next(name for name in types if name.startswith(f"{key}."))
            raise InputError(f"{override.input_line}: expected an option below {key}; write {below}= or the like")
    elif key.split(".")[0] != "hydra" and not any(key.startswith(f"{name}.") for name in free_form):
        _reject_name(root, key, sorted(types.keys() | known))


def _reject_name(root: str, key: str, known: Sequence[str]) -> None:
    near = nearest_options(key, known)
    others = [name for name, schema in ROOTS.items() if key in option_types(schema)]
    hint = f"did you mean {' or '.join(near)}?" if near else "--help lists all options"
    if others and not any(name.endswith(f".{key}") for name in near):  # else it is meant for this script
        scripts = " and ".join(f"scripts/{name}.py" for name in others)
        hint = f"it is an option of {scripts}, and not of this script; {hint}"
    raise InputError(f"expected the name of an option, found {key!r}; {hint}")


def _check_dashes(root: str, argument: str) -> None:
    """Reject an option of this project that is written with dashes, as --steps=10."""
    name, _, value = argument.lstrip("-").partition("=")
    name = name.replace("-", "_")
    if argument.startswith("-") and (name in option_types(ROOTS[root]) or name in SYNONYMS):
        meant = name if name in option_types(ROOTS[root]) else nearest_options(name, [*option_types(ROOTS[root])])[:1]
        shown = meant if isinstance(meant, str) else "".join(meant) or name
        raise InputError(f"{argument}: expected options without dashes; write {shown}={value or 'VALUE'}")


def check_renamed(key: str, value: str) -> None:
    """Reject an old name of an option or of a value, naming the new one."""
    for old, new in RENAMED_OPTIONS.items():
        if key == old or key.startswith(f"{old}."):
            raise InputError(f"expected {new + key[len(old) :]}, found its old name {key}; use the new one")
    if (renamed := RENAMED_VALUES.get(key, {}).get(value)) is not None:
        raise InputError(f"{key}: expected {renamed}, found its old name {value}; use the new one")


def renamed_hint(message: str) -> str:
    """For a YAML of the user's own that holds an old name."""
    names = {old.rsplit(".", 1)[-1]: new for old, new in RENAMED_OPTIONS.items()} | RENAMED_FILES
    return "".join(f"; {old} is called {new} now" for old, new in names.items() if old in message)
