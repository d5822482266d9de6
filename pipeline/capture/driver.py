"""Stage one, the driver: it finds or makes the plan, starts the workers, and finishes the cache.

A finished cache is recognised without importing torch, so the functions that need torch are imported where they are
called.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
from collections.abc import Sequence
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from pathlib import Path

from pipeline.cache import manifest as manifests
from pipeline.capture.plan_lookup import PlanFolder, plan_folder
from pipeline.config.schema import CaptureConfig
from pipeline.config.validate import check_capture
from pipeline.core.file_systems import check_folder
from pipeline.core.folds import index_and_count
from pipeline.core.object_store import Location
from pipeline.core.progress import log, start_logging
from pipeline.core.stopping import EXIT_STOPPED
from pipeline.core.types import InputError, Manifest
from pipeline.models.paths import pinned

DEATHS_WITHOUT_PROGRESS = 5  # per worker of num_workers: killed more often between two shards, the capture stops


def run(config: CaptureConfig) -> Location:
    """Capture the shards that are missing; returns the cache's folder or address."""
    start_logging()
    check_capture(config)
    config = dataclasses.replace(config, teacher=pinned(config.teacher))
    plan = plan_folder(config)
    manifest = plan.load() or read_corpus(config, plan, with_sequences=False)
    cache = manifests.cache_location(manifest, cache=config.cache, caches_dir=config.caches_dir, name=config.name)
    manifests.create_cache(cache, manifest)
    shards = shards_of_share(config, manifest.num_shards)
    missing = manifests.missing_shards(cache, shards)
    if missing:
        if isinstance(cache, Path):
            check_folder(cache, "caches_dir" if config.cache is None else "cache")
        if not plan.sequences.exists():  # the cache was finished, and a shard of it was lost afterwards
            read_corpus(config, plan, with_sequences=True)
        log.info(
            "capturing %d of %d shards into %s, with the teacher in %s",
            *(len(missing), manifest.num_shards, cache, manifest.made_of["teacher_dtype"]),
        )
        if config.num_workers > 1:
            supervise(config, cache, plan.sequences, shards)
        else:
            from pipeline.capture.worker import run_worker

            run_worker(config, cache, plan.sequences, shards)
    present = manifest.num_shards - len(manifests.missing_shards(cache, range(manifest.num_shards)))
    if present < manifest.num_shards:
        log.info("%s: this share is captured; %d of %d shards are present", cache, present, manifest.num_shards)
        return cache
    finished = manifests.finalize_cache(cache, manifest, stale_seconds=config.lease_seconds)
    plan.delete_sequences(finished)
    infos = manifests.committed_shards(cache, manifest)
    log.info(
        "%s: %d records (%d skipped), %d sequences, %d targets, %.1f MB",
        *(cache, finished.num_records, finished.num_skipped, sum(info.rows for info in infos)),
        *(sum(info.targets for info in infos), sum(info.bytes for info in infos) / 1e6),
    )
    return cache


def read_corpus(config: CaptureConfig, plan: PlanFolder, *, with_sequences: bool) -> Manifest:
    """Make the plan: read, tokenize and pack the corpus."""
    from pipeline.capture.plan import make_plan

    return make_plan(config, plan, with_sequences=with_sequences)


def shards_of_share(config: CaptureConfig, num_shards: int) -> list[int]:
    """The indices of the shards that this process may capture: all, unless a share is asked for.

    The share INDEX/COUNT has the shards INDEX, INDEX + COUNT, ...; InputError if it is malformed.
    """
    if config.share is None:
        return list(range(num_shards))
    if (found := index_and_count(config.share)) is None:
        raise InputError(
            f"share: expected INDEX/COUNT with INDEX from 0 to COUNT - 1, found {config.share!r}; correct share="
        )
    index, count = found
    return list(range(index, num_shards, count))


# ------------------------------------------------------------------------------------ several workers


def start_worker(
    config: CaptureConfig, cache: Location, sequences: Path, shards: Sequence[int], worker: int
) -> SpawnProcess:
    """Start a worker in a process of its own, which ends when this process ends."""
    from pipeline.capture.worker import worker_process

    process = multiprocessing.get_context("spawn").Process(
        target=worker_process, args=(config, cache, sequences, shards, worker), daemon=True
    )
    process.start()
    return process


def supervise(config: CaptureConfig, cache: Location, sequences: Path, shards: Sequence[int]) -> None:
    """Run the workers until all have finished, and replace a worker that was killed by a signal.

    InputError if a worker stops with an error, or if workers keep being killed although no shard was committed between.
    """
    workers: dict[int, SpawnProcess] = {}
    try:
        for number in range(config.num_workers):
            workers[number] = start_worker(config, cache, sequences, shards, number)
        replace_killed(workers, config, cache, sequences, shards)
    finally:  # also on a request to stop: what the workers write comes before the last line of the command
        for process in workers.values():
            process.terminate()
        for process in workers.values():
            process.join()


def replace_killed(
    workers: dict[int, SpawnProcess], config: CaptureConfig, cache: Location, sequences: Path, shards: Sequence[int]
) -> None:
    """Wait until no worker is left in `workers`, and start another one for each that was killed."""
    deaths, num_committed = 0, 0  # deaths since the last shard was committed
    while workers:
        wait([process.sentinel for process in workers.values()])
        ended = [(number, process) for number, process in workers.items() if not process.is_alive()]
        for number, process in ended:
            del workers[number]
            if process.exitcode == 0:
                continue
            if process.exitcode is not None and process.exitcode > 0 and process.exitcode != EXIT_STOPPED:
                raise InputError(
                    f"worker {number} stopped with the error above; correct it and run the same command again"
                )
            num_committed_now = len(shards) - len(manifests.missing_shards(cache, shards))
            deaths = 1 if num_committed_now > num_committed else deaths + 1
            num_committed = num_committed_now
            reason = "asked to stop" if process.exitcode == EXIT_STOPPED else f"signal {-(process.exitcode or 0)}"
            if deaths > DEATHS_WITHOUT_PROGRESS * config.num_workers:
                raise InputError(
                    f"workers: expected a committed shard between two deaths of workers, found {deaths} deaths without "
                    f"one ({reason}); look for the cause (often memory), then run the same command again"
                )
            log.warning("worker %d was killed (%s); starting another", number, reason)
            workers[number] = start_worker(config, cache, sequences, shards, number)
