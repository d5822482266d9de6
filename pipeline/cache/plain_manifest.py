"""A manifest as plain data, its comparison with other inputs, and the seal on what its fingerprint does not cover."""

from __future__ import annotations

import dataclasses
from typing import Any

from pipeline.core.files import content_hash
from pipeline.core.object_store import Location
from pipeline.core.types import InputError, Manifest, ShardInfo

SEALED = ("tokenizer", "skipped")  # fields that the fingerprint does not cover
LATER = (*SEALED, "part_ends", "part_hashes")  # fields that older caches lack


def to_plain(value: Manifest | ShardInfo) -> dict[str, Any]:
    """What is written of a manifest or ShardInfo; what is not recorded in old caches is left out."""
    plain = dataclasses.asdict(value)
    return {name: field for name, field in plain.items() if name not in LATER or field not in (None, ())}


def sealed(parts: dict[str, Any], tokenizer_sha256: str) -> dict[str, Any]:
    """Some values with a hash over them, because they are not in the fingerprint."""
    return {**parts, "sha256": content_hash([parts, tokenizer_sha256])}


def check_seal(manifest: Manifest, path: object) -> None:
    """InputError if a field outside the fingerprint is not what was recorded; `path` is the manifest's."""
    for name in SEALED:
        recorded = getattr(manifest, name)
        if recorded is None:
            continue
        parts = {key: part for key, part in recorded.items() if key != "sha256"}
        if recorded != sealed(parts, manifest.made_of.get("tokenizer", "")):
            raise InputError(
                f"{path}: expected a manifest, found one that cannot be read ({name}: not what was recorded); restore "
                "it from a copy, or capture into another folder"
            )


def check_same_inputs(found: Manifest, made_of: dict[str, Any], cache: Location) -> None:
    """Raise InputError for a cache that was made of other inputs, with the fields that differ."""
    differing = sorted(
        key for key in made_of.keys() | found.made_of.keys() if made_of.get(key) != found.made_of.get(key)
    )
    if differing:
        lines = [f"  {key}: expected {made_of.get(key)!r}, found {found.made_of.get(key)!r}" for key in differing]
        raise InputError(
            f"{cache} was made of something else; capture into another folder or delete it:\n" + "\n".join(lines)
        )
