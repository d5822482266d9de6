"""The caches of also_ids: which they are, and whether they are of this capture's sequences.

Nothing here imports torch, so a finished cache is recognised within a second.
"""

from __future__ import annotations

from typing import Any

from pipeline.cache import manifest as manifests
from pipeline.config.schema import CaptureConfig
from pipeline.config.validate import MAX_KEPT
from pipeline.core.files import is_url, matching_paths
from pipeline.core.object_store import Location, open_location
from pipeline.core.types import InputError, Manifest


def also_caches(also_ids: str | None) -> list[tuple[Location, Manifest]]:
    """The caches of an address, path or glob: one, or the captures of several parts of a corpus; none without it."""
    if also_ids is None:
        return []
    places: list[Location] = [open_location(also_ids)] if is_url(also_ids) else [*matching_paths(also_ids)]
    if not places:
        raise InputError(f"also_ids: expected {also_ids!r} to be a cache, found nothing there; capture it first")
    return [(place, manifests.load_manifest(place)) for place in places]


def also_fingerprints(config: CaptureConfig) -> list[str]:
    """The fingerprints of the caches of also_ids, sorted."""
    return sorted(manifest.fingerprint for _, manifest in also_caches(config.also_ids))


def of_also_ids(config: CaptureConfig, num_records: int) -> dict[str, Any]:
    """What a capture with also_ids is made of; InputError if its caches are of another number of records."""
    found = also_caches(config.also_ids)
    for place, manifest in found:
        _check("num_records", num_records, manifest.num_records, place)
    if not found:
        return {}
    most_kept = max(manifest.most_kept for _, manifest in found)
    return {"also_ids": {"fingerprints": also_fingerprints(config), "most_kept": most_kept}}


def check_also_ids(config: CaptureConfig, tokenizer_sha256: str, vocabulary_size: int) -> None:
    """InputError if a cache of also_ids is not complete, or cannot be of the same sequences; before the corpus is read.

    That it is of the same sequences follows from their keys, which are compared when they are captured.
    """
    for place, manifest in also_caches(config.also_ids):
        manifests.committed_shards(place, manifest)
        _check("tokenizer", tokenizer_sha256, manifest.made_of.get("tokenizer"), place)
        _check("vocabulary_size", vocabulary_size, manifest.vocabulary_size, place)
        _check("window", config.window, manifest.window, place)
        _check("records_per_shard", config.records_per_shard, manifest.records_per_shard, place)
        if config.k + manifest.most_kept > MAX_KEPT:
            raise InputError(
                f"also_ids: expected at most {MAX_KEPT} kept entries a position, found {config.k} of k and up to "
                f"{manifest.most_kept} of {place}; choose a smaller k"
            )


def _check(name: str, expected: object, found: object, place: Location) -> None:
    if found != expected:
        raise InputError(
            f"also_ids: expected a cache of the same sequences, found {name} {found} in {place} and {expected} here; "
            "capture both with the same corpus, tokenizer and options"
        )
