"""Where a model lies: a folder, a glob that matches one, or a name on the hub."""

from __future__ import annotations

from pathlib import Path

from pipeline.core.files import one_path
from pipeline.core.types import InputError


def is_hub_name(path: str) -> bool:
    """Whether this names a model on the hub (OWNER/NAME), and no folder or glob."""
    is_local = Path(path).is_dir() or any(letter in path for letter in "*?[") or path.startswith((".", "/"))
    return not is_local and path.count("/") == 1


def model_folder(path: str, *, revision: str | None = None, with_code: bool = False) -> Path:
    """The local folder of a model: a folder, a glob matching one, or a hub name (downloaded, then local)."""
    if Path(path).is_dir():
        return Path(path)
    if not is_hub_name(path):
        return one_path(path, "model path")
    import huggingface_hub  # here, because a local folder needs none of it

    try:
        # weights only as safetensors: a pickle from a stranger is never even downloaded
        patterns = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"] + ["*.py"] * with_code
        return Path(huggingface_hub.snapshot_download(path, revision=revision, allow_patterns=patterns))
    except (
        huggingface_hub.errors.HfHubHTTPError,
        huggingface_hub.errors.LocalEntryNotFoundError,
        OSError,
    ) as error:
        raise InputError(
            f"model path: expected {path!r} to be a folder or a model on the hub, found neither ({error}); check it"
        ) from None
