"""Runs that learnt from a pool of several captures: what the pool is made of, from the manifest of its cache."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.cache.manifest import load_manifest
from pipeline.core.files import content_hash, is_url, matching_paths, write_json
from pipeline.core.object_store import one_location
from pipeline.core.types import InputError

FILE = "pool.json"
NO_SETTING = ("schema_version", "tokenizer", "targets", "complete", "fit")
"""What a pool takes from its members; and how its weights were found, which are settings themselves."""


def pool_of(cache: str | None, fingerprint: str | None) -> Mapping[str, Any] | None:
    """What the pool in a cache is made of; None for a capture, and where the cache is gone or another one by now.

    `cache`: as in the options of a run; `fingerprint`: of the cache that it has read.
    """
    if cache is None:
        return None
    places = [cache] if is_url(cache) else matching_paths(cache)  # a study may have several pools by now
    found = dict(parts for place in places if (parts := _fingerprint_and_parts(str(place))) is not None)
    made_of = found.get(fingerprint or "")
    return made_of if made_of is not None and "pool" in made_of else None


@functools.cache
def _fingerprint_and_parts(cache: str) -> tuple[str, Mapping[str, Any]] | None:
    try:
        manifest = load_manifest(one_location(cache, "cache"))
    except (InputError, OSError):
        return None
    return manifest.fingerprint, manifest.made_of


def keep_pool(folder: Path, pool: Mapping[str, Any] | None) -> None:
    """Write what a pool is made of into the copy of a run that has read it, which may outlive the cache."""
    if pool is not None:
        write_json(folder / FILE, dict(pool))


def kept_pool(folder: Path) -> Mapping[str, Any] | None:
    """What `keep_pool` wrote; None where it wrote nothing."""
    path = folder / FILE
    return dict(json.loads(path.read_text())) if path.exists() else None


def is_made_from(pool: Mapping[str, Any] | None, fingerprint: str) -> bool:
    """Whether a capture is a member of a pool, or one of the captures that are read as one member."""
    return pool is not None and fingerprint in json.dumps(pool["members"])


def settings_of(pool: Mapping[str, Any]) -> dict[str, Any]:
    """What tells two pools apart, by names of options: kind, weights, temperature, and a hash of the members."""
    found = {
        f"pool.{'kind' if name == 'pool' else name}": value for name, value in pool.items() if name not in NO_SETTING
    }
    return found | {
        "pool.round": pool.get("round", 1),
        "pool.weights": "/".join(f"{weight:.3g}" for weight in pool["weights"]),
        "pool.members": content_hash(pool["members"])[:8],
    }
