"""ShardWriter and ShardReader: both halves of the contract between the stages."""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
import os
import secrets
import tempfile
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import lru_cache, partial
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from pipeline.cache import manifest as manifests
from pipeline.cache.downloads import Downloads
from pipeline.cache.schema import ENCODING, arrow_schema, decode, encode
from pipeline.core.object_store import Location
from pipeline.core.seeds import seed_from_values
from pipeline.core.topk import log_probabilities, narrow
from pipeline.core.types import Captured, InputError, Manifest, ShardInfo, TokenSequence, TopK

pa.set_memory_pool(pa.system_memory_pool())  # malloc's, so that what keeps its memory (`keep_memory`) keeps Arrow's too

ROW_GROUP_BYTES = 16 << 20  # before compression; a unit of reading and of shuffling


def shuffle_positions(
    rows: Sequence[tuple[TokenSequence, Captured]], *, seed: Sequence[int]
) -> list[tuple[TokenSequence, Captured]]:
    """The same sequences, each position with what was captured at another one of them: a control without knowledge."""
    counts = [len(sequence.target_ids_N) for sequence, _ in rows]
    generator = torch.Generator().manual_seed(seed_from_values(*seed))
    order_N = torch.randperm(sum(counts), generator=generator)
    source_N = torch.empty_like(order_N)
    source_N[order_N] = order_N.roll(1)  # a single cycle: no position keeps its own
    moved = Captured.cat([captured for _, captured in rows]).select(source_N)
    return [(sequence, part) for (sequence, _), part in zip(rows, moved.split(counts), strict=True)]


def retained_mass_histogram(top: TopK) -> torch.Tensor:
    """Positions by the probability that the kept entries hold at T = 1, in ten equal bins: [10] int64."""
    log_p_NK, _ = log_probabilities(top, temperature=1.0)
    retained_N = log_p_NK.exp().sum(dim=1).clamp(0.0, 1.0)
    return torch.histc(retained_N, bins=10, min=0.0, max=1.0).long()


class ShardWriter:
    """Writes one shard into a temporary file and publishes it whole; leaving it early leaves nothing behind."""

    def __init__(self, cache: Location, manifest: Manifest, index: int, *, folder: Path) -> None:
        self._cache, self._manifest, self._index = cache, manifest, index
        self._temporary = folder / f".{index:05d}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
        self._schema = arrow_schema(
            varies=manifest.varies,
            completed="complete" in manifest.made_of,
            metadata={
                "fingerprint": manifest.fingerprint,
                "schema_version": str(manifest.schema_version),
                # the one promise that neither the fingerprint nor the rows would miss if it were changed
                "vocabulary_size": str(manifest.vocabulary_size),
            },
        )
        self._rows: list[tuple[TokenSequence, Captured]] = []
        self._rows_bytes = self._targets = 0
        self._histogram = torch.zeros(10, dtype=torch.int64)
        self._file = pq.ParquetWriter(
            self._temporary,
            self._schema,
            compression="zstd",
            use_dictionary=False,
            column_encoding={name: how for name, how in ENCODING.items() if name.split(".")[0] in self._schema.names},
            write_page_checksum=True,
        )

    def write(self, sequence: TokenSequence, captured: Captured) -> None:
        """Append one sequence."""
        self._rows.append((sequence, captured))
        self._targets += len(sequence.target_positions_N)
        self._rows_bytes += 4 * (len(sequence.input_ids_S) + captured.top.ids_NK.numel())
        if self._rows_bytes >= ROW_GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._histogram += retained_mass_histogram(TopK.cat([captured.top for _, captured in self._rows]))
            self._file.write_table(encode(self._rows, self._schema), row_group_size=len(self._rows))
            self._rows, self._rows_bytes = [], 0

    def commit(self, *, num_skipped: int) -> None:
        """Publish the shard: fsync, re-open and check, link or upload, ShardInfo last."""
        self._flush()
        histogram = self._histogram.tolist()
        self._file.add_key_value_metadata(
            manifests.footer_totals(targets=self._targets, num_skipped=num_skipped, histogram=histogram)
        )
        self._file.close()
        with self._temporary.open("rb") as file:
            os.fsync(file.fileno())
        # at an exact address two captures may have begun at once, of which the manifest names one
        manifests.check_same_inputs(manifests.load_manifest(self._cache), self._manifest.made_of, self._cache)
        manifests.commit_shard(self._cache, self._temporary, self._index)

    def abandon(self) -> None:
        """Remove the temporary file of a shard that was not committed."""
        with contextlib.suppress(OSError):
            self._file.close()
        self._temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def shard_writer(cache: Location, manifest: Manifest, index: int) -> Iterator[ShardWriter]:
    """A ShardWriter whose temporary file, local even where the cache is not, does not outlive an error."""
    writer = None
    try:
        if isinstance(cache, Path):
            writer = ShardWriter(cache, manifest, index, folder=cache / "shards")
            yield writer
        else:
            with tempfile.TemporaryDirectory(prefix="shard-") as folder:
                writer = ShardWriter(cache, manifest, index, folder=Path(folder))
                yield writer
    except BaseException as error:
        if writer is not None:
            writer.abandon()
        if isinstance(error, OSError):
            raise InputError(
                f"{cache}: expected to write shard {index}, found {error.strerror or error}; nothing is lost: "
                "make room or mend it, and run the same command again"
            ) from error
        raise


