"""Files: the names in a run folder, writes that survive a crash, hashes of content."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.types import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPaths:
    """Every file name of a run folder."""

    folder: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.folder / "config.yaml"

    @property
    def identity(self) -> Path:
        """All that the hash in the folder's name was made of."""
        return self.folder / "identity.json"

    @property
    def lock(self) -> Path:
        """Held by the driver, and by the ranks' launcher should the driver die."""
        return self.folder / "lock"

    @property
    def stop(self) -> Path:
        """Exists when somebody wants the run to save and leave."""
        return self.folder / "stop-requested"

    @property
    def log(self) -> Path:
        """Rank 0's log lines."""
        return self.folder / "log.txt"

    @property
    def metrics(self) -> Path:
        """One JSON object a step."""
        return self.folder / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's event files, where that tracker was asked for."""
        return self.folder / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        """DeepSpeed's checkpoints, one folder a step."""
        return self.folder / "checkpoints"

    @property
    def published(self) -> Path:
        """Names the newest whole checkpoint; replaced atomically."""
        return self.checkpoints / "published.json"

    @property
    def model(self) -> Path:
        """The trained student with its tokenizer, as `from_pretrained` reads it."""
        return self.folder / "model"

    @property
    def adapter(self) -> Path:
        """The adapter alone, as peft reads it, where one was trained."""
        return self.folder / "adapter"

    def predictions(self, split: str) -> Path:
        """One row a held-out record of dev or test."""
        return self.folder / f"predictions-{split}.parquet"

    @property
    def result(self) -> Path:
        """Scores; exists only when the run is finished."""
        return self.folder / "result.json"


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by `text` so that a reader, or a crash, sees the old file or the new one, whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write plain data atomically as JSON for people: indented, keys in the given order."""
    write_atomically(path, json.dumps(value, indent=2) + "\n")


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Fill the yielded folder; under the name of `folder` it appears when it is whole and durable."""
    unfinished = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    yield unfinished
    sync_files(unfinished)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    sync_folder(folder.parent)


def sync_files(folder: Path) -> None:
    """Make the files of a folder durable."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder as durable as the files."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def content_hash(value: Any) -> str:
    """sha256 of plain data as canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def file_hash(path: Path) -> str:
    """sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def one_path(pattern: str, what: str) -> Path:
    """The one existing path that a name or glob stands for."""
    found = sorted(glob.glob(pattern))
    if len(found) != 1:
        listed = "nothing" if not found else ", ".join(found)
        raise InputError(f"{what}: expected {pattern!r} to match one path, found {listed}; check or narrow it")
    return Path(found[0])


def is_hub_name(path: str) -> bool:
    """Whether a model's path is a name on the Hugging Face hub (OWNER/NAME), and not a folder that exists or a glob."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) is not None and not Path(path).is_dir()
