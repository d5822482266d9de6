"""Find the plan of a capture from its options and from the names, sizes and times of its files.

A file whose size, times and inode have not changed counts as unchanged, as in `make` and git's index; if any of them
has changed, the files are read again. Nothing here imports torch, so a finished cache is recognised within a second.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.cache import manifest as manifests
from pipeline.capture.also_caches import also_fingerprints
from pipeline.config.options import identity_options
from pipeline.config.schema import CaptureConfig
from pipeline.core.files import content_hash, is_url
from pipeline.core.types import Manifest
from pipeline.data.text_files import open_text
from pipeline.models.paths import model_folder


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanFolder:
    """The folder of one plan: its manifest and, until they are captured, its tokenized sequences."""

    folder: Path
    """Its name: a hash of the cache's place, and one of the options and of each file's path, size, times and inode."""

    @property
    def sequences(self) -> Path:
        """Folder of the tokenized corpus, one file per shard; deleted when the cache is finished."""
        return self.folder / "sequences"

    def load(self) -> Manifest | None:
        """The planned manifest, or None if there is no plan yet."""
        return manifests.load_manifest(self.folder) if manifests.manifest_path(self.folder).exists() else None

    def delete_sequences(self, manifest: Manifest) -> None:
        """Delete the tokenized corpus of a finished cache, also that which another version of this package planned."""
        for folder in self.folder.parent.glob(f"{self.folder.name.split('-')[0]}-*"):
            with contextlib.suppress(FileNotFoundError, ValueError):
                planned = json.loads(manifests.manifest_path(folder).read_text())
                if planned["fingerprint"] == manifest.fingerprint:
                    shutil.rmtree(folder / self.sequences.name, ignore_errors=True)


def plan_folder(config: CaptureConfig) -> PlanFolder:
    """The plan folder of these options and of the files in their present state."""
    teacher = config.teacher
    folder = model_folder(teacher.path, revision=teacher.revision, with_code=teacher.trust_remote_code)
    files = [*open_text(config.corpus, "corpus").files, *sorted(path for path in folder.iterdir() if path.is_file())]
    files += sorted(path for path in folder.rglob("*.jinja") if path.parent != folder)
    if teacher.trust_remote_code:
        files += sorted(path for path in folder.rglob("*.py") if path.parent != folder)
    files += sorted(Path(__file__).parents[1].rglob("*.py"))  # another version of this package may plan differently
    # each cache has a plan of its own, because the plan's sequences are deleted when its cache is finished
    cache = config.cache or f"{config.caches_dir}/{config.name}"
    place = content_hash(cache if is_url(cache) else str(Path(cache).absolute()))
    digest = content_hash([identity_options(config), place, file_states(files), *also_fingerprints(config)])
    return PlanFolder(folder=plans_dir(config) / f"{place[:8]}-{digest[:16]}")


def plans_dir(config: CaptureConfig) -> Path:
    """The folder of all plans: always local, and inside `caches_dir` if this is local."""
    if config.plans_dir is not None:
        return Path(config.plans_dir)
    return Path("caches" if is_url(config.caches_dir) else config.caches_dir) / ".plans"


def file_states(paths: Sequence[Path]) -> list[tuple[str | int, ...]]:
    """Path, size, times and inode of each file: they change when the file does, and need no read of it."""
    states = [(path.resolve(), path.stat()) for path in paths]
    return [(str(path), s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for path, s in states]
