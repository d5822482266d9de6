"""The file names of a run folder, writes that survive a crash, and hashes of content."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.types import InputError

# what fsync of a folder, or opening one for it, gives on some network file systems
NO_FOLDER_SYNC = (errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EISDIR, errno.EACCES)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPaths:
    """The paths of all files and folders in the folder of one training run."""

    folder: Path

    @property
    def config(self) -> Path:
        """The resolved configuration of the run."""
        return self.folder / "config.yaml"

    @property
    def identity(self) -> Path:
        """The values whose hash is in the folder's name: options that change the result, and hashes of the inputs."""
        return self.folder / "identity.json"

    @property
    def environment(self) -> Path:
        """The command that started the run last, versions of libraries, and the machine: `core.runtime.environment`."""
        return self.folder / "environment.json"

    @property
    def trust(self) -> Path:
        """The score by which the teacher is trusted, learnt on gold; exists only if the run reads one."""
        return self.folder / "trust.json"

    @property
    def lock(self) -> Path:
        """Locked by the driver, which it names, during the run. If that dies, the ranks' launcher holds the lock."""
        return self.folder / "lock"

    @property
    def state(self) -> Path:
        """What the last command on this run did, and why it ended: `core.run_state`; shown by scripts/status.py."""
        return self.folder / "state.json"

    @property
    def lease(self) -> Path:
        """Renewed during the run by the driver and the first rank: it keeps commands on other machines away."""
        return self.folder / "lease"

    @property
    def stop(self) -> Path:
        """If this file exists, the ranks save a checkpoint after the current step and exit."""
        return self.folder / "stop-requested"

    @property
    def inputs(self) -> Path:
        """Gold and held-out texts as tokens, for the ranks; gone when the run is finished."""
        return self.folder / "inputs"

    @property
    def log(self) -> Path:
        """The log lines of rank 0."""
        return self.folder / "log.txt"

    @property
    def metrics(self) -> Path:
        """The metrics: one line with one JSON object per step."""
        return self.folder / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """The event files of TensorBoard; exists only if that tracker is on."""
        return self.folder / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        """The checkpoints of DeepSpeed: one folder per saved step."""
        return self.folder / "checkpoints"

    @property
    def published(self) -> Path:
        """Names the newest complete checkpoint; replaced atomically."""
        return self.checkpoints / "published.json"

    @property
    def model(self) -> Path:
        """The trained student and its tokenizer, in the format that `from_pretrained` loads."""
        return self.folder / "model"

    @property
    def adapter(self) -> Path:
        """The adapter without the base model, in the format that peft loads; exists only if an adapter was trained."""
        return self.folder / "adapter"

    def predictions(self, split: str) -> Path:
        """The predictions on `split` (dev, test or one of more_tests): one row per held-out record."""
        return self.folder / f"predictions-{split}.parquet"

    @property
    def result(self) -> Path:
        """The scores; exists only if the run has finished."""
        return self.folder / "result.json"


def write_atomically(path: Path, text: str) -> None:
    """Replace the file by `text`. A reader, or a crash, finds the complete old file or the complete new file."""
    # a random token, because processes in containers on several machines may share a PID
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write plain data atomically as readable JSON: indented, with the keys in the given order."""
    write_atomically(path, json.dumps(value, indent=2) + "\n")


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield the path of a temporary folder, which the caller creates and fills; it then replaces `folder`.

    The files are flushed to disk before the replacement, and have the mode that the umask gives, also those that a
    library made for their owner alone. After an error, `folder` is as it was.
    """
    unfinished = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    yield unfinished
    apply_umask(unfinished)
    sync_files(unfinished)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    sync_folder(folder.parent)


def apply_umask(folder: Path) -> None:
    """Give the files of a new folder and of its subfolders the mode of files that `open` makes: 0666 less the umask.

    safetensors, for example, makes its files for their owner alone (0600). The folder itself shows the umask.
    """
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            with contextlib.suppress(PermissionError):  # a file system without modes
                path.chmod(mode)


def explain(folder: Path, text: str) -> None:
    """Leave a README.txt in a folder whose purpose its name does not show; one that is there stays."""
    if not (folder / "README.txt").exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "README.txt", text)


def sync_files(folder: Path) -> None:
    """Flush the files of a folder and of its subfolders, and their names, to disk."""
    for path in folder.iterdir():
        if path.is_dir():
            sync_files(path)
            continue
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)


def sync_folder(folder: Path) -> bool:
    """Flush the entries of a folder (names, not contents) to disk, so that a rename survives a power loss.

    False where the file system does not do that for folders: PostgreSQL goes on there too.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in NO_FOLDER_SYNC:
            raise
        return False
    return True


def content_hash(value: Any) -> str:
    """sha256 (hex) of plain data, written as JSON with sorted keys and no spaces."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def file_hash(path: Path) -> str:
    """sha256 (hex) of the bytes of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def is_url(location: str) -> bool:
    """Whether a location is a URL rather than a local path."""
    return "://" in location


def is_hub_name(path: str) -> bool:
    """Whether a model's path is a name on the Hugging Face hub (OWNER/NAME), and not a folder that exists or a glob."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) is not None and not Path(path).is_dir()


def matching_paths(pattern: str) -> list[Path]:
    """The paths that a path or a glob stands for, sorted; what exists under exactly that name is no glob."""
    path = Path(pattern)
    if path.exists():
        return [path]
    # nor are the folders above: in data[v2]/*.jsonl only the last part is a pattern
    existing = next((parent for parent in path.parents if parent.exists()), Path())
    rest = str(path.relative_to(existing)) + "/" * pattern.endswith("/")
    return sorted(existing / found for found in glob.glob(rest, root_dir=existing, recursive=True))


def check_writable(folder: Path, option: str) -> None:
    """Create a folder and write into it for a moment; InputError, which names `option`, where that is not possible.

    It is called before long work, whose result would have no place otherwise.
    """
    probe = folder / f".{secrets.token_hex(8)}.probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(probe, " " * 4096)  # on a full disk an empty file can still be created
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"{option}: expected a folder to write into, found {error.strerror} ({folder}); choose another with "
            f"{option}=, or make room"
        ) from error


def one_path(pattern: str, option: str) -> Path:
    """The only path that matches a path or glob; InputError, which names `option`, if none or several match."""
    paths = matching_paths(pattern)
    if len(paths) != 1:
        found = ", ".join(map(str, paths)) if paths else "nothing"
        raise InputError(f"{option}: expected {pattern!r} to match one path, found {found}; check or narrow it")
    return paths[0]
