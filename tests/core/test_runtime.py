"""A progress bar on a terminal and plain lines elsewhere; requests to stop."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipeline.core import processes, runtime, seeds
from pipeline.core.runtime import StopRequest, has_fast_matmul, module_command
from support.commands import ROOT

SHOW = """
import sys, time
from pipeline.core.progress import Progress, start_logging
start_logging()
total = int(sys.argv[1])
progress = Progress("train", total=total, unit=" steps", log_every_seconds=0.15)
for step in range(total):
    time.sleep(0.1)
    progress.advance(1, loss=0.5)
if total == 0:
    progress.advance(0, loss=0.5)
progress.close()
"""


def on_a_terminal(total: int) -> str:
    """What SHOW writes to a terminal of 100 columns."""
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    subprocess.run([sys.executable, "-c", SHOW, str(total)], cwd=ROOT, stderr=child, check=True)
    os.set_blocking(parent, False)
    try:
        return os.read(parent, 100_000).decode()
    except BlockingIOError:  # nothing was written
        return ""


def elsewhere(total: int) -> str:
    """What SHOW writes to a pipe."""
    command = [sys.executable, "-c", SHOW, str(total)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stderr


def test_a_bar_on_a_terminal() -> None:
    shown = on_a_terminal(4)
    assert "\r" in shown
    assert "4/4" in shown
    assert "loss 0.5" in shown


def test_plain_lines_elsewhere() -> None:
    shown = elsewhere(4)
    lines = shown.splitlines()
    assert "\r" not in shown
    assert 2 <= len(lines) <= 3  # every 0.15 s of 0.4 s, and the last
    assert "train 4/4 steps" in lines[-1]
    assert "s left  loss 0.5" in lines[-1]


def test_a_progress_of_0_units_shows_nothing() -> None:
    assert on_a_terminal(0) == ""
    assert elsewhere(0) == ""


@pytest.fixture
def signal_handlers() -> Iterator[None]:
    """A StopRequest replaces the handlers of this process: put the old ones back."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
    handlers = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)


@pytest.mark.usefixtures("signal_handlers")
@pytest.mark.parametrize(
    "reason", ["stop file", "time limit", "driver", "parent", "SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"]
)
def test_every_reason_to_stop(reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop file, the time limit, a driver or a parent that has exited, each signal; nothing before that."""
    driver = subprocess.Popen(["sleep", "60"])
    try:
        named = [socket.gethostname(), processes.machine(), str(driver.pid), processes.started(driver.pid)]
        monkeypatch.setenv("PIPELINE_DRIVER", " ".join(named))
        monkeypatch.setenv("PIPELINE_STOP_AT", str(time.time() + 3600))
        stop = StopRequest(tmp_path / "stop")
        assert not stop
        if reason == "stop file":
            (tmp_path / "stop").touch()
        elif reason == "time limit":
            later = time.time() + 3601
            monkeypatch.setattr(time, "time", lambda: later)
        elif reason == "driver":
            driver.kill()
            driver.wait()
        elif reason == "parent":
            another = os.getppid() + 1
            monkeypatch.setattr(os, "getppid", lambda: another)
        else:
            os.kill(os.getpid(), signal.Signals[reason])
        assert stop
    finally:
        driver.kill()
        driver.wait()


def test_a_module_runs_with_this_package_wherever_it_is_started(tmp_path: Path) -> None:
    """The working directory holds another checkout, and files named as modules that are imported on the way."""
    for name in ("pipeline", "runpy", "torch"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong one')")
    (tmp_path / "probe").mkdir()
    probe = "import sys, pipeline.core.seeds as seeds; print(seeds.__file__, __name__, sys.argv[1:])"
    (tmp_path / "probe" / "named.py").write_text(probe)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["PYTHONPATH"] = str(tmp_path / "probe")
    done = subprocess.run(
        module_command("named", "-c", "a b"), cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == f"{seeds.__file__} __main__ ['-c', 'a b']"


def test_a_signal_that_a_module_may_not_handle_is_ignored_until_its_child_handles_it(tmp_path: Path) -> None:
    """As torchrun of each release, which would end its ranks at SIGTERM, and itself with an error."""
    child = "import os, signal; signal.signal(signal.SIGTERM, lambda *_: print('the child saves', flush=True)); "
    child += "os.kill(os.getpid(), signal.SIGTERM)"
    (tmp_path / "agent.py").write_text(
        "import os, signal, subprocess, sys\n"
        "for number in (signal.SIGTERM, signal.SIGHUP):\n"
        "    signal.signal(number, lambda number, frame: print(signal.Signals(number).name, flush=True))\n"
        "for name in ('SIGTERM', 'SIGUSR1', 'SIGHUP'):\n"
        "    os.kill(os.getpid(), signal.Signals[name])\n"
        f"subprocess.run([sys.executable, '-c', {child!r}], check=True)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = module_command("agent", never_handled=("SIGTERM",))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["SIGHUP", "the child saves"]


@pytest.mark.parametrize(
    ("vendor", "has_instructions", "has_amx", "is_fast"),
    [
        ("GenuineIntel", True, True, True),
        ("GenuineIntel", True, False, False),  # half as fast as float32, measured
        ("AuthenticAMD", True, False, True),  # not compared: as before
        ("AuthenticAMD", False, False, False),
        ("", True, False, True),  # ARM names no vendor
    ],
)
def test_which_cpus_multiply_bfloat16_fast(
    vendor: str, has_instructions: bool, has_amx: bool, is_fast: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor : 0\nvendor_id : {vendor}\n")
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has_instructions)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)
    assert runtime._has_fast_bfloat16_cpu(tmp_path / "cpuinfo") is is_fast


def test_a_gpu_that_emulates_bfloat16_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """As V100 and T4 do."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert not has_fast_matmul(torch.bfloat16, torch.device("cuda"))
