"""One worker of stage one: it captures and commits those shards that no other worker is capturing."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import multiprocessing
import os
import secrets
import signal
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

from torch import set_num_threads

from pipeline.cache import manifest as manifests
from pipeline.cache.leases import hold_lease, holder
from pipeline.cache.sequence_files import SequenceFile, open_sequence_file, sequence_file
from pipeline.cache.shards import ShardWriter, shard_writer
from pipeline.capture.also_ids import also_ids_of
from pipeline.capture.claims import Outcome, claims, follow
from pipeline.capture.completion import completed_batches
from pipeline.capture.teacher import PendingBatch, capture_batch, device_of, finish_copy
from pipeline.config.schema import CaptureConfig, Dtype, ModelConfig
from pipeline.core.object_store import Location
from pipeline.core.processes import end_with
from pipeline.core.progress import Progress, log, readable_duration, start_logging
from pipeline.core.runtime import bind_device, keep_allocator_memory, make_current
from pipeline.core.stopping import EXIT_STOPPED, interrupt, stop_signals_handled_by
from pipeline.core.types import Captured, InputError, Manifest, TokenSequence
from pipeline.models.forward import Model
from pipeline.models.loading import open_model, resolve_dtype
from pipeline.models.prepack import prepack

MAX_NAMED_RECORDS = 10  # in a message
MAX_FOOTERS = 256  # of files of sequences, which a worker opens to know the length of its work
LONG_SHARD_SECONDS, GOOD_SHARD_SECONDS = 1800.0, 600.0  # an interruption loses the shard that is being captured
MEASURED_SECONDS = 60.0  # of a shard, before its whole time is estimated
MAX_PENDING_BATCHES = 3  # captured and not yet written: the teacher waits for a slow disk, so memory stays bounded


def run_worker(
    config: CaptureConfig,
    cache: Location,
    sequences: Path,
    shards: Sequence[int],
    worker: int = 0,
    teacher: Model | None = None,
) -> None:
    """Capture the shards that no other worker holds until all are committed; the teacher is loaded for the first."""
    keep_allocator_memory()
    device = bind_device(worker)
    manifest = manifests.load_manifest(cache)
    missing = manifests.missing_shards(cache, shards)
    progress = open_progress(config, num_waiting_sequences(sequences, missing), worker)
    logged = -math.inf

    def capture(index: int) -> Outcome:
        nonlocal teacher
        if manifests.shard_info(cache, index):  # one request, where a lease takes several
            return Outcome.committed
        with hold_lease(manifests.lease_path(cache, index), lease_seconds=config.lease_seconds) as held:
            if not held:
                return Outcome.held
            if manifests.shard_info(cache, index) or manifests.adopt_orphan(cache, index):
                return Outcome.committed
            teacher = teacher or prepack(open_model(planned_teacher(config, manifest), device))
            try:
                shard = open_sequence_file(sequence_file(sequences, index))
                capture_shard(teacher, shard, cache, manifest, index, config, progress)
            except (InputError, FileNotFoundError):
                # this worker stopped for longer than its lease; another one committed the shard, deleted its sequences
                if manifests.shard_info(cache, index) is None:
                    raise
            return Outcome.captured

    def wait(seconds: float, missing: Sequence[int]) -> None:
        nonlocal logged
        if time.monotonic() - logged > config.log_every_seconds:
            logged = time.monotonic()
            log_waiting(cache, missing, config.lease_seconds)
        time.sleep(seconds)

    decisions = claims(missing, seed=secrets.randbits(64), lease_seconds=config.lease_seconds)
    follow(decisions, capture=capture, list_missing=partial(manifests.missing_shards, cache), wait=wait)
    progress.close()


def open_progress(config: CaptureConfig, num_sequences: int, worker: int) -> Progress:
    """The progress of one worker; a bar only where it is the only one of this command."""
    return Progress(
        f"capture {worker}" if config.num_workers > 1 else "capture",
        total=num_sequences,
        unit=" sequences",
        log_every_seconds=config.log_every_seconds,
        bar=config.num_workers == 1,
    )


def planned_teacher(config: CaptureConfig, manifest: Manifest) -> ModelConfig:
    """The teacher in the dtype of the plan; a warning where `auto` means another one on this machine."""
    planned = Dtype[manifest.made_of["teacher_dtype"]]
    own = resolve_dtype(config.teacher).dtype if config.teacher.dtype is Dtype.auto else planned
    if own is not planned:
        log.warning(
            "teacher.dtype=auto: the machine that planned this cache chose %s, and all workers use it; this one would "
            "choose %s: teacher.dtype=%s makes such a cache",
            *(planned.name, own.name, own.name),
        )
    return dataclasses.replace(config.teacher, dtype=planned)


def log_waiting(cache: Location, missing: Sequence[int], lease_seconds: float) -> None:
    """What this worker waits for: the shards that others hold, and for how long."""
    held_by = holder(manifests.lease_path(cache, missing[0])) or "another process"
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    log.info(
        "waiting for shard %d%s, held by %s; a lease that is not renewed for %g s is taken over",
        *(missing[0], more, held_by, lease_seconds),
    )


def num_waiting_sequences(sequences: Path, missing: Sequence[int]) -> int:
    """The sequences of the shards that are not captured yet; of very many shards an estimate from some of them.

    Each worker asks this, and a footer takes a request or a seek.
    """
    looked_at = missing[:: math.ceil(len(missing) / MAX_FOOTERS) or 1]
    found = 0
    for index in looked_at:
        with contextlib.suppress(FileNotFoundError):  # another process has just finished the cache
            found += open_sequence_file(sequence_file(sequences, index)).num_rows
    return round(found * len(missing) / max(len(looked_at), 1))


def capture_shard(
    teacher: Model,
    shard: SequenceFile,
    cache: Location,
    manifest: Manifest,
    index: int,
    config: CaptureConfig,
    progress: Progress,
) -> None:
    """Capture the sequences of one shard and commit it; a thread writes while the teacher runs on."""
    started, done, tokens, forward_seconds = time.monotonic(), 0, 0, 0.0
    is_measured = False
    write_thread = ThreadPoolExecutor(
        1, thread_name_prefix="write", initializer=make_current, initargs=(device_of(teacher),)
    )
    with shard_writer(cache, manifest, index) as writer, write_thread as pool:
        writes: deque[Future[tuple[int, int, float]]] = deque()

        def wait_until_pending(max_pending: int) -> None:
            """Wait for the oldest writes until at most `max_pending` are left, and log their progress."""
            nonlocal done, tokens, forward_seconds, is_measured
            while len(writes) > max_pending:
                num_sequences, num_tokens, seconds = writes.popleft().result()
                done, tokens, forward_seconds = done + num_sequences, tokens + num_tokens, forward_seconds + seconds
                elapsed = time.monotonic() - started
                if elapsed > MEASURED_SECONDS and not is_measured:
                    is_measured = True
                    if advice := shard_advice(elapsed * shard.num_rows / done, config.records_per_shard):
                        log.warning(advice)
                progress.advance(
                    num_sequences,
                    tokens_per_second=tokens / elapsed,
                    outside_forward=max(1.0 - forward_seconds / elapsed, 0.0),
                )

        for pending in teacher_batches(teacher, shard, manifest, config):
            writes.append(pool.submit(write_batch, writer, pending))
            wait_until_pending(MAX_PENDING_BATCHES - 1)
        wait_until_pending(0)
        writer.commit(num_skipped=shard.num_skipped, plan_rows=shard.plan_rows)


def shard_advice(seconds: float, records_per_shard: int) -> str | None:
    """The warning where shards take `seconds` each; None where they are short enough."""
    if seconds <= LONG_SHARD_SECONDS:
        return None
    smaller = max(int(records_per_shard * GOOD_SHARD_SECONDS / seconds), 1)
    return (
        f"a shard takes {readable_duration(seconds)} here, and an interruption loses the one that is being captured; "
        f"records_per_shard={smaller} makes it about {readable_duration(GOOD_SHARD_SECONDS)} (it names another cache)"
    )


def teacher_batches(
    teacher: Model, shard: SequenceFile, manifest: Manifest, config: CaptureConfig
) -> Iterator[PendingBatch]:
    """Run the teacher over a shard: first sequences with targets, in the shard's order, then prompts to complete."""
    prompts = []
    rows = iter(shard)
    while sequences := list(itertools.islice(rows, config.batch_sequences)):
        with_targets = [sequence for sequence in sequences if len(sequence.target_positions_N)]
        prompts += [sequence for sequence in sequences if not len(sequence.target_positions_N)]
        if with_targets:
            yield capture_batch(teacher, with_targets, manifest, also_ids_of(config, manifest, with_targets))
    yield from completed_batches(teacher, prompts, manifest)


