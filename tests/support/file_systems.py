"""Real file systems that lack something, mounted for a test; a skip says why where that is not possible."""

from __future__ import annotations

import contextlib
import ctypes.util
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import apt

PROGRAM = Path(__file__).with_name("fuse_folder.py")


@contextlib.contextmanager
def mounted_without(folder: Path, *abilities: str) -> Iterator[Path]:
    """A folder through FUSE whose file system lacks some of the abilities of core.file_systems.FolderAbilities."""
    if importlib.util.find_spec("mfusepy") is None:
        pytest.skip("FUSE needs mfusepy, which the extra `dev` installs")
    if os.geteuid() != 0 or not os.access("/dev/fuse", os.W_OK):
        pytest.skip("FUSE needs root and /dev/fuse")
    apt.install("libfuse2", unless=lambda: ctypes.util.find_library("fuse") or ctypes.util.find_library("fuse3"))
    behind = folder.with_name(f"{folder.name}-behind")
    for path in (folder, behind):
        path.mkdir()
    process = subprocess.Popen(
        [sys.executable, str(PROGRAM), str(behind), str(folder), *abilities], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not folder.is_mount() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    if process.poll() is not None:
        assert process.stderr is not None
        reason = process.stderr.read().strip().splitlines()[-1:]
        pytest.skip(f"no folder could be mounted through FUSE (libfuse2 or libfuse3 is needed): {reason}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()
        process.wait()


@contextlib.contextmanager
def mounted_vfat(folder: Path) -> Iterator[Path]:
    """A file system without links and modes, of the kernel."""
    if os.geteuid() != 0 or "vfat" not in Path("/proc/filesystems").read_text():
        pytest.skip("vfat needs root and a kernel that has it")
    image = folder.with_suffix(".image")
    with image.open("wb") as file:
        file.truncate(64 << 20)
    try:
        subprocess.run(["mkfs.vfat", str(image)], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("vfat needs mkfs.vfat (Debian: dosfstools)")
    folder.mkdir()
    done = subprocess.run(["mount", "-o", "loop", str(image), str(folder)], check=False, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"no loop device could be mounted: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
