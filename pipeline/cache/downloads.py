"""Downloads: parts of remote shards in a local folder of bounded size, which ranks and runs may share."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import re
import secrets
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pipeline.cache.shard_parts import Part
from pipeline.core.file_systems import flock
from pipeline.core.object_store import Location, RemotePath, download
from pipeline.core.progress import log
from pipeline.core.types import InputError

NAME = r"[0-9a-f]{64}(-\d+)?"  # of a shard, or of a part of it
DOWNLOADED, UNFINISHED = re.compile(NAME), re.compile(rf"\.{NAME}\.\d+\.[0-9a-f]{{8}}\.tmp")
ABANDONED_SECONDS = 3600.0  # a download that did not grow for this long belongs to a killed process


@contextlib.contextmanager
def local_copy(place: Location) -> Iterator[Path]:
    """A file itself, or a download of an object that is deleted afterwards; no file where there is none."""
    if isinstance(place, Path):
        yield place
        return
    with tempfile.TemporaryDirectory(prefix="shard-") as folder:
        with contextlib.suppress(FileNotFoundError):
            download(place, Path(folder) / place.name)
        yield Path(folder) / place.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Downloads:
    """A local folder of shards and parts of shards, each named by the shard's sha256, and its limit in bytes."""

    folder: Path
    limit_bytes: int
    """The least recently used are deleted first; one that is larger than this is kept alone."""

    def fetch(self, remote: RemotePath, part: Part, *, check: Callable[[Path], None], trusted: bool) -> BinaryIO:
        """An open file with a part of an object; it stays readable even if its name is deleted meanwhile.

        `check` raises InputError for a file with wrong bytes, which is then downloaded once more. It is called for
        every download and, unless `trusted`, for a file that was downloaded before.
        """
        path, num_bytes = self.folder / part.name, part.end - part.start
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._locked(part.name):  # the ranks of a run need the same part at the same time: one downloads it
                file = self._open_downloaded(path, None if trusted else check)
                return file or self._download(remote, part, path, check)
        except OSError as error:
            raise InputError(
                f"downloads: expected to keep a part of {num_bytes} bytes of a shard in {self.folder}, found "
                f"{error.strerror or error}; make room, or change downloads.dir and downloads.bytes"
            ) from error

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Exclude other processes; the parts whose names have a like hash share a lock, so there are at most 256 files.

        Without locks two ranks may download the same part: each into a file of its own, and the second replaces the
        first by the same bytes.
        """
        with (self.folder / f".{zlib.crc32(name.encode()) % 256:02x}.lock").open("a") as lock:
            if not flock(lock, fcntl.LOCK_EX):
                _log_without_locks(self.folder)
            yield

    def _open_downloaded(self, path: Path, check: Callable[[Path], None] | None) -> BinaryIO | None:
        """The file of an earlier download, or None where there is none or its bytes are wrong."""
        try:
            os.utime(path)
            if check is not None:
                check(path)
            return path.open("rb")
        except FileNotFoundError:  # never downloaded, or deleted by another process just now
            return None
        except InputError:  # it was right after the download, so the disk damaged it: download it again
            path.unlink(missing_ok=True)
            return None

    def _download(self, remote: RemotePath, part: Part, path: Path, check: Callable[[Path], None]) -> BinaryIO:
        self._make_room(part.end - part.start)
        temporary = self.folder / f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
        try:
            for is_last_try in (False, True):
                with contextlib.suppress(FileNotFoundError):  # then the check finds no file
                    download(remote, temporary, part.start, part.end)
                try:
                    check(temporary)
                    break
                except InputError:  # damaged on its way, or in the store
                    if is_last_try:
                        raise
            file = temporary.open("rb")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        return file

    def _make_room(self, size_bytes: int) -> None:
        """Delete the least recently used parts until `size_bytes` fit; before a download, so that the limit holds.

        Only files with a name that this class gives are deleted: the folder may hold other files too.
        """
        downloaded: list[tuple[float, int, Path]] = []
        used_bytes = size_bytes
        for path in self.folder.iterdir():
            is_unfinished = UNFINISHED.fullmatch(path.name)
            if not is_unfinished and not DOWNLOADED.fullmatch(path.name):
                continue
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                if is_unfinished and time.time() - status.st_mtime > ABANDONED_SECONDS:
                    path.unlink()
                    continue
                used_bytes += status.st_size
                if not is_unfinished:
                    downloaded.append((status.st_mtime, status.st_size, path))
        for _, file_bytes, path in sorted(downloaded):
            if used_bytes <= self.limit_bytes:
                return
            path.unlink(missing_ok=True)
            used_bytes -= file_bytes


@functools.cache  # once a process
def _log_without_locks(folder: Path) -> None:
    log.info("%s: its file system has no file locks (flock), so each rank downloads what it needs", folder)
