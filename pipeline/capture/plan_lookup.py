"""Which plan a capture's options and files ask for, known from their names, sizes and times alone.

Like `make` and git's index, this trusts a file whose size, times and inode are what they were; anything else is read
again. No torch here: a cache that is whole is recognised within a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.cache import manifest as manifests
from pipeline.config.options import identity_options
from pipeline.config.schema import CaptureConfig
from pipeline.core.files import content_hash, is_url
from pipeline.core.types import Manifest
from pipeline.data.records import open_text
from pipeline.models.paths import model_folder


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanFolder:
    """A plan that is asked for, and where it is kept."""

    folder: Path
    """Named by a hash of the options and of each file's path, size, times and inode."""

    @property
    def sequences(self) -> Path:
        """Folder of the tokenized corpus, a file a shard; gone when all of it is captured."""
        return self.folder / "sequences"

    def load(self) -> Manifest | None:
        """The plan, if it was made."""
        return manifests.load_manifest(self.folder) if manifests.manifest_path(self.folder).exists() else None


def plan_folder(config: CaptureConfig) -> PlanFolder:
    """The request that these options make, of files as they are now."""
    teacher = config.teacher
    folder = model_folder(teacher.path, revision=teacher.revision, with_code=teacher.trust_remote_code)
    files = [*open_text(config.corpus, "corpus").files, *sorted(path for path in folder.iterdir() if path.is_file())]
    files += sorted(Path(__file__).parents[1].rglob("*.py"))  # another version of us may plan otherwise
    where = [config.cache, config.caches_dir]  # a plan is of one cache: its sequences go when that is whole
    asked = content_hash([identity_options(config), where, state_of(files)])
    return PlanFolder(folder=plans_dir(config) / asked[:16])


def plans_dir(config: CaptureConfig) -> Path:
    """Where plans are kept: always local, beside the caches where these are local too."""
    if config.plans_dir is not None:
        return Path(config.plans_dir)
    return Path("caches" if is_url(config.caches_dir) else config.caches_dir) / ".plans"


def state_of(paths: Sequence[Path]) -> list[tuple[str | int, ...]]:
    """What tells whether files are still the same without reading them: size, times and inode."""
    states = [(path.resolve(), path.stat()) for path in paths]
    return [(str(path), s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for path, s in states]
