"""ShardWriter and ShardReader: stage one writes shards, stage two reads them."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import mmap
import os
import secrets
import tempfile
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from pipeline.cache import manifest as manifests
from pipeline.cache.downloads import Downloads
from pipeline.cache.plain_manifest import check_same_inputs
from pipeline.cache.schema import column_encoding, decode, encode, shard_schema
from pipeline.cache.shard_parts import Part, parts_of
from pipeline.core.files import file_hash
from pipeline.core.object_store import Location, RemotePath
from pipeline.core.seeds import seed_from_values
from pipeline.core.topk import log_probabilities, narrow
from pipeline.core.types import Captured, InputError, Manifest, ShardInfo, TokenSequence, TopK

pa.set_memory_pool(
    pa.system_memory_pool()
)  # malloc's, so that `runtime.keep_allocator_memory` holds for Arrow's buffers too

ROW_GROUP_BYTES = 16 << 20  # before compression; a unit of reading and of shuffling
CACHED_FOOTERS = 64  # of some 100 kB each; parsing one takes milliseconds


def shuffle_positions(
    rows: Sequence[tuple[TokenSequence, Captured]], *, seed: Sequence[int]
) -> list[tuple[TokenSequence, Captured]]:
    """The same sequences, each position with what was captured at another one: a control whose targets teach nothing.

    The positions of all rows are shuffled together, and none keeps its own. A weight belongs to the position and stays.
    """
    num_targets = [len(sequence.target_ids_N) for sequence, _ in rows]
    generator = torch.Generator().manual_seed(seed_from_values(*seed))
    order_N = torch.randperm(sum(num_targets), generator=generator)
    source_N = torch.empty_like(order_N)
    source_N[order_N] = order_N.roll(1)  # one cycle. order [2, 0, 1]: position 2 takes from 1, 0 from 2, 1 from 0
    captured = Captured.cat([captured for _, captured in rows])
    shuffled = dataclasses.replace(captured.select(source_N), weights_N=captured.weights_N)
    return [(sequence, part) for (sequence, _), part in zip(rows, shuffled.split(num_targets), strict=True)]


def retained_mass_histogram(top: TopK) -> torch.Tensor:
    """Positions by the total probability of their kept entries at T = 1, in ten equal bins from 0 to 1: [10] int64."""
    log_p_NK, _ = log_probabilities(top, temperature=1.0)
    retained_N = log_p_NK.exp().sum(dim=1).clamp(0.0, 1.0)
    return torch.histc(retained_N, bins=10, min=0.0, max=1.0).long()


class ShardWriter:
    """Writes one shard into a temporary file in `folder`; `commit` publishes it, `abandon` deletes it."""

    def __init__(self, cache: Location, manifest: Manifest, index: int, *, folder: Path) -> None:
        self._cache, self._manifest, self._index = cache, manifest, index
        self._temporary = folder / f".{index:05d}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
        self._schema = shard_schema(manifest)
        self._rows: list[tuple[TokenSequence, Captured]] = []  # of the next row group
        self._rows_bytes = 0
        self._num_targets = 0
        self._histogram = torch.zeros(10, dtype=torch.int64)
        self._file = pq.ParquetWriter(
            self._temporary,
            self._schema,
            compression="zstd",
            use_dictionary=False,
            column_encoding=column_encoding(self._schema),
            write_page_checksum=True,
        )

    def write(self, sequence: TokenSequence, captured: Captured) -> None:
        """Append one sequence."""
        self._rows.append((sequence, captured))
        self._num_targets += len(sequence.target_positions_N)
        self._rows_bytes += 4 * (len(sequence.input_ids_S) + captured.top.ids_NK.numel())
        if self._rows_bytes >= ROW_GROUP_BYTES:
            self._write_row_group()

    def show_work(self) -> None:
        """Renew the time of the temporary file, as a sign of work: a row group may take long to fill."""
        with contextlib.suppress(OSError):
            os.utime(self._temporary)

    def _write_row_group(self) -> None:
        if self._rows:
            self._histogram += retained_mass_histogram(TopK.cat([captured.top for _, captured in self._rows]))
            self._file.write_table(encode(self._rows, self._schema), row_group_size=len(self._rows))
            self._rows, self._rows_bytes = [], 0

    def commit(self, *, num_skipped: int, plan_rows: Sequence[int] | None = None) -> None:
        """Publish the shard with `plan_rows` (see `SequenceFile`): fsync, re-open, check, link or upload, ShardInfo."""
        self._write_row_group()
        histogram = self._histogram.tolist()
        self._file.add_key_value_metadata(
            manifests.footer_totals(targets=self._num_targets, num_skipped=num_skipped, histogram=histogram)
        )
        if plan_rows is not None:
            self._file.add_key_value_metadata({"plan_rows": json.dumps(list(plan_rows))})
        self._file.close()
        with self._temporary.open("rb") as file:
            os.fsync(file.fileno())
        # two captures may have started at once at the same address (cache=...); the manifest is of one of them
        check_same_inputs(manifests.load_manifest(self._cache), self._manifest.made_of, self._cache)
        manifests.commit_shard(self._cache, self._temporary, self._index)

    def abandon(self) -> None:
        """Delete the temporary file of a shard that was not committed."""
        with contextlib.suppress(OSError):
            self._file.close()
        self._temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def shard_writer(cache: Location, manifest: Manifest, index: int) -> Iterator[ShardWriter]:
    """A ShardWriter whose temporary file is deleted on an error; the file is local even where the cache is not."""
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
        if isinstance(error, FileNotFoundError) and not manifests.manifest_path(cache).exists():
            raise InputError(
                f"{cache}: expected to write shard {index}, found the cache moved or deleted meanwhile; put it back, "
                "or run the same command again to start anew"
            ) from error
        if isinstance(error, OSError):
            raise InputError(
                f"{cache}: expected to write shard {index}, found {error.strerror or error}; no "
                "committed shard is lost: free space or repair the disk, and run the same command again"
            ) from error
        raise


def check_k(k: int, manifest: Manifest, cache: Location) -> None:
    """Refuse to read k entries a position of a cache that does not hold so many, or no largest ones."""
    if manifest.kind != "topk":
        raise InputError(f"k: expected null, because {cache} is {manifest.kind}, found {k}")
    if not 1 <= k <= manifest.k:
        raise InputError(f"k: expected 1 to {manifest.k} (captured in {cache}), found {k}")


class ShardReader:
    """Random access to the sequences of a cache by (block, row); a block is a row group of a shard.

    The bytes of a row group are checked against the ShardInfo before its first row is used (in older caches those of
    the shard). The last `cached_blocks` decoded blocks stay in memory. `k` keeps the k largest entries of a position,
    `shuffle_seed` gives each position what was captured at another one. A remote cache is read through `downloads`.
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
        self.cache = cache
        self.manifest = manifests.load_manifest(cache)
        if k is not None:
            check_k(k, self.manifest, cache)
        self._k = k
        self._downloads = downloads
        self._shuffle_seed = shuffle_seed
        self._infos = manifests.committed_shards(cache, self.manifest)
        # two shards with row groups (64, 64) and (64, 10): blocks (64, 64, 64, 10), block 3 is group 1 of shard 1
        self.blocks = tuple(num_rows for info in self._infos for num_rows in info.row_groups)
        self._ends = list(itertools.accumulate(self.blocks))
        self._row_groups = [(info, group) for info in self._infos for group in range(len(info.row_groups))]
        self._block = lru_cache(maxsize=cached_blocks)(self._read_block)
        self.footer = lru_cache(maxsize=CACHED_FOOTERS)(self._read_footer)
        self._checked_parts: set[str] = set()

    def row(self, block: int, row: int) -> tuple[TokenSequence, Captured]:
        """One sequence and what was captured about it."""
        sequence, captured = self._block(block)[row]
        if self._k is None:
            return sequence, captured
        # where positions keep different numbers of entries, a sequence may hold fewer than k
        narrowed = narrow(captured.top, k=min(self._k, captured.top.ids_NK.shape[1]))
        return sequence, dataclasses.replace(captured, top=narrowed)

    def at(self, index: int) -> tuple[TokenSequence, Captured]:
        """The sequence at an index of the whole cache."""
        block = bisect_right(self._ends, index)
        return self.row(block, index - self._ends[block] + self.blocks[block])

    def places(self, shard: int) -> dict[bytes, tuple[int, int]]:
        """The (block, row) of each sequence of a shard, by its key."""
        blocks = [block for block, (info, _) in enumerate(self._row_groups) if info.index == shard]
        keys = [(block, self.table(block, columns=["key"]).column(0).to_pylist()) for block in blocks]
        return {key: (block, row) for block, of_block in keys for row, key in enumerate(of_block)}

    def mean_entropies(self) -> list[torch.Tensor]:
        """For each block, the teacher's weighted mean entropy over the positions of each of its R rows: fp32 [R], nats.

        Without weights it is the plain mean.
        """
        means = []
        for block in range(len(self.blocks)):
            rows = self._column(block, "entropy")
            if "weights" in shard_schema(self.manifest).names:
                weights = self._column(block, "weights")
                least = torch.finfo(torch.float32).tiny  # all weights of a row may have become 0
                pairs = zip(rows, weights, strict=True)
                means.append(torch.stack([(h_N * w_N).sum() / w_N.sum().clamp(min=least) for h_N, w_N in pairs]))
            else:
                means.append(torch.stack([row_N.mean() for row_N in rows]))
        return means

    def _column(self, block: int, name: str) -> tuple[torch.Tensor, ...]:
        """The float32 values of a column, one tensor for each row of a block."""
        column = self.table(block, columns=[name]).column(0).combine_chunks()
        values = torch.from_numpy(column.flatten().to_numpy().copy()).float()
        return values.split(pc.list_value_length(column).to_pylist())

    @property
    def num_targets(self) -> int:
        """Supervised positions of the cache."""
        return sum(info.targets for info in self._infos)

    @property
    def mean_targets(self) -> Fraction:
        """Supervised positions a sequence, on average over the cache."""
        return Fraction(self.num_targets, max(sum(self.blocks), 1))

    def _read_block(self, block: int) -> list[tuple[TokenSequence, Captured]]:
        rows = decode(self.table(block), temperatures=self.manifest.temperatures)
        return rows if self._shuffle_seed is None else shuffle_positions(rows, seed=[self._shuffle_seed, block])

    def table(self, block: int, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows of a block as they are stored, checked; `columns`: only these are read."""
        info, group = self._row_groups[block]
        footer = self.footer(info)
        # mapped, because reading through a Python file copies
        mapped = self._mapped(info, parts_of(info)[group if info.part_ends else 0])
        file = pq.ParquetFile(pa.BufferReader(pa.py_buffer(mapped)), metadata=footer)
        return file.read_row_group(group, columns=columns, use_threads=False)

    def _read_footer(self, info: ShardInfo) -> pq.FileMetaData:
        part = parts_of(info)[-1]
        mapped = self._mapped(info, part)
        return pq.read_metadata(pa.BufferReader(pa.py_buffer(mapped)[: part.end]))

    def _mapped(self, info: ShardInfo, part: Part) -> mmap.mmap:
        """Memory that has the checked bytes of a part where they lie in the shard; it outlives a deleted download."""
        trusted, place = part.name in self._checked_parts, manifests.shard_file(self.cache, info)
        if isinstance(place, Path):
            if not place.exists():
                manifests.refuse_missing(self.cache, info)
            with place.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            if not trusted:
                found = hashlib.sha256(memoryview(mapped)[part.start : part.end]).hexdigest()
                manifests.check_hash(self.cache, info, found=found, expected=part.sha256)
        else:
            mapped = self._downloaded(place, info, part, trusted=trusted)
        self._checked_parts.add(part.name)
        return mapped

    def _downloaded(self, place: RemotePath, info: ShardInfo, part: Part, *, trusted: bool) -> mmap.mmap:
        assert self._downloads is not None, "a remote cache is read through a folder of downloads"

        def check(path: Path) -> None:
            if not path.exists():
                manifests.refuse_missing(self.cache, info)
            manifests.check_hash(self.cache, info, found=file_hash(path), expected=part.sha256)

        with self._downloads.fetch(place, part, check=check, trusted=trusted) as file:
            if part.start == 0:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            # as long as the shard up to here; of what is not written, nothing takes memory
            mapped = mmap.mmap(-1, part.end, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            mapped[part.start :] = file.read()
            return mapped
