"""Reject contradictory options before reading any input: checks across options, and paths that match nothing."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.config.commands import AuditConfig
from pipeline.config.schema import CaptureConfig, CompletionMode, Kind, ModelConfig, Targets, TextConfig
from pipeline.core.files import is_hub_name, is_url, matching_paths
from pipeline.core.folds import parse_fold
from pipeline.core.types import InputError

MAX_KEPT = 65_535  # kept_counts of a shard is a uint16


def check_capture(config: CaptureConfig) -> None:
    """Reject contradictory options before reading any input."""
    at_least(2, window=config.window)
    at_least(1, k=config.k, draws=config.draws, records_per_shard=config.records_per_shard)
    at_least(1, batch_sequences=config.batch_sequences, num_workers=config.num_workers)
    plain_name(name=config.name)
    seeds(seed=config.seed, complete_seed=config.complete.seed)
    if config.kind is not Kind.topk and config.k + config.draws > MAX_KEPT:
        raise InputError(f"k and draws: expected a sum of at most {MAX_KEPT}, found {config.k + config.draws}")
    at_least(1, teacher_num_layers=1 if config.teacher.num_layers is None else config.teacher.num_layers)
    positive(
        lease_seconds=config.lease_seconds,
        temperatures=min(config.temperatures, default=1.0),
        log_every_seconds=config.log_every_seconds,
    )
    if config.complete.how is not CompletionMode.none and config.corpus.targets is not Targets.completion:
        raise InputError(
            f"complete.how={config.complete.how.name}: expected corpus.targets=completion, because the teacher "
            f"supervises what it generates, found {config.corpus.targets.name}"
        )
    if config.only_fold is not None:
        parse_fold(config.only_fold, "only_fold")
        if config.complete.how is not CompletionMode.none:
            raise InputError(
                f"only_fold={config.only_fold}: expected complete.how=none, because the key of a completed sequence is "
                f"known only after the teacher has run, found {config.complete.how.name}; capture all in one cache"
            )
    at_least(1, complete_max_new_tokens=config.complete.max_new_tokens, complete_batch=config.complete.batch_records)
    positive(complete_temperature=config.complete.temperature)
    if config.kind is not Kind.topk and config.temperatures != [1.0]:
        raise InputError(
            f"temperatures: expected [1.0], because a {config.kind.name} cache is exact only at T = 1, found "
            f"{config.temperatures}; use kind=topk for other temperatures"
        )
    if config.also_ids and (config.kind is not Kind.topk or config.complete.how is not CompletionMode.none):
        raise InputError(
            f"also_ids: expected kind=topk and complete.how=none, because its ids belong to positions of known "
            f"sequences, found kind={config.kind.name} and complete.how={config.complete.how.name}; leave out one"
        )
    if 1.0 not in config.temperatures:
        raise InputError(f"temperatures: expected 1.0 among them, found {config.temperatures}; add it")


def check_text(text: TextConfig, what: str) -> None:
    """Reject a text without records, and choices among which a completion could not be found."""
    at_least(1, **{f"{what}.take": 1 if text.take is None else text.take})
    if text.choices is None:
        return
    stripped = [choice.strip() for choice in text.choices]
    if len(stripped) < 2 or "" in stripped or len(set(stripped)) < len(stripped):
        raise InputError(
            f"{what}.choices: expected two or more completions that differ in more than spaces, found {text.choices}"
        )


def check_audit(config: AuditConfig) -> None:
    """Reject contradictory options before reading any input."""
    at_least(1, rows=config.rows, top=config.top, batch_sequences=config.batch_sequences)
    at_least(0, record=0 if config.record is None else config.record)
    positive(log_every_seconds=config.log_every_seconds)


def at_least(least: int, **values: float) -> None:
    for name, value in values.items():
        if value < least:
            raise InputError(f"{name}: expected at least {least}, found {value}")


def fraction(**values: float) -> None:
    for name, value in values.items():
        if not 0.0 <= value <= 1.0:
            raise InputError(f"{name}: expected 0 to 1, found {value}")


def plain_name(**values: str) -> None:
    """A name that becomes a part of a folder's name, and that a glob can find again."""
    for name, value in values.items():
        if not re.fullmatch(r"[^\s./*?\[\]\x00][^/*?\[\]\x00]*", value):
            raise InputError(f"{name}: expected a name without / * ? [ ] and not starting with '.', found {value!r}")


def seeds(**values: int) -> None:
    """What a generator takes as a seed: 63 bits."""
    for name, value in values.items():
        if not 0 <= value < 2**63:
            raise InputError(f"{name}: expected 0 to 2^63 - 1, found {value}; choose a smaller seed")


def positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise InputError(f"{name}: expected more than 0, found {value}")


def check_files(config: Any, prefix: str = "", command: str | None = None) -> None:
    """Reject paths and globs that match nothing, within the first second; hub names and URLs are checked later.

    `command`: how the study is run whose teacher and cache the globs may mean; of a run's options it is found there.
    """
    command = command or getattr(config, "command", None)
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            check_files(value, f"{prefix}{item.name}.", command)
        elif isinstance(value, dict):
            for name, one in value.items():
                if dataclasses.is_dataclass(one):
                    check_files(one, f"{prefix}{item.name}.{name}.", command)
        elif item.metadata["content"] and value is not None:
            for pattern in [value] if isinstance(value, str) else value:
                is_hub_model = isinstance(config, ModelConfig) and is_hub_name(pattern)
                is_address = item.metadata["address"] and is_url(pattern)
                if not (is_hub_model or is_address or matching_paths(pattern)):
                    raise InputError(
                        f"{prefix}{item.name}: expected {pattern!r} to exist, found nothing there; "
                        f"{_made_by(command, pattern) or _nearest(pattern)}"
                    )


def _made_by(command: str | None, pattern: str) -> str:
    """What makes the teacher or the cache of a study, which a glob of its layers means; empty for anything else."""
    if command is None or "-*" not in pattern:
        return ""
    if "/teacher-*/" in pattern:
        return f"train or score the teacher first; {command} makes all that is missing"
    return f"capture first: {command.replace('study.py', 'capture.py')}; {command} makes all that is missing"


def _nearest(pattern: str) -> str:
    """What exists near a path or glob that matches nothing: names of like spelling, else where the path ends."""
    path = Path(pattern)
    folder = next(parent for parent in (*path.parents, Path()) if parent.is_dir())
    missing = path.relative_to(folder).parts[0]  # `folder` is one of its parents, or the current one
    names = sorted(child.name for child in folder.iterdir())
    if near := difflib.get_close_matches(missing, names, n=1):
        return f"did you mean {folder / near[0] / Path(*path.relative_to(folder).parts[1:])}?"
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    place = "the current folder" if str(folder) == "." else str(folder)
    return f"{place} has no {missing}" + (f", but {shown}" if names else "")


def urls_in(config: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """The options that hold the URL of an object store, with their values."""
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        values = value if isinstance(value, list) else [value]
        if dataclasses.is_dataclass(value):
            yield from urls_in(value, f"{prefix}{item.name}.")
        elif item.metadata["address"]:
            yield from ((prefix + item.name, one) for one in values if one is not None and is_url(one))
