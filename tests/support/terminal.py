"""A command on a terminal of its own, and what its screen shows at the end."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
from collections.abc import Sequence
from pathlib import Path

CONTROLS = re.compile(r"\x1b\[(\d*)([A-Za-z])|\r|\n|[^\x1b\r\n]+")


def on_terminal(command: Sequence[str], *, cwd: Path, columns: int = 100) -> tuple[int, str]:
    """Run a command whose standard output and error are a terminal; its exit code and all that it wrote there."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    process = subprocess.Popen(command, cwd=cwd, stdin=theirs, stdout=theirs, stderr=theirs, close_fds=True)
    os.close(theirs)
    written = bytearray()
    with contextlib.suppress(OSError):  # EIO: the last process has closed its side
        while part := os.read(ours, 65536):
            written += part
    os.close(ours)
    return process.wait(), written.decode()


def screen(written: str) -> list[str]:
    """The lines that a terminal shows after all this: CR, LF, and the moves and erasures that tqdm uses."""
    lines, row, column = [""], 0, 0
    for control in CONTROLS.finditer(written):
        text = control[0]
        if text == "\r":
            column = 0
        elif text == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif control[2] == "A":
            row = max(row - int(control[1] or 1), 0)
        elif control[2] == "K":
            lines[row] = lines[row][:column]
        elif control[2] is None:
            lines[row] = lines[row].ljust(column)[:column] + text + lines[row][column + len(text) :]
            column += len(text)
    return [line.rstrip() for line in lines]
