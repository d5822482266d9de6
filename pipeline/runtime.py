"""Where this process stands: rank and device, requests to stop, log lines, the progress bar."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """This process among its peers."""

    rank: int
    world_size: int
    device: torch.device

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The element-wise sum over all ranks, on every rank."""
        if self.world_size > 1:
            torch.distributed.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank; all ranks agree on the answer."""
        return bool(self.sum(torch.tensor(int(flag), device=self.device)).item())

    def wait(self) -> None:
        """Return once every rank is here."""
        if self.world_size > 1:
            torch.distributed.barrier()


def compute_device(local_rank: int = 0) -> torch.device:
    """The GPU of this local rank where there is one, else the CPU."""
    return (
        torch.device("cuda", local_rank % torch.cuda.device_count())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


@contextlib.contextmanager
def ranks_from_environment() -> Iterator[Ranks]:
    """Join the process group that torchrun describes in the environment: NCCL on GPUs, gloo elsewhere."""
    device = compute_device(int(os.environ["LOCAL_RANK"]))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, timeout=timedelta(minutes=30))
    try:
        yield Ranks(rank=torch.distributed.get_rank(), world_size=torch.distributed.get_world_size(), device=device)
    finally:
        torch.distributed.destroy_process_group()


def release_memory() -> None:
    """Give back what nothing refers to any more, on the GPU too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class StopRequest:
    """Turns signals, a stop file and the driver's death into one flag that is asked for at step boundaries."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._signalled = False
        self._driver = int(os.environ.get("PIPELINE_DRIVER_PID", "0"))
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: object) -> None:
        self._signalled = True

    def __bool__(self) -> bool:
        return self._signalled or self._file.exists() or (self._driver > 0 and not is_alive(self._driver))


def is_alive(pid: int) -> bool:
    """Whether a process of this machine exists."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


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


def leave() -> NoReturn:
    """End a rank whose work is done and on disk, without tearing the process down.

    On a busy machine a thread of the communication libraries is sometimes still joinable when C++ destroys its static
    objects, and a rank that has done everything aborts (4 of 15 runs of one test of two ranks): its peers would be
    killed with it.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
