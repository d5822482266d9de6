"""The speed of reading a cache into training batches, on one core."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import torch

from pipeline.bench.timing import Results, format_figure, run_in_turns, seconds, summarize, table
from pipeline.cache import manifest as manifests
from pipeline.cache.shards import ShardReader, shard_writer
from pipeline.core.runtime import keep_allocator_memory
from pipeline.core.topk import top_k_and_entropy
from pipeline.core.types import Captured, Manifest, TokenSequence
from pipeline.data.mixture import collate
from pipeline.data.packing import Segment, make_sequence

K, VOCABULARY, WINDOW, BATCH = 64, 49_152, 512, 8


def run(quick: bool) -> Results:
    """Targets per second over one epoch of a cache of random content at K = 64: hash, decompress, decode, collate."""
    keep_allocator_memory()  # as the ranks of a training run do
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            cache = Path(folder) / "cache"
            num_targets = write_cache(cache, num_sequences=100 if quick else 600)
            measurements = {"epoch": lambda: num_targets / seconds(lambda: read_epoch(cache))}
            speeds = run_in_turns(measurements, runs=3 if quick else 5)["epoch"]
    finally:
        torch.set_num_threads(threads)
    speed = summarize(speeds)
    rows = [["K", "tokens/s"], [str(K), format_figure(speed, ",.0f")]]
    print(table("read: a cache into training tensors, one core", rows))
    return {"read.tokens_per_second": speed}


def make_manifest(num_shards: int, num_records: int, *, k: int, window: int, vocabulary: int) -> Manifest:
    """The manifest of a cache that is made for a benchmark."""
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
        records_per_shard=-(-num_records // num_shards),  # rounded up: 7 records in 2 shards -> 4 per shard
    )


def random_row(record_id: int, generator: torch.Generator) -> tuple[TokenSequence, Captured]:
    """A sequence of a full window with a target at every position except the last, and random logits for it.

    The logits decrease as those of a language model do: the top K of 4 K normal draws with standard deviation 4.
    """
    ids = torch.randint(VOCABULARY, (WINDOW,), generator=generator)
    targets = tuple((s, int(ids[s + 1])) for s in range(WINDOW - 1))
    sequence = make_sequence([Segment(record_id=record_id, ids=tuple(ids.tolist()), targets=targets)])
    logits_NV = torch.randn(WINDOW - 1, 4 * K, generator=generator) * 4
    top, _, _ = top_k_and_entropy(logits_NV, k=K, temperatures=(1.0,))
    stride = VOCABULARY // (4 * K)  # spreads the ids 0, 1, 2, ... over the vocabulary: 0, 192, 384, ..., all shifted
    spread_NK = (top.ids_NK * stride) + torch.randint(stride, (1,), generator=generator)
    zeros_N = torch.zeros(WINDOW - 1, dtype=torch.float16)
    top = dataclasses.replace(top, ids_NK=spread_NK)
    return sequence, Captured(top=top, next_log_prob_N=zeros_N, entropy_N=zeros_N)


def write_cache(cache: Path, *, num_sequences: int) -> int:
    """Write a cache of random content in two shards; returns its number of targets."""
    manifest = make_manifest(2, num_sequences, k=K, window=WINDOW, vocabulary=VOCABULARY)
    manifests.create_cache(cache, manifest)
    generator, num_targets = torch.Generator().manual_seed(0), 0
    for index in range(manifest.num_shards):
        with shard_writer(cache, manifest, index) as writer:
            for record_id in manifests.shard_range(manifest, index):
                sequence, captured = random_row(record_id, generator)
                writer.write(sequence, captured)
                num_targets += len(sequence.target_ids_N)
            writer.commit(num_skipped=0)
    manifests.finalize_cache(cache, manifest, stale_seconds=60)
    return num_targets


def read_epoch(cache: Path) -> int:
    """Read every row once and collate batches as training does; returns the number of targets with a distribution."""
    reader, num_targets = ShardReader(cache), 0
    places = [(block, row) for block, num_rows in enumerate(reader.blocks) for row in range(num_rows)]
    for first in range(0, len(places), BATCH):
        rows = [reader.row(block, row) for block, row in places[first : first + BATCH]]
        batch = collate(rows, [False] * len(rows))
        num_targets += 0 if batch.teacher is None else len(batch.teacher.ids_NK)
    return num_targets
