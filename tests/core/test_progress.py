"""Log lines and progress: on a real terminal, through a pipe, and in the log's file."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from support.terminal import on_terminal, screen

CODE = """
import sys, time
from pathlib import Path
from pipeline.core.progress import Progress, log, start_logging
start_logging(Path("log.txt"))
log.info("before")
progress = Progress("train", total=6, unit=" steps", log_every_seconds=0.0)
for step in range(6):
    progress.advance(1, loss=1 / (step + 1))
    time.sleep(0.15)  # longer than tqdm waits between two pictures
    if step == 3:
        log.warning("a message while the bar is there")
        inner = Progress("score", total=2, unit=" sequences", log_every_seconds=9.0)
        inner.advance(1)
        time.sleep(0.15)
        log.warning("a message while both are there")
        inner.advance(1)
        inner.close()
progress.close()
empty = Progress("answer", total=0, unit=" records", log_every_seconds=0.0)
empty.advance(0)
empty.close()
log.info("after")
"""
PLAIN = re.compile(
    r"\d\d:\d\d:\d\d train \d/6 steps  \S+/s  \d+ s left  loss 0\.\d+|\d\d:\d\d:\d\d train 1/6 .* loss 1"
)


def messages(lines: list[str]) -> list[str]:
    return [line[9:] for line in lines if line]


def test_on_a_terminal_messages_stand_above_the_bar_and_the_file_has_every_line(tmp_path: Path) -> None:
    code, written = on_terminal([sys.executable, "-c", CODE], cwd=tmp_path)
    assert code == 0, written
    shown = [line for line in screen(written) if line]
    texts = ["before", "a message while the bar is there", "a message while both are there", "after"]
    assert messages(shown[:3]) == texts[:3]  # each a line of its own, not appended to a bar and not overwritten
    assert re.match(r"train: 100%\|█+\| 6/6 \[", shown[3])
    assert messages(shown[4:]) == texts[3:]  # neither the inner bar nor an empty one is left
    assert "answer" not in written
    in_file = (tmp_path / "log.txt").read_text().splitlines()
    assert [line for line in messages(in_file) if "/" not in line] == texts
    assert sum(PLAIN.fullmatch(line) is not None for line in in_file) == 6
    assert not any(PLAIN.search(line) for line in shown)


def test_through_a_pipe_there_are_plain_lines_without_carriage_returns(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", CODE], cwd=tmp_path, capture_output=True, check=True)
    assert b"\r" not in done.stdout + done.stderr
    lines = done.stderr.decode().splitlines()
    assert lines == (tmp_path / "log.txt").read_text().splitlines()
    assert sum(PLAIN.fullmatch(line) is not None for line in lines) == 6


def test_one_of_several_processes_draws_no_bar(tmp_path: Path) -> None:
    code = CODE.replace("log_every_seconds=0.0", "log_every_seconds=0.0, bar=False")
    _, written = on_terminal([sys.executable, "-c", code], cwd=tmp_path)
    assert "train: " not in written
    assert sum(PLAIN.fullmatch(line.rstrip()) is not None for line in written.splitlines()) == 6


def test_the_screen_is_that_of_a_terminal() -> None:
    """What bars do: they return to the start of the line, write over it, and move up from a lower one."""
    assert screen("one\r\ntwo\rT\n\x1b[A\rthree\r\n") == ["one", "three", ""]
    assert screen("a bar\r     \rmessage\r\n") == ["message", ""]
