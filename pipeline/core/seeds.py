"""Random seeds, computed only from what they are for: the same inputs draw the same numbers on any machine.

There are two functions, and existing runs and caches depend on both. `seed_from_bytes` seeds the order of a run's data
and the draws of a sampled cache; `seed_from_values` seeds everything else. A change of either one would change the
content of runs and caches without changing their fingerprint.
"""

from __future__ import annotations

import hashlib

from pipeline.core.files import content_hash


def seed_from_bytes(data: bytes) -> int:
    """A 63-bit seed from the blake2b hash of `data`."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 1


def seed_from_values(*values: int) -> int:
    """A 60-bit seed from the sha256 hash of the values, written as a JSON list."""
    return int(content_hash(list(values))[:15], 16)
