"""What a person sees while something runs: log lines, a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path

from tqdm import tqdm

log = logging.getLogger("pipeline")


def start_logging(file: Path | None = None, *, level: int = logging.INFO) -> None:
    """Plain lines on standard error, and in `file` as well."""
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if file is not None:
        handlers.append(logging.FileHandler(file))
    form = "%(asctime)s %(message)s"
    logging.basicConfig(level=logging.WARNING, format=form, datefmt="%H:%M:%S", handlers=handlers, force=True)
    log.setLevel(level)


class Progress:
    """A bar on a terminal, one plain line every few seconds elsewhere."""

    def __init__(
        self, what: str, *, total: int, unit: str, done: int = 0, log_every_seconds: float, quiet: bool = False
    ) -> None:
        self._quiet = quiet
        self._what, self._total, self._unit = what, total, unit
        self._first: float = done
        self._done: float = done
        self._log_every_seconds = log_every_seconds
        self._started = self._logged = time.monotonic()
        terminal = sys.stderr.isatty()
        self._bar = (
            tqdm(total=total, initial=done, desc=what, unit=unit, dynamic_ncols=True)
            if terminal and not quiet
            else None
        )

    def advance(self, count: float, **figures: float) -> None:
        """Say that `count` more units are done, and show some figures beside them."""
        self._done += count
        shown = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
        if self._bar is not None:
            self._bar.set_postfix_str(shown, refresh=False)
            self._bar.update(count)
            return
        if self._quiet:
            return
        now = time.monotonic()
        if now - self._logged >= self._log_every_seconds or self._done >= self._total:
            self._logged = now
            per_second = (self._done - self._first) / max(now - self._started, 1e-9)
            left_seconds = (self._total - self._done) / max(per_second, 1e-9)
            log.info(
                "%s %d/%d %s  %.3g/s  %.0f s left  %s",
                *(self._what, self._done, self._total, self._unit.strip(), per_second, left_seconds, shown),
            )

    def close(self) -> None:
        """Leave the terminal tidy."""
        if self._bar is not None:
            self._bar.close()


def readable(size: float) -> str:
    """Bytes as people say them."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} TB"
