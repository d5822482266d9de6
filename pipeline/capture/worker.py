"""One worker of stage one: takes shards that nobody has, lets the teacher speak, commits them."""

from __future__ import annotations

import dataclasses
import itertools
import os
import signal
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from torch import set_num_threads

from pipeline.cache import manifest as manifests
from pipeline.cache.leases import hold_lease
from pipeline.cache.sequence_files import SequenceFile, open_sequence_file, sequence_file
from pipeline.cache.shards import ShardWriter, shard_writer
from pipeline.capture.completion import completed_batches
from pipeline.capture.teacher import PendingBatch, capture_batch, finish_copy
from pipeline.config.schema import CaptureConfig, Dtype
from pipeline.core.object_store import Location
from pipeline.core.progress import Progress, log, start_logging
from pipeline.core.runtime import compute_device, keep_allocator_memory
from pipeline.core.types import InputError, Manifest
from pipeline.models import loading as models
from pipeline.models.forward import Model
from pipeline.models.prepack import prepack

BATCHES_IN_FLIGHT = 3  # between the teacher and the disk: a slow disk holds the teacher back, memory stays bounded


def run_worker(
    config: CaptureConfig,
    cache: Location,
    sequences: Path,
    shards: Sequence[int],
    worker: int = 0,
    teacher: Model | None = None,
) -> None:
    """Capture the shards that nobody else does until all are committed; the teacher loads when it is needed."""
    keep_allocator_memory()
    manifest = manifests.load_manifest(cache)
    lease_seconds = config.lease_seconds
    missing = manifests.missing_shards(cache, shards)
    progress = Progress(
        f"capture {worker}" if config.num_workers > 1 else "capture",
        total=sum(rows_left(sequences, index) for index in missing),
        unit=" sequences",
        log_every_seconds=config.log_every_seconds,
    )
    while missing:
        for index in missing:
            with hold_lease(manifests.lease_path(cache, index), lease_seconds=lease_seconds) as held:
                if not held or manifests.shard_info(cache, index) or manifests.adopt_orphan(cache, index):
                    continue
                # as planned, which may have been on a machine with another idea of `auto`
                options = dataclasses.replace(config.teacher, dtype=Dtype[manifest.made_of["teacher_dtype"]])
                teacher = teacher or prepack(models.open_model(options, compute_device(worker)))
                try:
                    capture_shard(
                        teacher,
                        open_sequence_file(sequence_file(sequences, index)),
                        cache,
                        manifest,
                        index,
                        config,
                        progress,
                    )
                except (InputError, FileNotFoundError):
                    # frozen past the lease: others finished the shard, and cleared its plan away
                    if manifests.shard_info(cache, index) is None:
                        raise
        missing = manifests.missing_shards(cache, missing)
        if missing:  # others are at work on them: be there if they die
            time.sleep(min(1.0, lease_seconds / 4))
    progress.close()


def rows_left(sequences: Path, index: int) -> int:
    """The sequences that wait for a shard; none if others have made the cache whole this moment and cleared away."""
    try:
        return open_sequence_file(sequence_file(sequences, index)).num_rows
    except FileNotFoundError:
        return 0


def capture_shard(
    teacher: Model,
    shard: SequenceFile,
    cache: Location,
    manifest: Manifest,
    index: int,
    config: CaptureConfig,
    progress: Progress,
) -> None:
    """One shard, from its planned sequences to its commit; written by a thread while the teacher goes on."""
    started, tokens, forward_seconds = time.monotonic(), 0, 0.0
    with shard_writer(cache, manifest, index) as writer, ThreadPoolExecutor(1, thread_name_prefix="write") as pool:
        waiting: deque[Future[tuple[int, int, float]]] = deque()

        def gather(at_most: int) -> None:
            nonlocal tokens, forward_seconds
            while len(waiting) > at_most:
                num_sequences, num_tokens, seconds = waiting.popleft().result()
                tokens, forward_seconds = tokens + num_tokens, forward_seconds + seconds
                elapsed = time.monotonic() - started
                progress.advance(
                    num_sequences,
                    tokens_per_second=tokens / elapsed,
                    outside_forward=max(1.0 - forward_seconds / elapsed, 0.0),
                )

        for flight in teacher_batches(teacher, shard, manifest, config):
            waiting.append(pool.submit(write, writer, flight))
            gather(BATCHES_IN_FLIGHT - 1)
        gather(0)
        writer.commit(num_skipped=shard.num_skipped)


def teacher_batches(
    teacher: Model, shard: SequenceFile, manifest: Manifest, config: CaptureConfig
) -> Iterator[PendingBatch]:
    """The teacher's forwards over a shard: what has targets in batches as it lies, then prompts to be completed."""
    prompts = []
    speaking = iter(shard)
    while some := list(itertools.islice(speaking, config.batch_sequences)):
        prompts += [sequence for sequence in some if not len(sequence.target_positions_N)]
        if batch := [sequence for sequence in some if len(sequence.target_positions_N)]:
            yield capture_batch(teacher, batch, manifest)
    yield from completed_batches(teacher, prompts, manifest)


def write(writer: ShardWriter, flight: PendingBatch) -> tuple[int, int, float]:
    """Wait for a batch to be in memory and write it; returns its sequences, its tokens and its forward's seconds."""
    captured, forward_seconds = finish_copy(flight)
    for sequence, one in zip(flight.sequences, captured, strict=True):
        writer.write(sequence, one)
    return len(captured), sum(len(sequence.input_ids_S) for sequence in flight.sequences), forward_seconds


def worker_process(config: CaptureConfig, cache: Location, sequences: Path, shards: Sequence[int], worker: int) -> None:
    """What a worker process runs: its share of the cores, one line where it cannot go on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    start_logging()
    set_num_threads(max(len(os.sched_getaffinity(0)) // config.num_workers, 1))
    try:
        run_worker(config, cache, sequences, shards, worker)
    except InputError as error:
        log.error("error: %s", error)
        raise SystemExit(2) from None
