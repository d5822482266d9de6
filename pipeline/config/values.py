"""The value that the command line gives an option, checked against the option's type before Hydra composes anything."""

from __future__ import annotations

import difflib
from typing import Any, get_args, get_origin

from hydra.core.override_parser.types import ChoiceSweep, Override

from pipeline.config.options import choices_of, without_null
from pipeline.core.types import InputError

KINDS = {int: "a whole number", float: "a number", bool: "true or false"}
TRUTHS = ("true", "false", "yes", "no", "on", "off", "1", "0", "y", "n")  # what OmegaConf reads as a truth value


def check_values(name: str, hint: Any, override: Override) -> None:
    """Reject a value, or one of those to sweep over, that does not fit the option's type: a name, a number, a list."""
    given = override.value()
    if override.is_sweep_override():
        if not isinstance(given, ChoiceSweep):
            return  # a range or a glob: Hydra checks it
        if get_origin(without_null(hint)[0]) is list and not any(isinstance(item, list) for item in given.list):
            shown = ",".join(map(str, given.list))
            raise InputError(f"{name}: expected a list, found {shown}; write '{name}=[{shown}]'")
        for value in given.list:
            _check_value(name, hint, value)
        return
    _check_value(name, hint, given)


def _check_value(name: str, hint: Any, value: Any) -> None:
    kind, is_optional = without_null(hint)
    text = str(getattr(value, "text", value))  # a quoted string holds its text
    if "${" in text or text == "???":
        return  # an interpolation is checked where it leads
    if value is None:
        if not is_optional:
            raise InputError(f"{name}: expected {_expected(kind)}, found null; it cannot be left out")
    elif get_origin(kind) is list:
        inner = get_args(kind)[0]
        if not isinstance(value, list):
            raise InputError(f"{name}: expected a list{_of_choices(inner)}, found {text}; write '{name}=[{text}]'")
        for item in value:
            _check_value(name, inner, item)
    elif choices_of(kind):
        if text not in choices_of(kind):
            near = difflib.get_close_matches(text, choices_of(kind), n=1)
            hint_of_name = f"; did you mean {near[0]}?" if near else ""
            raise InputError(f"{name}: expected {_expected(kind)}, found {text!r}{hint_of_name}")
    elif kind in KINDS and not _is_readable(kind, text):
        raise InputError(f"{name}: expected {KINDS[kind]}, found {text!r}; write {name}={EXAMPLES[kind]} or the like")


EXAMPLES = {int: "100", float: "0.5", bool: "true"}


def _expected(kind: Any) -> str:
    if choices_of(kind):
        return f"one of {' | '.join(choices_of(kind))}"
    return KINDS.get(kind, "a list" if get_origin(kind) is list else "a value")


def _of_choices(inner: Any) -> str:
    return f" of {' | '.join(choices_of(inner))}" if choices_of(inner) else ""


def _is_readable(kind: type, text: str) -> bool:
    if kind is bool:
        return text.lower() in TRUTHS
    try:
        kind(text)
    except ValueError:
        return False
    return True
