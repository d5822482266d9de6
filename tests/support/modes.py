"""Whether others can read what a command wrote."""

from __future__ import annotations

import os
from pathlib import Path


def other_modes(folder: Path) -> dict[str, str]:
    """The files and folders below a folder whose mode is not what the umask gives, with that mode."""
    umask = os.umask(0)
    os.umask(umask)
    found = {}
    for path in [folder, *folder.rglob("*")]:
        expected = (0o777 if path.is_dir() else 0o666) & ~umask
        if path.stat().st_mode & 0o777 != expected:
            found[str(path.relative_to(folder))] = oct(path.stat().st_mode & 0o777)
    return found
