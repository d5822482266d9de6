"""`scripts/status.py`: find the folders, read them, print what they are, once or again and again."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

from pipeline.config.commands import StatusConfig
from pipeline.config.validate import positive
from pipeline.core.files import is_url, matching_paths
from pipeline.core.types import InputError
from pipeline.status.captures import find_capture, find_plan, is_cache
from pipeline.status.lines import json_lines, table
from pipeline.status.runs import find_run, is_run, labeled
from pipeline.status.values import EXIT_FINISHED, Status, exit_code, summary

READS_AT_ONCE = 16  # the reads of a network file system wait more than they work
EXIT_UNREAD = 141  # 128 + SIGPIPE, as the shell reports it of other programs
CLEAR = "\033[H\033[J"
T = TypeVar("T")


def run(config: StatusConfig) -> int:
    """Print the status; returns the exit code. With `watch` until all are finished, or until a request to stop."""
    check(config)
    code = EXIT_FINISHED
    try:
        while True:
            found = find(config)
            code = exit_code(found)
            show(found, config)
            if config.watch is None or code == EXIT_FINISHED:
                return code
            time.sleep(config.watch)
    except KeyboardInterrupt:
        if config.watch is None:
            raise
        return code
    except BrokenPipeError:  # the reader of the output has ended, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is flushed when Python exits
        return EXIT_UNREAD


def check(config: StatusConfig) -> None:
    """Reject options that cannot be followed; caches in an object store are named, because they are not shown."""
    positive(silent_seconds=config.silent_seconds, lease_seconds=config.lease_seconds)
    positive(watch=1.0 if config.watch is None else config.watch)
    if not config.runs and not config.caches:
        raise InputError(
            "runs and caches: expected folders or globs, found none; give runs=[runs/mine/*], caches=[caches/mine/*] "
            "or study=NAME"
        )
    for place in filter(is_url, config.caches):
        print(f"not shown: {place}; only caches in local folders are", file=sys.stderr)


def show(found: Sequence[Status], config: StatusConfig) -> None:
    """Print everything at once: on a terminal that is watched, in place of what was there."""
    lines = [*json_lines(found)] if config.json else [*table(found), summary(found)]
    is_redrawn = config.watch is not None and not config.json and sys.stdout.isatty()
    print((CLEAR if is_redrawn else "") + "\n".join(lines), flush=True)


# ------------------------------------------------------------------------------------------- finding


def find(config: StatusConfig) -> list[Status]:
    """All runs by their folders, then captures, then plans under way; InputError where there is nothing at all."""
    silent, lease = config.silent_seconds, config.lease_seconds
    caches = [pattern for pattern in config.caches if not is_url(pattern)]
    with ThreadPoolExecutor(READS_AT_ONCE) as pool:

        def each(read: Callable[[Path], T], folders: Iterable[Path], is_one: Callable[[Path], bool]) -> list[T]:
            folders = list(folders)
            chosen = pool.map(partial(may_be, is_one), folders)
            return list(pool.map(read, [folder for folder, is_it in zip(folders, chosen, strict=True) if is_it]))

        runs = each(partial(find_run, silent_seconds=config.silent_seconds), folders_of(config.runs), is_run)
        captures = each(partial(find_capture, silent_seconds=silent, lease_seconds=lease), folders_of(caches), is_cache)
        plans = each(
            partial(find_plan, silent_seconds=silent, lease_seconds=lease),
            plans_of(config.plans_dir, caches),
            Path.is_dir,
        )
    found: list[Status] = [*labeled(runs), *captures, *(plan for plan in plans if plan is not None)]
    if not found:
        raise InputError(
            f"runs and caches: expected run folders or caches, found none in {[*config.runs, *config.caches]}; check "
            "the globs, or start a run"
        )
    return found


def may_be(is_one: Callable[[Path], bool], folder: Path) -> bool:
    """Whether a folder is a run, or a cache; True where that cannot be seen: its reader finds the reason."""
    try:
        return is_one(folder)
    except OSError:  # another user's
        return True


def folders_of(patterns: Sequence[str]) -> list[Path]:
    """The paths that match, each once, by name."""
    return sorted({path for pattern in patterns for path in matching_paths(pattern)})


def plans_of(plans_dir: str | None, caches: Sequence[str]) -> list[Path]:
    """The folders of plans: those in `plans_dir`, else those beside the caches, which may not exist yet."""
    places = {Path(pattern).parent / ".plans" for pattern in caches} if plans_dir is None else {Path(plans_dir)}
    return folders_of([f"{place}/*" for place in places])
