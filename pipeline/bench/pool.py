"""The speed of pooling two captures, on one core."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from pipeline.bench.read import VOCABULARY, WINDOW, K, make_manifest, random_row
from pipeline.bench.timing import Results, format_figure, run_in_turns, summarize, table
from pipeline.cache import manifest as manifests
from pipeline.cache.shards import shard_writer
from pipeline.config.commands import PoolConfig
from pipeline.config.schema import PoolKind
from pipeline.core.runtime import keep_allocator_memory
from pipeline.core.topk import top_k_and_entropy
from pipeline.core.types import Captured, TokenSequence
from pipeline.pooling.convert import given_pool, pool_shard
from pipeline.pooling.convert import make_manifest as pool_manifest
from pipeline.pooling.members import groups, open_members
from pipeline.pooling.rows import Pool, pool_rows

NOISE = 1.0  # by which the members' logits differ, of a standard deviation of 4: of 64 entries they share some 50

Rows = list[tuple[TokenSequence, list[Captured]]]


def run(quick: bool) -> Results:
    """Targets per second of one core's time: computed in memory, and by the command, from two caches to a third."""
    keep_allocator_memory()  # as scripts/pool.py does
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            rows = pair_rows(40 if quick else 300)
            for m in (0, 1):
                write_member(Path(folder) / f"member{m}", rows, m)
            measurements = {f"{kind.name}.memory": partial(in_memory, kind, rows) for kind in PoolKind}
            measurements |= {f"{kind.name}.command": partial(by_command, kind, Path(folder)) for kind in PoolKind}
            speeds = run_in_turns(measurements, runs=3 if quick else 5)
    finally:
        torch.set_num_threads(threads)
    figures = {name: summarize(values) for name, values in speeds.items()}
    lines = [["", "tokens/s"], *([name, format_figure(figure, ",.0f")] for name, figure in figures.items())]
    print(table(f"pool: two captures, K = {K}, one core", lines))
    return {f"pool.{name}.tokens_per_second": figure for name, figure in figures.items()}


def pair_rows(num_sequences: int) -> Rows:
    """Sequences with what two members captured, which agree about most of the largest logits."""
    generator, rows = torch.Generator().manual_seed(0), []
    for record_id in range(num_sequences):
        sequence, common = random_row(record_id, generator)
        captured = []
        for _ in (0, 1):
            noise_NK = NOISE * torch.randn(common.top.ids_NK.shape, generator=generator)
            logits_NK = common.top.relative_logits_NK.float() + noise_NK
            top, _, _ = top_k_and_entropy(logits_NK, k=K, temperatures=(1.0,))
            # some ids of each member are its own
            own_NK = common.top.ids_NK + (torch.rand(logits_NK.shape, generator=generator) < 0.1)
            captured.append(
                dataclasses.replace(common, top=dataclasses.replace(top, ids_NK=own_NK.gather(1, top.ids_NK)))
            )
        rows.append((sequence, captured))
    return rows


def write_member(cache: Path, rows: Rows, m: int) -> None:
    """The cache of one member, in one shard."""
    manifest = make_manifest(1, len(rows), k=K, window=WINDOW, vocabulary=VOCABULARY)
    made_of = {**manifest.made_of, "tokenizer": "none", "member": m}
    manifest = dataclasses.replace(manifest, made_of=made_of, fingerprint=manifests.fingerprint(made_of))
    manifests.create_cache(cache, manifest)
    with shard_writer(cache, manifest, 0) as writer:
        for sequence, captured in rows:
            writer.write(sequence, captured[m])
        writer.commit(num_skipped=0)


def in_memory(kind: PoolKind, rows: Rows) -> float:
    """Targets per second of this process's time."""
    pool, started, num_targets = Pool(kind=kind, weights=(0.5, 0.5), temperature=1.0), time.process_time(), 0
    for group in groups(iter(rows)):
        pooled = pool_rows(pool, group, {}, vocabulary_size=VOCABULARY)
        num_targets += sum(len(one.entropy_N) for one in pooled)
    return num_targets / (time.process_time() - started)


def by_command(kind: PoolKind, folder: Path) -> float:
    """The same of reading, pooling and writing."""
    config = PoolConfig(name="pool", kind=kind, members=[str(folder / f"member{m}") for m in (0, 1)])
    with tempfile.TemporaryDirectory() as target:
        started = time.process_time()
        members = open_members(config.members, config.downloads)
        pool = given_pool(config, members)
        manifest = pool_manifest(pool, members)
        manifests.create_cache(Path(target), manifest)
        pool_shard(pool, members, Path(target), manifest, 0)
        (info,) = manifests.committed_shards(Path(target), manifest)
        return info.targets / (time.process_time() - started)
