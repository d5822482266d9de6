"""Several captures in, one cache out: no model, one shard after another, in memory that does not grow."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from pipeline.cache import manifest as manifests
from pipeline.cache.schema import SCHEMA_VERSION
from pipeline.cache.shards import shard_writer
from pipeline.config.commands import PoolConfig
from pipeline.config.schema import PoolKind
from pipeline.config.validate import plain_name, positive
from pipeline.core.object_store import Location
from pipeline.core.progress import Progress, log, start_logging
from pipeline.core.runtime import keep_allocator_memory
from pipeline.core.types import InputError, Manifest
from pipeline.pooling.gold import fitted_pool
from pipeline.pooling.members import Member, groups, open_members, rows_of
from pipeline.pooling.rows import Pool, nodes_of_shard, pool_rows, taking_part, temperatures_of

ABANDONED_SECONDS = 3600.0  # a temporary file of this age belongs to a dead process


def run(config: PoolConfig) -> Location:
    """Pool the shards that are missing; returns the cache."""
    start_logging()
    keep_allocator_memory()
    check_pool(config)
    members = open_members(config.members, config.downloads)
    pool = fitted_pool(config, members) if config.fit_on else given_pool(config, members)
    manifest = make_manifest(pool, members, number=config.round)
    pool, taking = taking_part(pool, members)
    cache = manifests.cache_location(manifest, cache=None, caches_dir=config.caches_dir, name=config.name)
    manifests.create_cache(cache, manifest)
    todo = [index for index in range(manifest.num_shards) if manifests.shard_info(cache, index) is None]
    progress = Progress("pool", total=len(todo), unit=" shards", log_every_seconds=config.log_every_seconds)
    for index in todo:
        if not manifests.adopt_orphan(cache, index):
            pool_shard(pool, taking, cache, manifest, index)
        progress.advance(1)
    progress.close()
    manifests.finalize_cache(cache, manifest, stale_seconds=ABANDONED_SECONDS)
    infos = manifests.committed_shards(cache, manifest)
    log.info(
        "%s: %d targets of %d members, %.1f MB",
        *(cache, sum(info.targets for info in infos), len(members), sum(info.bytes for info in infos) / 1e6),
    )
    return cache


def check_pool(config: PoolConfig) -> None:
    """InputError for contradictory options."""
    plain_name(name=config.name)
    positive(temperature=config.temperature, log_every_seconds=config.log_every_seconds)
    weights = config.weights
    if not config.members:
        raise InputError("members: expected one or more caches, found none; give members=[caches/A-*,caches/B-*]")
    if config.fit_on:
        _check_fit_on(config)
    if weights and (
        len(weights) != len(config.members) or min(weights) < 0 or not math.isclose(sum(weights), 1.0, abs_tol=1e-6)
    ):
        raise InputError(
            f"weights: expected {len(config.members)} weights of 0 or more whose sum is 1, found {weights}; sharpen by "
            "temperature="
        )
    if config.kind is PoolKind.linear and config.temperature != 1.0:
        raise InputError(
            f"temperature: expected 1 in a linear pool, found {config.temperature}; sharpen the pool by a "
            "second one, of it alone, with kind=logarithmic"
        )


def _check_fit_on(config: PoolConfig) -> None:
    if len(config.fit_on) != len(config.members):
        raise InputError(
            f"fit_on: expected {len(config.members)} captures of gold, one by each member in the order of members, "
            f"found {config.fit_on}"
        )
    if config.weights:
        raise InputError(f"fit_on: expected weights=null, because they are fitted, found {config.weights}; give one")
    if config.kind is PoolKind.logarithmic and config.temperature != 1.0:
        raise InputError(
            f"fit_on: expected temperature=1, because the sum of the weights is fitted, found {config.temperature}; "
            "leave it out, or give weights="
        )
    if config.kind is PoolKind.linear and len(config.members) == 1:
        raise InputError("fit_on: expected two or more members in a linear pool, found one; its weight is 1")


def given_pool(config: PoolConfig, members: Sequence[Member]) -> Pool:
    """The pool with the weights of the options, or equal ones.

    InputError for a temperature above 1 that was not captured: what becomes of the tail is then unknown.
    """
    manifests_of = [member.manifest for member in members]
    if config.temperature > 1.0 and not all(config.temperature in one.temperatures for one in manifests_of):
        raise InputError(
            f"temperature: expected at most 1, or one that all members have captured, found {config.temperature} and "
            f"members with {[list(one.temperatures) for one in manifests_of]}; capture with it in temperatures"
        )
    weights = config.weights or [1 / len(members)] * len(members)
    return Pool(kind=config.kind, weights=tuple(weights), temperature=config.temperature)


def make_manifest(pool: Pool, members: Sequence[Member], *, number: int = 1) -> Manifest:
    """The manifest of the pool, which names all that it was made of, and the round of its study if not the first."""
    own, taking = taking_part(pool, members)
    first = taking[0].manifest
    copied = ("tokenizer", "targets", "complete", *(() if own.changes_members else ("also_ids",)))
    made_of: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "pool": pool.kind.name,
        "members": [member.fingerprints for member in members],
        "weights": list(pool.weights),
        "temperature": pool.temperature,
        **({} if pool.fit is None else {"fit": dict(pool.fit)}),
        **({} if number == 1 else {"round": number}),
        **{name: first.made_of[name] for name in copied if name in first.made_of},
    }
    return dataclasses.replace(
        first,
        schema_version=SCHEMA_VERSION,
        fingerprint=manifests.fingerprint(made_of),
        made_of=made_of,
        k=first.most_kept if own.changes_members else first.k,
        temperatures=temperatures_of(own, [member.manifest for member in taking]),
        tail="pooled" if own.changes_members else first.tail,
        num_skipped=None,
    )


def pool_shard(pool: Pool, members: Sequence[Member], cache: Location, manifest: Manifest, index: int) -> None:
    """Write and commit one shard."""
    nodes = nodes_of_shard(pool, members, index)
    with shard_writer(cache, manifest, index) as writer:
        for rows in groups(rows_of(members, index)):
            pooled = pool_rows(pool, rows, nodes, vocabulary_size=manifest.vocabulary_size)
            for (sequence, _), captured in zip(rows, pooled, strict=True):
                writer.write(sequence, captured)
        writer.commit(num_skipped=members[0].num_skipped(index))
