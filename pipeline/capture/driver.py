"""Stage one: the teacher reads the corpus once and leaves its top-k logits as shards.

This is the driver: it knows a finished cache without loading torch, plans what is not planned, starts the workers.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
from collections.abc import Sequence
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from pathlib import Path

from pipeline.cache import manifest as manifests
from pipeline.capture.plan_lookup import plan_folder
from pipeline.config.schema import CaptureConfig
from pipeline.config.validate import check_capture
from pipeline.core.object_store import Location
from pipeline.core.progress import log, start_logging
from pipeline.core.types import InputError, Manifest

DEATHS_WITHOUT_PROGRESS = 5  # killed workers, for each of num_workers, before the cause is no longer chance


def run(config: CaptureConfig) -> Location:
    """Capture what is not captured yet; returns the cache's folder or address."""
    start_logging()
    check_capture(config)
    request = plan_folder(config)
    manifest = request.load() or plan_now(config, with_sequences=False)
    cache = manifests.cache_location(manifest, cache=config.cache, caches_dir=config.caches_dir, name=config.name)
    manifests.create_cache(cache, manifest)
    shards = shards_of_share(config, manifest.num_shards)
    todo = manifests.missing_shards(cache, shards)
    if todo:
        if not request.sequences.exists():  # planned and captured once, and something of it is missing now
            plan_now(config, with_sequences=True)
        log.info("capturing %d of %d shards into %s", len(todo), manifest.num_shards, cache)
        if config.num_workers > 1:
            supervise(config, cache, request.sequences, shards)
        else:
            from pipeline.capture.worker import (
                run_worker,  # here, as below, because torch is needed only if there is work
            )

            run_worker(config, cache, request.sequences, shards)
    present = manifest.num_shards - len(manifests.missing_shards(cache, range(manifest.num_shards)))
    if present < manifest.num_shards:
        log.info("%s: this share is done; %d of %d shards are there", cache, present, manifest.num_shards)
        return cache
    finished = manifests.finalize_cache(cache, manifest, stale_seconds=config.lease_seconds)
    shutil.rmtree(request.sequences, ignore_errors=True)
    infos = manifests.committed_shards(cache, manifest)
    log.info(
        "%s: %d records (%d skipped), %d sequences, %d targets, %.1f MB",
        *(cache, finished.num_records, finished.num_skipped, sum(i.rows for i in infos)),
        *(sum(i.targets for i in infos), sum(i.bytes for i in infos) / 1e6),
    )
    return cache


def plan_now(config: CaptureConfig, *, with_sequences: bool) -> Manifest:
    """The plan, made now: the corpus is read, tokenized and packed."""
    from pipeline.capture.plan import make_plan

    return make_plan(config, plan_folder(config), with_sequences=with_sequences)


def shards_of_share(config: CaptureConfig, num_shards: int) -> list[int]:
    """The shards of this process: all, or those of its share of a job array."""
    share = config.share
    if share is None and "SLURM_ARRAY_TASK_ID" in os.environ:
        first, count = os.environ["SLURM_ARRAY_TASK_MIN"], os.environ["SLURM_ARRAY_TASK_COUNT"]
        share = f"{int(os.environ['SLURM_ARRAY_TASK_ID']) - int(first)}/{count}"
    if share is None:
        return list(range(num_shards))
    found = re.fullmatch(r"(\d+)/(\d+)", share)
    if found is None or int(found[1]) >= int(found[2]):
        raise InputError(f"share: expected INDEX/COUNT with INDEX from 0 to COUNT - 1, found {share!r}")
    return list(range(int(found[1]), num_shards, int(found[2])))


# ------------------------------------------------------------------------------------ several workers


def start_worker(
    config: CaptureConfig, cache: Location, sequences: Path, shards: Sequence[int], worker: int
) -> SpawnProcess:
    """A worker as a process of its own, which ends with this one."""
    from pipeline.capture.worker import worker_process

    process = multiprocessing.get_context("spawn").Process(
        target=worker_process, args=(config, cache, sequences, shards, worker), daemon=True
    )
    process.start()
    return process


def supervise(config: CaptureConfig, cache: Location, sequences: Path, shards: Sequence[int]) -> None:
    """Run the workers; one that was killed is replaced, unless workers keep dying without a shard committed."""
    workers = {number: start_worker(config, cache, sequences, shards, number) for number in range(config.num_workers)}
    deaths, committed = 0, 0
    while workers:
        wait([process.sentinel for process in workers.values()])
        for number, process in [(n, p) for n, p in workers.items() if not p.is_alive()]:
            del workers[number]
            if process.exitcode == 0:
                continue
            if process.exitcode is not None and process.exitcode > 0:
                raise InputError(
                    f"worker {number} stopped with the error above; mend it and run the same command again"
                )
            now = len(shards) - len(manifests.missing_shards(cache, shards))
            deaths, committed = (1 if now > committed else deaths + 1), now
            if deaths > DEATHS_WITHOUT_PROGRESS * config.num_workers:
                raise InputError(
                    f"workers: expected a shard between deaths, found {deaths} deaths without one (signal "
                    f"{-(process.exitcode or 0)}); look for the cause (often memory), then run the same command again"
                )
            log.warning("worker %d was killed (signal %d); starting another", number, -(process.exitcode or 0))
            workers[number] = start_worker(config, cache, sequences, shards, number)
