"""A folder mounted through FUSE that passes everything on to another folder, except what it is told to refuse.

`python fuse_folder.py FOLDER MOUNT_POINT links locks ...` runs until it is unmounted.
"""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Any

import mfusepy


class Folder(mfusepy.Operations):
    use_ns = True

    def __init__(self, folder: str, refused: set[str]) -> None:
        self._folder, self._refused = folder, refused

    def _path(self, path: str) -> Path:
        return Path(self._folder + path)

    def _unless_refused(self, ability: str, number: int) -> None:
        if ability in self._refused:
            raise mfusepy.FuseOSError(number)

    def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
        found = self._path(path).lstat()
        kept = ("st_mode", "st_nlink", "st_uid", "st_gid", "st_size", "st_ino")
        times = {name: getattr(found, f"{name}_ns") for name in ("st_atime", "st_mtime", "st_ctime")}
        return {name: getattr(found, name) for name in kept} | times

    def readdir(self, path: str, fh: int) -> list[str]:
        return [".", "..", *(found.name for found in self._path(path).iterdir())]

    def create(self, path: str, mode: int, fi: Any = None) -> int:
        return os.open(self._path(path), os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)

    def open(self, path: str, flags: int) -> int:
        return os.open(self._path(path), flags & ~os.O_CREAT & ~os.O_APPEND)  # the kernel says where to write

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        return os.pread(fh, size, offset)

    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        return os.pwrite(fh, data, offset)

    def truncate(self, path: str, length: int, fh: int | None = None) -> int:
        os.truncate(self._path(path), length)
        return 0

    def release(self, path: str, fh: int) -> int:
        os.close(fh)
        return 0

    def unlink(self, path: str) -> int:
        self._path(path).unlink()
        return 0

    def mkdir(self, path: str, mode: int) -> int:
        self._path(path).mkdir(mode)
        return 0

    def rmdir(self, path: str) -> int:
        self._path(path).rmdir()
        return 0

    def rename(self, old: str, new: str, flags: int = 0) -> int:
        if self._path(old).is_dir():
            self._unless_refused("rename_folder", errno.ENOSYS)
        elif self._path(new).exists():
            self._unless_refused("rename_over", errno.EEXIST)
        self._path(old).rename(self._path(new))
        return 0

    def link(self, target: str, source: str) -> int:
        self._unless_refused("links", errno.EPERM)
        os.link(self._path(source), self._path(target))
        return 0

    def utimens(self, path: str, times: tuple[int, int] | None = None) -> int:
        self._unless_refused("touch", errno.ENOSYS)
        os.utime(self._path(path), ns=times)
        return 0

    def chmod(self, path: str, mode: int) -> int:
        self._path(path).chmod(mode)
        return 0

    def statfs(self, path: str) -> dict[str, int]:
        found = os.statvfs(self._path(path))
        return {name: getattr(found, name) for name in ("f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail")}

    def fsyncdir(self, path: str, datasync: int, fh: int) -> int:
        self._unless_refused("sync_folder", errno.EINVAL)
        return 0


class FolderWithoutLocks(Folder):
    """Where FUSE is given no answer about locks, the kernel keeps them within the machine."""

    def flock(self, path: str, fh: int, operation: int) -> int:
        raise mfusepy.FuseOSError(errno.ENOSYS)


if __name__ == "__main__":
    folder, mount_point, *refused = sys.argv[1:]
    kind = FolderWithoutLocks if "locks" in refused else Folder
    mfusepy.FUSE(kind(folder, set(refused)), mount_point, foreground=True, nothreads=False)
