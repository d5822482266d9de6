"""Seeds as pure functions of what they stand for: the same inputs draw the same numbers on any machine.

Two schemes, because both are part of what exists: `seed_from_bytes` decides the order of a run's data and the draws of
a sampled cache, `seed_from_values` everything else. Changing either changes runs and caches without a new fingerprint.
"""

from __future__ import annotations

import hashlib

from pipeline.core.files import content_hash


def seed_from_bytes(data: bytes) -> int:
    """63 bits of blake2b."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 1


def seed_from_values(*values: int) -> int:
    """60 bits of the sha256 of a JSON list."""
    return int(content_hash(list(values))[:15], 16)
