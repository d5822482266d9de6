"""What an option is: declared with one sentence of help, typed, saved, and hashed where it decides a result."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import field
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline.core.types import InputError

T = TypeVar("T")

# names that were in use before -> what they are called now: refused on the command line, understood in old run folders
RENAMED_OPTIONS = {"mirrors": "trackers", "loss.kd.overtaken": "loss.kd.adaptive_weight"}
RENAMED_VALUES = {"loss.hard.take": {"said": "generated"}}
RENAMED_FILES = {"quiet": "hydra_defaults"}


def option(default: Any, help: str, *, result: bool = True, content: bool = False, address: bool = False) -> Any:
    """A dataclass field with its help sentence; `result`: whether it changes what a run produces."""
    metadata = {"help": help, "result": result, "content": content, "address": address}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def to_typed(node: Any, schema: type[T]) -> T:
    """The composed configuration as its dataclass; InputError where a required option is missing."""
    missing = sorted(key for key in OmegaConf.missing_keys(node) if not key.startswith("hydra."))
    if missing:
        hints = "\n".join(f"  {key}: {_help_of(schema, key)}" for key in missing)
        raise InputError(
            "expected a value for each of these options, found none; give them as name=value, or a study that has them "
            f"as study=NAME:\n{hints}"
        )
    config = OmegaConf.to_object(node)
    assert isinstance(config, schema)
    return config


def save_config(config: Any, path: Path) -> None:
    """Write a typed configuration as YAML, every option with its resolved value."""
    OmegaConf.save(OmegaConf.structured(config), path)


def load_config(path: Path, schema: type[T]) -> T:
    """Read what `save_config` wrote; names of an older version are read as what they are called now.

    InputError where it has options that this version does not know.
    """
    loaded: Any = OmegaConf.load(path)
    for old, new in RENAMED_OPTIONS.items():
        if (value := OmegaConf.select(loaded, old)) is not None:
            OmegaConf.update(loaded, new, value)
            parent, _, name = old.rpartition(".")
            holder: Any = OmegaConf.select(loaded, parent) if parent else loaded
            del holder[name]
    for option_name, values in RENAMED_VALUES.items():
        if (value := OmegaConf.select(loaded, option_name)) in values:
            OmegaConf.update(loaded, option_name, values[value])
    try:
        return to_typed(OmegaConf.merge(OmegaConf.structured(schema), loaded), schema)
    except OmegaConfBaseException as error:
        problem = str(error).splitlines()[0]
        raise InputError(
            f"{path}: expected the options of this version, found others ({problem}); read it with the version that "
            "wrote it"
        ) from error


def identity_options(config: Any) -> dict[str, Any]:
    """The options that decide a result, as plain data: without files and without options marked `result=False`."""
    chosen: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if not item.metadata["result"] or item.metadata["content"]:
            continue
        chosen[item.name] = identity_options(value) if dataclasses.is_dataclass(value) else to_plain(value)
    return chosen


def to_plain(value: Any) -> Any:
    """An option's value as JSON data: an enum by its name."""
    if isinstance(value, Enum):
        return value.name
    return [to_plain(item) for item in value] if isinstance(value, list) else value


def options(schema: type, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Every leaf option below a dataclass as (dotted name, default, help)."""
    hints = get_type_hints(schema)
    for item in dataclasses.fields(schema):
        inner = _dataclass_in(hints[item.name])
        if inner is not None:
            yield from options(inner, f"{prefix}{item.name}.")
            continue
        made = item.default_factory
        default = made() if made is not dataclasses.MISSING else item.default
        yield prefix + item.name, default, item.metadata["help"]


def option_types(schema: type, prefix: str = "") -> dict[str, Any]:
    """The type of every leaf option below a dataclass, by its dotted name."""
    found: dict[str, Any] = {}
    hints = get_type_hints(schema)
    for item in dataclasses.fields(schema):
        inner = _dataclass_in(hints[item.name])
        name = prefix + item.name
        found |= {name: hints[item.name]} if inner is None else option_types(inner, f"{name}.")
    return found


def sections(schema: type, prefix: str = "") -> Iterator[tuple[str, bool, str]]:
    """Every dataclass below a dataclass as (dotted name, whether it may be null, help)."""
    hints = get_type_hints(schema)
    for item in dataclasses.fields(schema):
        inner = _dataclass_in(hints[item.name])
        if inner is not None:
            yield prefix + item.name, type(None) in get_args(hints[item.name]), item.metadata["help"]
            yield from sections(inner, f"{prefix}{item.name}.")


def without_null(hint: Any) -> tuple[Any, bool]:
    """A type without `| None`, and whether that was in it."""
    inner = [candidate for candidate in get_args(hint) if candidate is not type(None)]
    is_optional = type(None) in get_args(hint)
    return (inner[0], True) if is_optional else (hint, False)


def choices_of(hint: Any) -> list[str]:
    """The names of an enum, alone or in a list; none of another type."""
    kind, _ = without_null(hint)
    if get_origin(kind) is list:
        kind = get_args(kind)[0]
    return [member.name for member in kind] if isinstance(kind, type) and issubclass(kind, Enum) else []


def _dataclass_in(hint: Any) -> type | None:
    candidates = get_args(hint) if get_origin(hint) is Union or "|" in str(hint) else (hint,)
    return next((c for c in candidates if dataclasses.is_dataclass(c) and isinstance(c, type)), None)


def _help_of(schema: type, dotted: str) -> str:
    return next((help for name, _, help in options(schema) if name == dotted), "a group of options; choose one")
