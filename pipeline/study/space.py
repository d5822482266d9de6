"""The space of a search: options with the values that it may choose."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.config.layers import option_text
from pipeline.core.types import InputError

Values = Mapping[str, Any]
TEMPERATURE = "loss.kd.temperature"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """The values that a search may choose for one option."""

    values: tuple[Any, ...] = ()
    """To choose from; empty: a range."""
    low: float = 0.0
    high: float = 0.0
    log: bool = False

    @property
    def ends(self) -> tuple[Any, Any]:
        """The two values that are checked before the first run."""
        return (self.values[0], self.values[-1]) if self.values else (self.low, self.high)


def read_space(search: Mapping[str, Any], temperatures: Sequence[float], prefix: str = "") -> dict[str, Axis]:
    """The options to choose and their values, by name; InputError for an entry that is neither a range nor a list."""
    found: dict[str, Axis] = {}
    for key, value in search.items():
        name = f"{prefix}{key}"
        if value is None and name == TEMPERATURE:
            value = list(temperatures)
        if isinstance(value, Mapping) and not {"low", "high"} & value.keys():
            found |= read_space(value, temperatures, f"{name}.")
        else:
            found[name] = _axis(name, value)
    if not found and not prefix:
        raise InputError("search: expected options to choose, found none; use search=kd, or write search/NAME.yaml")
    return found


def _axis(name: str, value: Any) -> Axis:
    if isinstance(value, list) and value:
        return Axis(values=tuple(value))
    if isinstance(value, Mapping) and value.keys() <= {"low", "high", "log"} and len(value.keys() - {"log"}) == 2:
        low, high, log = value["low"], value["high"], bool(value.get("log", False))
        is_number = all(isinstance(end, (int, float)) for end in (low, high))
        if is_number and low < high and (low > 0 or not log):
            return Axis(low=low, high=high, log=log)
    raise InputError(
        f"search.{name}: expected a list of values, or {{low: NUMBER, high: a larger one}} (above 0 with log: true), "
        f"found {value!r}; correct it"
    )


def middle(space: Mapping[str, Axis]) -> dict[str, Any]:
    """One setting of the space: the first value of each option."""
    return {name: axis.ends[0] for name, axis in space.items()}


def overrides_of(values: Values) -> list[str]:
    """A setting as options of scripts/train.py; three digits are more than a score on dev can tell apart."""
    return [
        f"{name}={option_text(float(f'{value:.3g}') if isinstance(value, float) else value)}"
        for name, value in values.items()
    ]