def write_batch(writer: ShardWriter, pending: PendingBatch) -> tuple[int, int, float]:
    """Wait until a batch is in host memory and write it; returns its sequences, tokens and forward seconds."""
    captured, forward_seconds = finish_copy(pending)
    for sequence, captured_sequence in zip(pending.sequences, captured, strict=True):
        check_finite(sequence, captured_sequence)
        writer.write(sequence, captured_sequence)
    writer.show_work()
    return len(captured), sum(len(sequence.input_ids_S) for sequence in pending.sequences), forward_seconds


def check_finite(sequence: TokenSequence, captured: Captured) -> None:
    """Refuse the output of a teacher with NaN or infinite logits: where a logit is not finite, nor is the entropy.

    All records of the window are named, because a NaN in one segment can reach the others through masked attention.
    """
    if not (captured.entropy_N.isfinite().all() and captured.weights_or_ones().isfinite().all()):
        records = ", ".join(map(str, sequence.record_ids[:MAX_NAMED_RECORDS]))
        more = " and more" if len(sequence.record_ids) > MAX_NAMED_RECORDS else ""
        raise InputError(
            f"teacher: expected finite logits, found NaN or infinity in the window of the records {records}{more} of "
            "the corpus (counted from 0); use teacher.dtype=float32, or check the weights of the teacher"
        )


def worker_process(config: CaptureConfig, cache: Location, sequences: Path, shards: Sequence[int], worker: int) -> None:
    """Run a worker as a process of its own, on its part of the cores; an InputError is logged as one line.

    A signal that asks it to stop ends it with EXIT_STOPPED, after it has released its lease.
    """
    parent = multiprocessing.parent_process()
    with stop_signals_handled_by(interrupt):
        if parent is not None and parent.pid is not None:  # a killed driver leaves nobody at work
            end_with(parent.pid)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process handles Ctrl-C
        start_logging()
        set_num_threads(max(len(os.sched_getaffinity(0)) // config.num_workers, 1))
        try:
            run_worker(config, cache, sequences, shards, worker)
        except InputError as error:
            log.error("error: %s", error)
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            raise SystemExit(EXIT_STOPPED) from None
