"""Where this process stands: rank, device, memory, requests to stop."""

from __future__ import annotations

import contextlib
import ctypes
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """This process among its peers."""

    rank: int
    world_size: int
    device: torch.device

    def all_reduce(self, values: torch.Tensor) -> torch.Tensor:
        """The element-wise sum over all ranks, on every rank."""
        if self.world_size > 1:
            torch.distributed.all_reduce(values)
        return values

    def broadcast(self, values: torch.Tensor) -> torch.Tensor:
        """The first rank's values, on every rank: what is decided by them is decided alike."""
        if self.world_size > 1:
            torch.distributed.broadcast(values, src=0)
        return values

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank; all ranks agree on the answer."""
        return bool(self.all_reduce(torch.tensor(int(flag), device=self.device)).item())

    def barrier(self) -> None:
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


def has_fast_matmul(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether matrices of this type are multiplied as fast as they should be, or faster than as float32.

    A CPU without instructions for a half type takes 6 to 180 times as long for it as for float32 (measured on AVX2).
    """
    if dtype == torch.bfloat16:
        return torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype != torch.float16 or device.type == "cuda" or torch.ops.mkldnn._is_mkldnn_fp16_supported()


def full_numel(parameter: torch.nn.Parameter) -> int:
    """Numbers in a parameter; partitioned by ZeRO-3, it looks empty."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def keep_allocator_memory() -> None:
    """Have glibc keep the memory it is given back: temporaries of a few MB, made anew a thousand times a second.

    Otherwise each is mapped, faulted in page by page and unmapped: the top-k of a position over 49,152 tokens took
    250 us so, 80 with this. Elsewhere than on glibc it does nothing.
    """
    options = {-4: 0, -1: 1 << 30, -2: 1 << 26}  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD of malloc.h
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        for option, value in options.items():
            libc.mallopt(option, value)


def release_memory() -> None:
    """Give back what nothing refers to any more, on the GPU too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class StopRequest:
    """Turns signals, a stop file, a time limit and the driver's death into one flag, asked for at step boundaries."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._signalled = False
        self._driver = int(os.environ.get("PIPELINE_DRIVER_PID", "0"))
        self._launcher = os.getppid()  # torchrun, or whoever started us
        self._deadline = float(os.environ.get("PIPELINE_STOP_AT", "inf"))
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: object) -> None:
        self._signalled = True

    def __bool__(self) -> bool:
        alone = os.getppid() != self._launcher or (self._driver > 0 and not is_alive(self._driver))
        return self._signalled or alone or time.time() > self._deadline or self._file.exists()


def is_alive(pid: int) -> bool:
    """Whether a process of this machine exists."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def exit_rank() -> NoReturn:
    """End a rank whose work is done and on disk, without tearing the process down.

    On a busy machine a thread of the communication libraries is sometimes still joinable when C++ destroys its static
    objects, and a rank that has done everything aborts (4 of 15 runs of one test of two ranks): its peers would be
    killed with it.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
