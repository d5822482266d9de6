"""Downloads: whole shards of a remote cache in a bounded local folder, which ranks and runs may share."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pipeline.core.object_store import RemotePath, download
from pipeline.core.types import InputError

KEPT = re.compile(r"[0-9a-f]{64}")
COMING = re.compile(r"\.[0-9a-f]{64}\.\d+\.[0-9a-f]{8}\.tmp")
ABANDONED_SECONDS = 3600.0  # a download that did not grow for so long belongs to somebody who was killed


@dataclass(frozen=True, slots=True, kw_only=True)
class Downloads:
    """Where shards are kept, by their sha256, and how many bytes they may take."""

    folder: Path
    limit_bytes: int
    """The least recently used go first; a shard larger than this is kept alone."""

    def fetch(
        self, remote: RemotePath, *, sha256: str, size_bytes: int, check: Callable[[Path], None], trusted: bool
    ) -> BinaryIO:
        """An open file with the bytes of an object, which stays readable even if its name is evicted meanwhile.

        `check` raises InputError for a file whose bytes are wrong: it sees every download and, unless it is `trusted`,
        a file that was here already.
        """
        path = self.folder / sha256
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._alone(sha256):  # the ranks of a run want the same shard at the same time: one fetches it
                file = self._kept(path, None if trusted else check)
                return file or self._downloaded(remote, path, size_bytes, check)
        except OSError as error:
            raise InputError(
                f"downloads: expected to keep a shard of {size_bytes} bytes in {self.folder}, found "
                f"{error.strerror or error}; make room, or change downloads.dir and downloads.bytes"
            ) from error

    @contextlib.contextmanager
    def _alone(self, sha256: str) -> Iterator[None]:
        with (self.folder / f".{sha256[:2]}.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _kept(self, path: Path, check: Callable[[Path], None] | None) -> BinaryIO | None:
        try:
            os.utime(path)
            if check is not None:
                check(path)
            return path.open("rb")
        except FileNotFoundError:  # not here, or evicted by somebody else just now
            return None
        except InputError:  # it was right when it came: the disk is to blame, and the store has it still
            path.unlink(missing_ok=True)
            return None

    def _downloaded(self, remote: RemotePath, path: Path, size_bytes: int, check: Callable[[Path], None]) -> BinaryIO:
        self._make_room(size_bytes)
        temporary = self.folder / f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
        try:
            with contextlib.suppress(FileNotFoundError):  # then the check finds no file
                download(remote, temporary)
            check(temporary)
            file = temporary.open("rb")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        return file

    def _make_room(self, size_bytes: int) -> None:
        """Delete the least recently used until there is room; before a download, so that the bound holds.

        Only what has a name of ours: somebody may keep other things in this folder.
        """
        kept: list[tuple[float, int, Path]] = []
        taken_bytes = size_bytes
        for path in self.folder.iterdir():
            is_coming = COMING.fullmatch(path.name)
            if not is_coming and not KEPT.fullmatch(path.name):
                continue
            with contextlib.suppress(FileNotFoundError):
                found = path.stat()
                if is_coming and time.time() - found.st_mtime > ABANDONED_SECONDS:
                    path.unlink()
                    continue
                taken_bytes += found.st_size
                if not is_coming:
                    kept.append((found.st_mtime, found.st_size, path))
        for _, file_bytes, path in sorted(kept):
            if taken_bytes <= self.limit_bytes:
                return
            path.unlink(missing_ok=True)
            taken_bytes -= file_bytes
