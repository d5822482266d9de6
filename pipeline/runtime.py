"""Where this process stands: rank and device, files of a run, atomic writes, log lines, the progress bar."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from tqdm import tqdm

from pipeline.types import InputError

log = logging.getLogger("pipeline")


def start_logging(file: Path | None = None, *, level: int = logging.INFO) -> None:
    """Plain lines on standard error, and in `file` as well."""
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if file is not None:
        handlers.append(logging.FileHandler(file))
    logging.basicConfig(
        level=level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", handlers=handlers, force=True
    )
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)


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
    else:
        os.environ["DS_ACCELERATOR"] = "cpu"
    backend = "nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, timeout=timedelta(minutes=30))
    try:
        yield Ranks(rank=torch.distributed.get_rank(), world_size=torch.distributed.get_world_size(), device=device)
    finally:
        torch.distributed.destroy_process_group()


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPaths:
    """Every file name of a run folder."""

    folder: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.folder / "config.yaml"

    @property
    def identity(self) -> Path:
        """The run's hash and all it was made of."""
        return self.folder / "identity.json"

    @property
    def lock(self) -> Path:
        """Held by rank 0 while it works."""
        return self.folder / "lock"

    @property
    def stop(self) -> Path:
        """Exists when somebody wants the run to save and leave."""
        return self.folder / "stop-requested"

    @property
    def log(self) -> Path:
        """Rank 0's log lines."""
        return self.folder / "log.txt"

    @property
    def metrics(self) -> Path:
        """One JSON object a step."""
        return self.folder / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """DeepSpeed's checkpoints, one folder a step."""
        return self.folder / "checkpoints"

    @property
    def published(self) -> Path:
        """Names the newest whole checkpoint; replaced atomically."""
        return self.checkpoints / "published.json"

    @property
    def model(self) -> Path:
        """The trained student with its tokenizer, as `from_pretrained` reads it."""
        return self.folder / "model"

    def predictions(self, split: str) -> Path:
        """One row a held-out record of dev or test."""
        return self.folder / f"predictions-{split}.parquet"

    @property
    def result(self) -> Path:
        """Scores; exists only when the run is finished."""
        return self.folder / "result.json"


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by `text` so that a reader, or a crash, sees the old file or the new one, whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write plain data atomically as JSON for people: indented, keys in the given order."""
    write_atomically(path, json.dumps(value, indent=2) + "\n")


def sync_folder(folder: Path) -> None:
    """Make the names in a folder as durable as the files."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def content_hash(value: Any) -> str:
    """sha256 of plain data as canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def file_hash(path: Path) -> str:
    """sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def one_path(pattern: str, what: str) -> Path:
    """The one existing path that a name or glob stands for."""
    found = sorted(glob.glob(pattern))
    if len(found) != 1:
        listed = "nothing" if not found else ", ".join(found)
        raise InputError(f"{what}: expected {pattern!r} to match one path, found {listed}; check or narrow it")
    return Path(found[0])


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
                *(self._what, self._done, self._total, self._unit, per_second, left_seconds, shown),
            )

    def close(self) -> None:
        """Leave the terminal tidy."""
        if self._bar is not None:
            self._bar.close()


class Metrics:
    """metrics.jsonl: one line a step, cut back to the steps that a resumed run will not do again."""

    def __init__(self, file: Path, *, keep_steps: int) -> None:
        self._file = file
        rows = self.read(file) if file.exists() else []
        write_atomically(file, "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= keep_steps))

    @staticmethod
    def read(file: Path) -> list[dict[str, Any]]:
        """All whole lines; the last may have been cut short by a crash."""
        whole = [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
        return [json.loads(line) for line in whole]

    def append(self, figures: dict[str, Any]) -> None:
        """One more step."""
        with self._file.open("a") as file:
            file.write(json.dumps(figures) + "\n")
