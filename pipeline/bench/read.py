"""How fast a cache becomes training tensors, on one core."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import torch

from pipeline.bench.timing import Findings, figure, in_turn, seconds, shown, table
from pipeline.cache import manifest as manifests
from pipeline.cache.shards import ShardReader, shard_writer
from pipeline.core.runtime import keep_allocator_memory
from pipeline.core.topk import top_k_and_entropy
from pipeline.core.types import Captured, Manifest, TokenSequence
from pipeline.data.mixture import collate
from pipeline.data.packing import Segment, make_sequence

K, VOCABULARY, WINDOW = 64, 49_152, 512


def run(quick: bool) -> Findings:
    """tokens/s over a whole epoch of a cache of random content at K = 64: hash, decompress, decode, collate."""
    keep_allocator_memory()  # as training's ranks do
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            cache, num_tokens = Path(folder) / "cache", 0
            num_tokens = write_cache(cache, num_sequences=100 if quick else 600)
            things = {"epoch": lambda: num_tokens / seconds(lambda: read_epoch(cache))}
            found = in_turn(things, runs=3 if quick else 5)["epoch"]
    finally:
        torch.set_num_threads(threads)
    speed = figure(found)
    print(table("read: a cache into training tensors, one core", [["K", "tokens/s"], [str(K), shown(speed, ",.0f")]]))
    return {"read.tokens_per_second": speed}


def manifest_of(num_shards: int, num_records: int, *, k: int, window: int, vocabulary: int) -> Manifest:
    """The promise of a cache of random content."""
    made_of = {"random": True, "k": k, "records": num_records}
    return Manifest(
        schema_version=1,
        fingerprint=manifests.fingerprint(made_of),
        made_of=made_of,
        kind="topk",
        k=k,
        draws=0,
        draw_seed=0,
        temperatures=(1.0,),
        vocabulary_size=vocabulary,
        window=window,
        num_records=num_records,
        num_shards=num_shards,
        records_per_shard=-(-num_records // num_shards),
    )


def random_row(record_id: int, generator: torch.Generator) -> tuple[TokenSequence, Captured]:
    """One full window with a target at every position; logits fall off as a language model's do."""
    ids = torch.randint(VOCABULARY, (WINDOW,), generator=generator)
    pairs = tuple((s, int(ids[s + 1])) for s in range(WINDOW - 1))
    one = make_sequence([Segment(record_id=record_id, ids=tuple(ids.tolist()), targets=pairs)])
    logits_NV = torch.randn(WINDOW - 1, 4 * K, generator=generator) * 4
    top, _, _ = top_k_and_entropy(logits_NV, k=K, temperatures=(1.0,))
    spread_NK = (top.ids_NK * (VOCABULARY // (4 * K))) + torch.randint(VOCABULARY // (4 * K), (1,), generator=generator)
    unknown_N = torch.zeros(WINDOW - 1, dtype=torch.float16)
    return one, Captured(top=dataclasses.replace(top, ids_NK=spread_NK), next_log_prob_N=unknown_N, entropy_N=unknown_N)


def write_cache(cache: Path, *, num_sequences: int) -> int:
    """A cache of random content; returns its targets."""
    manifest = manifest_of(2, num_sequences, k=K, window=WINDOW, vocabulary=VOCABULARY)
    manifests.create_cache(cache, manifest)
    generator, num_targets = torch.Generator().manual_seed(0), 0
    for index in range(manifest.num_shards):
        with shard_writer(cache, manifest, index) as writer:
            for record_id in manifests.shard_range(manifest, index):
                one, captured = random_row(record_id, generator)
                writer.write(one, captured)
                num_targets += len(one.target_ids_N)
            writer.commit(num_skipped=0)
    manifests.finalize_cache(cache, manifest, stale_seconds=60)
    return num_targets


def read_epoch(cache: Path) -> None:
    """Every row once, in batches of 8, as training reads them."""
    reader = ShardReader(cache)
    rows = [(block, row) for block, size in enumerate(reader.blocks) for row in range(size)]
    for first in range(0, len(rows), 8):
        some = [reader.row(*place) for place in rows[first : first + 8]]
        collate(some, [False] * len(some))
