"""Debian packages that tests need and a machine lacks; installed where this process may do so."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path


def install(*packages: str, unless: Callable[[], object]) -> None:
    """Install packages by apt, as root, unless what they bring is there.

    One process at a time, since several test processes may need them.
    """
    if unless() or os.geteuid() != 0 or not shutil.which("apt-get"):
        return
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    with (Path(tempfile.gettempdir()) / "install-packages.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if unless():
            return
        for words in (["update"], ["install", "-y", "--no-install-recommends", *packages]):
            command = ["apt-get", "-o", "DPkg::Lock::Timeout=300", *words]
            subprocess.run(command, check=False, stdout=subprocess.DEVNULL, env=environment)
