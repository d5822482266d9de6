"""Which process wrote a file: a name for it that is unique over machines and time, and whether it has ended.

And what processes beside each other on one machine need: the order of its cores, a quick start and an end with their
parent."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import os
import signal
import socket
from pathlib import Path

UNKNOWN = "?"


def collect_less() -> None:
    """Let Python's garbage collector look less often through the million objects of torch and transformers.

    They are made by imports and live until the process ends. By default the collector goes through all of them ten
    times while they are made, and once more at the end: 1.1 of the 3.9 s that a command takes for nothing else.
    """
    gc.set_threshold(10_000)
    atexit.register(gc.freeze)


def this_process() -> str:
    """Host, machine, PID and start of this process, as four words."""
    return " ".join([socket.gethostname(), machine(), str(os.getpid()), started(os.getpid())])


def description(process: str) -> str:
    """A process that `this_process` named, for a message: "process 12 on host"; empty if nothing stands there yet."""
    fields = process.split()
    if len(fields) < 2:
        return ""
    return f"process {fields[2 if len(fields) > 3 else 1]} on {fields[0]}"  # earlier versions wrote no machine


def has_ended(process: str) -> bool:
    """Whether a process that `this_process` named is known to have ended: only if it ran where this process runs.

    A PID alone is not enough: containers on one machine, and machines that share a disk, have the same ones, and a
    machine gives them again.
    """
    fields = process.split()
    if len(fields) != 4 or UNKNOWN in fields or fields[1] != machine():
        return False
    pid, start = int(fields[2]), fields[3]
    return not process_exists(pid) or started(pid) not in (UNKNOWN, start)


def process_exists(pid: int) -> bool:
    """Whether a process with this id exists on this machine."""
    try:
        os.kill(pid, 0)  # signal 0 is not delivered: the kernel only checks that it could be
    except ProcessLookupError:
        return False
    except PermissionError:  # the process exists and belongs to another user
        return True
    return True


def machine() -> str:
    """What all processes share that see each other's PIDs: the boot of a machine and a PID namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # not Linux
        return UNKNOWN


def started(pid: int) -> str:
    """When an existing process started, in ticks since the boot."""
    try:
        # the second field is the program's name in brackets, which may contain anything
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return UNKNOWN
    return "ended" if state in "ZX" else fields[18]  # a zombie does no more work


# --------------------------------------------------------------------------- processes side by side


def end_with(parent: int) -> None:
    """Have the kernel send SIGTERM to this process when `parent`, whose main thread started it, ends in any way."""
    with contextlib.suppress(OSError, AttributeError):  # not Linux
        ctypes.CDLL(None, use_errno=True).prctl(1, int(signal.SIGTERM))  # PR_SET_PDEATHSIG of prctl.h
    if os.getppid() != parent:  # it ended before
        os.kill(os.getpid(), signal.SIGTERM)


def cores_in_order() -> list[int]:
    """The cores that this process may use, neighbours beside each other: of a socket, then threads of one core."""
    return sorted(os.sched_getaffinity(0), key=_place_of_core)


def _place_of_core(number: int) -> tuple[int, int, int]:
    topology = Path(f"/sys/devices/system/cpu/cpu{number}/topology")
    try:
        socket_id, core_id = (int((topology / name).read_text()) for name in ("physical_package_id", "core_id"))
    except (OSError, ValueError):  # a machine that does not show it
        return 0, 0, number
    return socket_id, core_id, number
