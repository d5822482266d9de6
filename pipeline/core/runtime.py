"""The environment of this process: its rank and device, its memory, and requests to stop."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import os
import platform
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed

from pipeline.core.processes import has_ended
from pipeline.core.stopping import STOP_SIGNALS, Stopped

RECORDED_LIBRARIES = ("torch", "transformers", "deepspeed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """The rank of this process, the number of ranks, and the collective operations between them."""

    rank: int
    world_size: int
    device: torch.device
    stop: StopRequest | None = None
    """What ends scoring; None where nothing does. Training looks at it between steps."""

    def all_reduce(self, values: torch.Tensor) -> torch.Tensor:
        """The element-wise sum over all ranks, on every rank. `values` is changed in place."""
        if self.world_size > 1:
            torch.distributed.all_reduce(values)
        return values

    def broadcast(self, values: torch.Tensor) -> torch.Tensor:
        """The values of rank 0, on every rank, so that all ranks decide alike. `values` is changed in place."""
        if self.world_size > 1:
            torch.distributed.broadcast(values, src=0)
        return values

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on at least one rank; the answer is the same on every rank."""
        return bool(self.all_reduce(torch.tensor(int(flag), device=self.device)).item())

    def leave_if_asked(self) -> None:
        """Stopped on every rank, once one of them is asked to stop."""
        if self.stop is not None and self.any(bool(self.stop)):
            raise Stopped("stop requested: scoring ends; the same command scores again", is_finished=False)

    def barrier(self) -> None:
        """Wait until every rank has reached this call."""
        if self.world_size > 1:
            torch.distributed.barrier()