class ShardReader:
    """Random access to the sequences of a whole cache by (block, row); a block is a row group of a shard.

    A shard's bytes are checked against its ShardInfo before its first row is used. The last `cached_blocks` decoded
    blocks stay in memory. A remote cache is read through `downloads`, whole shards at a time.
    """

    def __init__(
        self,
        cache: Location,
        *,
        k: int | None = None,
        downloads: Downloads | None = None,
        shuffle_seed: int | None = None,
        cached_blocks: int = 1,
    ) -> None:
        self.cache, self.manifest = cache, manifests.load_manifest(cache)
        if k is not None and self.manifest.kind != "topk":
            raise InputError(f"k: expected null, because {cache} is {self.manifest.kind}, found {k}")
        if k is not None and not 1 <= k <= self.manifest.k:
            raise InputError(f"k: expected 1 to {self.manifest.k} (captured in {cache}), found {k}")
        self._k, self._downloads = k, downloads
        self._infos = manifests.committed_shards(cache, self.manifest)
        self._places = [(info, group) for info in self._infos for group in range(len(info.row_groups))]
        self.blocks = tuple(rows for info in self._infos for rows in info.row_groups)
        self._block = lru_cache(maxsize=cached_blocks)(self._read_block)
        self._shuffle_seed = shuffle_seed
        self._checked: set[int] = set()

    def row(self, block: int, row: int) -> tuple[TokenSequence, Captured]:
        """One sequence and what was captured of it."""
        sequence, captured = self._block(block)[row]
        if self._k is None:
            return sequence, captured
        # where the number kept varies, a sequence may hold fewer than k
        narrowed = narrow(captured.top, k=min(self._k, captured.top.ids_NK.shape[1]))
        return sequence, dataclasses.replace(captured, top=narrowed)

    def mean_entropies(self) -> list[torch.Tensor]:
        """Of each row of each block, the teacher's mean entropy over its positions: fp32 [R], nats."""
        found = []
        for block in range(len(self.blocks)):
            column = self._table(block, columns=["entropy"]).column(0).combine_chunks()
            entropy_N = torch.from_numpy(column.flatten().to_numpy().copy()).float()
            lengths = pc.list_value_length(column).to_pylist()
            found.append(torch.stack([row.mean() for row in entropy_N.split(lengths)]))
        return found

    @property
    def mean_targets(self) -> Fraction:
        """Supervised positions of a sequence, on average over the whole cache."""
        return Fraction(sum(info.targets for info in self._infos), max(sum(info.rows for info in self._infos), 1))

    def _read_block(self, block: int) -> list[tuple[TokenSequence, Captured]]:
        rows = decode(self._table(block), temperatures=self.manifest.temperatures)
        return rows if self._shuffle_seed is None else shuffle_positions(rows, seed=[self._shuffle_seed, block])

    def _table(self, block: int, columns: Sequence[str] | None = None) -> pa.Table:
        info, group = self._places[block]
        with self._open(info) as file:
            # mapped, because reading through a Python file copies; the map outlives a download that is evicted
            mapped = pa.BufferReader(pa.py_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))
            return pq.ParquetFile(mapped).read_row_group(group, columns=columns, use_threads=False)

    def _open(self, info: ShardInfo) -> BinaryIO:
        trusted, place = info.index in self._checked, manifests.shard_file(self.cache, info)
        if isinstance(place, Path):
            if not (trusted and place.exists()):
                manifests.check_shard_hash(self.cache, info)
            file: BinaryIO = place.open("rb")
        else:
            assert self._downloads is not None, "a remote cache is read through a folder of downloads"
            check = partial(manifests.check_shard_hash, self.cache, info)
            file = self._downloads.fetch(place, sha256=info.sha256, size_bytes=info.bytes, check=check, trusted=trusted)
        self._checked.add(info.index)
        return file
