"""The local folder of a model: given as a folder, as a glob that matches one, or as a name on the hub."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from typing import TypeVar

from pipeline.config.schema import ModelConfig
from pipeline.core.files import is_hub_name, one_path
from pipeline.core.types import InputError

C = TypeVar("C", bound=ModelConfig)


def model_folder(path: str, *, revision: str | None = None, with_code: bool = False) -> Path:
    """The local folder of a model; a model on the hub is downloaded first.

    `with_code` downloads its Python files too. InputError if nothing, or more than one path, is found.
    """
    if Path(path).is_dir():
        return Path(path)
    if not is_hub_name(path):
        return one_path(path, "model path")
    return _downloaded(path, revision, with_code)


def pinned(config: C) -> C:
    """The same options with the commit that a hub name means now: all processes of a run read the same files."""
    if not is_hub_name(config.path):
        return config
    folder = model_folder(config.path, revision=config.revision, with_code=config.trust_remote_code)
    return dataclasses.replace(config, revision=folder.name)  # snapshot_download names a folder by its commit


@cache
def _downloaded(path: str, revision: str | None, with_code: bool) -> Path:
    """The local copy of a model on the hub, resolved once per process: its name could mean another commit later."""
    import huggingface_hub  # here, because a local folder needs none of it

    # weights only as safetensors: a pickle can run code when it is loaded, so it is not even downloaded
    patterns = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
    if with_code:
        patterns.append("*.py")
    try:
        return Path(huggingface_hub.snapshot_download(path, revision=revision, allow_patterns=patterns))
    except (
        huggingface_hub.errors.HfHubHTTPError,
        huggingface_hub.errors.LocalEntryNotFoundError,
        OSError,
    ) as error:
        raise InputError(
            f"model path: expected {path!r} to be a folder or a model on the hub, found neither ({error}); check the "
            "name"
        ) from None
