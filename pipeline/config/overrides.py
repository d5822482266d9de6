"""What stands on the command line, checked before Hydra composes anything."""

from __future__ import annotations

import difflib

from hydra.core.override_parser.overrides_parser import OverridesParser

from pipeline.config.groups import groups
from pipeline.config.options import RENAMED_FILES, RENAMED_OPTIONS, RENAMED_VALUES, options
from pipeline.config.study import ROOTS
from pipeline.core.types import InputError


def check_override_names(root: str, arguments: list[str]) -> None:
    """Reject an option that does not exist, naming the nearest that do, before Hydra composes anything."""
    known = {name for name, _, _ in options(ROOTS[root])}
    nodes = {name[:i] for name in known for i, letter in enumerate(name) if letter == "."}
    free_form = [name for name, default, _ in options(ROOTS[root]) if default == {}]  # such as deepspeed.overrides
    overrides = [argument for argument in arguments if "=" in argument and not argument.startswith("--")]
    for override in OverridesParser.create().parse_overrides(overrides):
        key = override.key_or_group.replace("/", ".")
        check_renamed(key, str(override.get_value_element_as_str()) if override.is_sweep_override() is False else "")
        if key in groups() and not override.is_sweep_override() and override.value() is None:
            name = override.package or key
            raise InputError(f"{override.input_line}: expected one of {groups()[key]}; for none use {name}=null")
        if key.split(".")[0] == "hydra" or key in known | nodes or key in groups():
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


def renamed_hint(message: str) -> str:
    """For a YAML of the user's own that holds an old name."""
    names = {old.rsplit(".", 1)[-1]: new for old, new in RENAMED_OPTIONS.items()} | RENAMED_FILES
    return "".join(f"; {old} is called {new} now" for old, new in names.items() if old in message)
