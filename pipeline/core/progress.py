"""What a user sees while a command runs: log lines, and a progress bar on a terminal or plain lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path

from tqdm import tqdm

log = logging.getLogger("pipeline")


class AboveBars:
    """A stream to standard error whose lines appear above the progress bars, which are drawn again below them."""

    def write(self, text: str) -> None:
        """Write a text as it is, the ends of its lines included."""
        with tqdm.external_write_mode(file=sys.stderr):
            sys.stderr.write(text)

    def flush(self) -> None:
        """Write out what standard error still holds."""
        sys.stderr.flush()


def start_logging(file: Path | None = None, *, level: int = logging.INFO, quiet: bool = False) -> None:
    """Write the log lines of this package to standard error, and also to `file` if it is given.

    The file has the progress lines, too, where standard error shows a bar in their place. With `quiet`, standard error
    has progress and warnings alone.
    """
    shown = logging.StreamHandler(AboveBars())
    shown.addFilter(lambda record: not getattr(record, "has_bar", False))
    if quiet:
        # of the progress that of long work alone: quick work has one line, at its end
        shown.addFilter(lambda record: record.levelno >= logging.WARNING or not getattr(record, "is_brief", True))
    handlers: list[logging.Handler] = [shown]
    if file is not None:
        handlers.append(logging.FileHandler(file))
    line_format = "%(asctime)s %(message)s"
    logging.basicConfig(level=logging.WARNING, format=line_format, datefmt="%H:%M:%S", handlers=handlers, force=True)
    log.setLevel(level)


class Progress:
    """A progress bar on a terminal, and one plain line every `log_every_seconds` and at the end.

    The plain lines go to the log's file, and to standard error where there is no bar. `done` units of `total` were
    finished before the start, for example by an earlier run. Nothing is shown if `quiet` is set or if `total` is 0, and
    no bar without `bar`: several processes would draw theirs on the same line.
    """

    def __init__(
        self,
        title: str,
        *,
        total: int,
        unit: str,
        done: int = 0,
        log_every_seconds: float,
        quiet: bool = False,
        bar: bool = True,
    ) -> None:
        self._is_shown = not quiet and total > 0
        self._title, self._total, self._unit = title, total, unit
        self._done_at_start: float = done
        self._done: float = done
        self._log_every_seconds = log_every_seconds
        self._started = self._logged = time.monotonic()
        self._bar = None
        if self._is_shown and bar and sys.stderr.isatty():
            # leave=None: a bar inside another one, as that of an evaluation while training, goes when it is done
            self._bar = tqdm(total=total, initial=done, desc=title, unit=unit, dynamic_ncols=True, leave=None)

    def advance(self, count: float, **figures: float) -> None:
        """Add `count` finished units, and show the figures (name=value) beside the progress."""
        self._done += count
        if not self._is_shown:
            return
        shown_figures = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
        if self._bar is not None:
            self._bar.set_postfix_str(shown_figures, refresh=False)
            self._bar.update(count)
        now = time.monotonic()
        if now - self._logged >= self._log_every_seconds or self._done >= self._total:
            self._logged = now
            self._log_line(now - self._started, shown_figures)

    def skip(self, count: float) -> None:
        """Add `count` units that were finished before the start, but are found only now: they are no sign of speed."""
        self._done += count
        self._done_at_start += count
        if self._bar is not None:
            self._bar.initial += count
            self._bar.update(count)

    def _log_line(self, elapsed_seconds: float, shown_figures: str) -> None:
        per_second = (self._done - self._done_at_start) / max(elapsed_seconds, 1e-9)
        left_seconds = (self._total - self._done) / max(per_second, 1e-9)
        figures = (self._title, self._done, self._total, self._unit.strip(), per_second, left_seconds, shown_figures)
        line = "%s %d/%d %s  %.3g/s  %.0f s left  %s"
        is_brief = elapsed_seconds < self._log_every_seconds
        log.info(line, *figures, extra={"has_bar": self._bar is not None, "is_brief": is_brief})

    def close(self) -> None:
        """Close the bar, so that the next output starts on a new line."""
        if self._bar is not None:
            self._bar.close()


def readable(num_bytes: float) -> str:
    """A size in decimal units: 1234567 -> "1.23 MB"."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "bytes" else f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.3g} TB"


def readable_duration(seconds: float) -> str:
    """A duration with its unit: seconds below 2 minutes, minutes below 2 hours, else hours."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
