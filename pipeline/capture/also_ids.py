"""The ids that other caches kept at the positions of some sequences; sequences are joined by key.

A shard of a plan holds the same records in every capture of the corpus. So only the keys of one shard and one row group
of each cache are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from torch import Tensor

from pipeline.cache.downloads import Downloads
from pipeline.cache.shards import ShardReader
from pipeline.capture.also_caches import also_caches
from pipeline.config.schema import CaptureConfig
from pipeline.core.topk import kept_ids
from pipeline.core.types import InputError, Manifest, TokenSequence, TopK


class AlsoIds:
    """Access to the kept ids of a cache, or of the captures of several parts of a corpus, by sequence."""

    def __init__(self, readers: Sequence[ShardReader]) -> None:
        self._readers = readers
        self._places = lru_cache(maxsize=len(readers))(lambda number, shard: readers[number].places(shard))

    def of(self, sequences: Sequence[TokenSequence]) -> Tensor:
        """int64 [N, J]: what was kept at all their positions, -1 for no entry; InputError if one is missing."""
        return kept_ids(TopK.cat([self._top_of(sequence) for sequence in sequences]))

    def _top_of(self, sequence: TokenSequence) -> TopK:
        found = []
        for number, reader in enumerate(self._readers):
            shard = sequence.record_ids[0] // reader.manifest.records_per_shard
            if place := self._places(number, shard).get(sequence.key):
                found.append(reader.row(*place)[1].top)
        if len(found) != 1:
            where = ", ".join(str(reader.cache) for reader in self._readers)
            raise InputError(
                f"also_ids: expected the sequence of record {sequence.record_ids[0]} (counted from 0) once in {where}, "
                f"found it {len(found)} times; give a cache of the same corpus and options, or those of all its parts"
            )
        return found[0]


def also_ids_of(config: CaptureConfig, manifest: Manifest, sequences: Sequence[TokenSequence]) -> Tensor | None:
    """int64 [N, J]: what the caches of also_ids kept at their positions, -1 for no entry; None without them."""
    if config.also_ids is None:
        return None
    fingerprints = tuple(manifest.made_of["also_ids"]["fingerprints"])
    return _open(config.also_ids, fingerprints, config.downloads.dir, config.downloads.bytes).of(sequences)


@lru_cache(maxsize=1)
def _open(also_ids: str, fingerprints: tuple[str, ...], downloads_dir: str, downloads_bytes: int) -> AlsoIds:
    """The caches of a worker, opened once: each reads the description of all its shards."""
    downloads = Downloads(folder=Path(downloads_dir), limit_bytes=downloads_bytes)
    readers = [ShardReader(place, downloads=downloads) for place, _ in also_caches(also_ids)]
    found = sorted(reader.manifest.fingerprint for reader in readers)
    if found != list(fingerprints):
        raise InputError(
            f"also_ids: expected the caches {', '.join(one[:12] for one in fingerprints)} of the plan in {also_ids}, "
            f"found {', '.join(one[:12] for one in found)}; run the same command again"
        )
    return AlsoIds(readers)