def compute_device(local_rank: int = 0) -> torch.device:
    """The GPU of this local rank; the CPU if the machine has no GPU."""
    return (
        torch.device("cuda", local_rank % torch.cuda.device_count())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, each as CUDA_VISIBLE_DEVICES names it."""
    num_gpus = torch.cuda.device_count()
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = map(str, range(num_gpus)) if chosen is None else (name.strip() for name in chosen.split(","))
    return [*names][:num_gpus]  # CUDA reads no further than the first name that it does not know


def bind_device(local_rank: int = 0) -> torch.device:
    """The device of this local rank, as the current one of this thread: CUDA's calls that name no device mean it."""
    device = compute_device(local_rank)
    make_current(device)
    return device


def make_current(device: torch.device) -> None:
    """Make a GPU the current one of this thread; nothing for a CPU.

    Each new thread begins with the first GPU. A call of CUDA that names none then opens a context there: a few hundred
    MB of that GPU's memory for every process.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of host memory on a device. A GPU copies from pinned memory, so that the host waits for nothing."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def alone() -> Ranks:
    """The only rank of a process without a process group."""
    return Ranks(rank=0, world_size=1, device=compute_device())


@contextlib.contextmanager
def ranks_from_environment() -> Iterator[Ranks]:
    """Join the process group that torchrun describes in the environment variables: NCCL on GPUs, gloo on CPUs."""
    device = bind_device(int(os.environ["LOCAL_RANK"]))
    backend = "nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, timeout=timedelta(minutes=30))
    try:
        yield Ranks(rank=torch.distributed.get_rank(), world_size=torch.distributed.get_world_size(), device=device)
    finally:
        torch.distributed.destroy_process_group()


def has_fast_matmul(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the device multiplies matrices of this dtype at least as fast as float32's, by its instructions.

    A CPU that has none for bfloat16 or float16 takes 6 to 180 times as long as for float32 (measured on AVX2). GPUs
    before Ampere emulate bfloat16. Not by a measurement: the dtype names runs and caches, and may not change by chance.
    """
    if dtype == torch.bfloat16:
        is_cuda = device.type == "cuda"
        return torch.cuda.is_bf16_supported(including_emulation=False) if is_cuda else _has_fast_bfloat16_cpu()
    return dtype != torch.float16 or device.type == "cuda" or torch.ops.mkldnn._is_mkldnn_fp16_supported()


def _has_fast_bfloat16_cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this CPU has fast instructions for bfloat16.

    With AVX-512 BF16 alone an Intel Xeon whose AMX is hidden takes 1.4 to 1.9 times as long as for float32, and an AMD
    EPYC about a quarter (measured on the shapes of SmolLM2's layers).
    """
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    is_intel = cpuinfo.exists() and "GenuineIntel" in cpuinfo.read_text()
    return torch.cpu._is_amx_tile_supported() or not is_intel


def full_numel(parameter: torch.nn.Parameter) -> int:
    """The number of elements of a parameter. ZeRO-3 leaves a partitioned parameter empty and its size in `ds_numel`."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def keep_allocator_memory() -> None:
    """Make glibc keep freed memory for reuse; does nothing on other C libraries.

    The pipeline allocates temporary tensors of a few MB a thousand times per second. By default glibc maps each of them
    anew, the kernel faults in every page, and glibc unmaps it again. The top-k of a position over 49,152 tokens takes
    250 us by default and 80 us with these settings.
    """
    options = {-4: 0, -1: 1 << 30, -2: 1 << 26}  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD of malloc.h
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        for option, value in options.items():
            libc.mallopt(option, value)


def release_memory() -> None:
    """Free objects that are no longer referenced, and the cached memory of the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class StopRequest:
    """True once this rank should save a checkpoint and exit; checked between two steps, or two batches of scoring.

    There are five reasons: SIGTERM, SIGINT, SIGUSR1 or SIGUSR2 was received; the stop file exists; the time limit
    (PIPELINE_STOP_AT, seconds since 1970) has passed; the parent process has exited; the driver (PIPELINE_DRIVER, see
    `this_process`) has exited.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._signal_received = False
        self._driver = os.environ.get("PIPELINE_DRIVER", "")  # empty: there is no driver
        self._parent_pid = os.getppid()
        self._stop_at = float(os.environ.get("PIPELINE_STOP_AT", "inf"))
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle_signal)
        # by which torchrun ends its ranks; nohup, which began this command, would have it ignored
        signal.signal(signal.SIGHUP, signal.SIG_DFL)

    def _handle_signal(self, number: int, frame: object) -> None:
        self._signal_received = True

    def __bool__(self) -> bool:
        parent_exited = os.getppid() != self._parent_pid  # the kernel then gives this process another parent
        driver_exited = has_ended(self._driver)  # as the ranks on its machine see
        return (
            self._signal_received
            or parent_exited
            or driver_exited
            or time.time() > self._stop_at
            or self._file.exists()
        )


def module_command(module: str, *arguments: str, never_handled: Sequence[str] = ()) -> list[str]:
    """The command that runs a module as `python -m` does, with the package of this process.

    `python -m` looks into the working directory first: where this contains another checkout, or a pipeline.py of the
    user's own, the child would run that.

    SIGUSR1 and SIGUSR2, by which SLURM warns every process of a job, are ignored until the module has a handler.
    Signals of `never_handled` are ignored by the process for good, and by its children until they have a handler:
    torchrun would end its ranks at SIGTERM, where these want to save, and itself with an error.
    """
    root = str(Path(__file__).resolve().parents[2])
    code = "import sys; sys.path[:] = filter(None, sys.path); "  # "" is the working directory
    code += f"{root!r} in sys.path or sys.path.insert(0, {root!r}); import signal; "
    code += "from pipeline.core.processes import collect_less; collect_less(); "
    ignored = sorted({*never_handled, "SIGUSR1", "SIGUSR2"})
    code += f"[signal.signal(signal.Signals[name], signal.SIG_IGN) for name in {ignored!r}]; "
    if never_handled:  # later releases of torchrun have an option for it; this works with each
        code += "handle = signal.signal; signal.signal = lambda number, handler: signal.SIG_IGN "
        code += f"if signal.Signals(number).name in {ignored!r} else handle(number, handler); "
    code += "import runpy; runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
    return [sys.executable, "-c", code, module, *arguments]


def exit_rank() -> NoReturn:
    """Exit a rank that has finished and saved its work, without the usual cleanup of the process.

    On a busy machine a thread of the communication libraries is sometimes still running when C++ destroys its static
    objects. The finished rank then aborts (4 of 15 runs of a test with two ranks), and torchrun kills the other ranks.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def environment() -> dict[str, Any]:
    """What a run is made with, besides its options: the command, versions of libraries, the machine, the time."""
    return {
        "command": shlex.join(["python", *sys.orig_argv[1:]]),  # Hydra changes sys.argv
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in RECORDED_LIBRARIES},
        "hardware": hardware(),
    }


def hardware() -> str:
    """The machine in a few words: its GPUs, the cores that this process may use, its memory."""
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    gpus = [f"{names.count(name)} x {name}" for name in dict.fromkeys(names)]
    gigabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return ", ".join([*gpus, f"{len(os.sched_getaffinity(0))} cores ({platform.machine()})", f"{gigabytes:.0f} GB"])
