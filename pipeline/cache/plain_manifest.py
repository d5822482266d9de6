"""A manifest as plain data, and the seal by which a change of its tokenizer's parts is found."""

from __future__ import annotations

import dataclasses
from typing import Any

from pipeline.core.files import content_hash
from pipeline.core.types import InputError, Manifest, ShardInfo


def to_plain(value: Manifest | ShardInfo) -> dict[str, Any]:
    """What is written of a manifest or ShardInfo. A tokenizer that is not recorded is left out, as in older caches."""
    plain = dataclasses.asdict(value)
    return {name: field for name, field in plain.items() if name != "tokenizer" or field is not None}


def sealed(parts: dict[str, Any], tokenizer_sha256: str) -> dict[str, Any]:
    """The parts of a tokenizer with a hash over them, because they are not in the fingerprint."""
    return {**parts, "sha256": content_hash([parts, tokenizer_sha256])}


def check_seal(manifest: Manifest, path: object) -> None:
    """InputError if the parts of the tokenizer are not those that were recorded; `path` is the manifest's."""
    if manifest.tokenizer is None:
        return
    parts = {name: part for name, part in manifest.tokenizer.items() if name != "sha256"}
    if manifest.tokenizer != sealed(parts, manifest.made_of.get("tokenizer", "")):
        raise InputError(
            f"{path}: expected a manifest, found one that cannot be read (tokenizer: not the parts that were recorded); "
            "restore it from a copy, or capture into another folder"
        )
