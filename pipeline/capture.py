"""Stage one: the teacher reads the corpus once and leaves its top-k logits as shards."""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Sequence
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from torch import set_num_threads

from pipeline import manifest as manifests
from pipeline import models
from pipeline.claims import claim
from pipeline.config import CaptureConfig, Kind, check_capture
from pipeline.corpus import Survey, sequences, survey
from pipeline.runtime import Progress, compute_device, log, start_logging
from pipeline.schema import SCHEMA_VERSION
from pipeline.shards import shard_writer
from pipeline.store import Place
from pipeline.teacher import capture_batch
from pipeline.text import Raw, Rejections, Text, open_text, raw_records
from pipeline.types import InputError, Manifest, TokenSequence

DEATHS_WITHOUT_PROGRESS = 5  # killed workers, for each of num_workers, before the cause is no longer chance


def run(config: CaptureConfig) -> Place:
    """Capture what is not captured yet; returns the cache's folder or address."""
    start_logging()
    check_capture(config)
    folder, tokenizer = models.open_tokenizer(config.teacher)
    models.check_window(folder, config.window)
    if config.k > models.vocabulary_size(tokenizer):
        raise InputError(
            f"k: expected at most {models.vocabulary_size(tokenizer)} (the vocabulary of {folder}), found {config.k}"
        )
    text = open_text(config.corpus, "corpus")
    manifest = plan(config, folder, tokenizer, survey(text, tokenizer, window=config.window))
    cache = manifests.cache_place(manifest, cache=config.cache, caches_dir=config.caches_dir, name=config.name)
    manifests.start(cache, manifest)
    shards = share_of(config, manifest.num_shards)
    todo = manifests.uncommitted(cache, shards)
    if todo:
        log.info("capturing %d of %d shards into %s", len(todo), manifest.num_shards, cache)
        supervise(config, cache, shards) if config.num_workers > 1 else work(config, cache, shards)
    present = manifest.num_shards - len(manifests.uncommitted(cache, range(manifest.num_shards)))
    if present < manifest.num_shards:
        log.info("%s: this share is done; %d of %d shards are there", cache, present, manifest.num_shards)
        return cache
    finished = manifests.finish(cache, manifest, stale_seconds=config.lease_seconds)
    infos = manifests.whole(cache, manifest)
    log.info(
        "%s: %d records (%d skipped), %d sequences, %d targets, %.1f MB",
        *(cache, finished.num_records, finished.num_skipped, sum(i.rows for i in infos)),
        *(sum(i.targets for i in infos), sum(i.bytes for i in infos) / 1e6),
    )
    return cache


def plan(config: CaptureConfig, folder: Path, tokenizer: Any, surveyed: Survey) -> Manifest:
    """The promise of a cache: all that changes its content, and which records each shard holds."""
    made_of = {
        "schema_version": SCHEMA_VERSION,
        "teacher_weights": models.weights_hash(folder),
        "teacher_num_layers": config.teacher.num_layers,
        "teacher_dtype": config.teacher.dtype.name,
        "tokenizer": models.tokenizer_hash(tokenizer),
        **models.text_rules(tokenizer),
        "corpus": surveyed.sha256,
        "columns": dataclasses.asdict(config.corpus.columns),
        "targets": config.corpus.targets.name,
        "malformed": config.corpus.malformed.name,
        "end_token": config.corpus.end_token,
        "window": config.window,
        "records_per_shard": config.records_per_shard,
        "kind": config.kind.name,
        "k": 0 if config.kind is Kind.sampled else config.k,
        "draws": 0 if config.kind is Kind.topk else config.draws,
        "draw_seed": 0 if config.kind is Kind.topk else config.seed,
        "temperatures": sorted(config.temperatures),
    }
    return Manifest(
        schema_version=SCHEMA_VERSION,
        fingerprint=manifests.fingerprint(made_of),
        made_of=made_of,
        kind=made_of["kind"],
        k=made_of["k"],
        draws=made_of["draws"],
        draw_seed=made_of["draw_seed"],
        temperatures=tuple(sorted(config.temperatures)),
        vocabulary_size=models.vocabulary_size(tokenizer),
        window=config.window,
        num_records=surveyed.num_records,
        num_shards=-(-surveyed.num_records // config.records_per_shard),
        records_per_shard=config.records_per_shard,
    )


class RawCursor:
    """Raw records by range; cheap as long as the ranges ascend, and right if they do not."""

    def __init__(self, text: Text) -> None:
        self._text = text
        self._rewind()

    def _rewind(self) -> None:
        self._stream, self._next = raw_records(self._text.files), 0

    def take(self, records: range) -> list[Raw]:
        """The raw records of a range."""
        if records.start < self._next:
            self._rewind()
        taken = list(itertools.islice(self._stream, records.start - self._next, records.stop - self._next))
        self._next = records.stop
        return taken


def work(config: CaptureConfig, cache: Place, shards: Sequence[int], worker: int = 0) -> None:
    """Capture the shards that nobody else does until all are committed; the teacher loads when it is needed."""
    manifest = manifests.load(cache)
    _, tokenizer = models.open_tokenizer(config.teacher)
    text = open_text(config.corpus, "corpus")
    cursor, teacher = RawCursor(text), None
    lease_seconds = config.lease_seconds
    missing = manifests.uncommitted(cache, shards)
    total = sum(len(manifests.shard_range(manifest, index)) for index in missing)
    progress = Progress(
        f"capture {worker}" if config.num_workers > 1 else "capture",
        total=total,
        unit=" records",
        log_every_seconds=config.log_every_seconds,
    )
    while missing:
        for index in missing:
            with claim(manifests.claim_path(cache, index), lease_seconds=lease_seconds) as held:
                if not held or manifests.committed(cache, index) or manifests.adopt(cache, index):
                    continue
                records = manifests.shard_range(manifest, index)
                rejections = Rejections(skip=text.skip_malformed)
                packed = list(
                    sequences(
                        cursor.take(records), text, tokenizer, rejections, window=config.window, first_id=records.start
                    )
                )
                teacher = teacher or models.open_model(config.teacher, compute_device(worker))
                capture_shard(teacher, packed, cache, manifest, index, rejections.count, config, progress)
        missing = manifests.uncommitted(cache, missing)
        if missing:  # others are at work on them: be there if they die
            time.sleep(min(1.0, lease_seconds / 4))
    progress.close()


def capture_shard(
    teacher: models.Model,
    packed: Sequence[TokenSequence],
    cache: Place,
    manifest: Manifest,
    index: int,
    num_skipped: int,
    config: CaptureConfig,
    progress: Progress,
) -> None:
    """One shard, from its packed sequences to its commit."""
    started, tokens, size = time.monotonic(), 0, config.batch_sequences
    num_records = len(manifests.shard_range(manifest, index))
    with shard_writer(cache, manifest, index) as writer:
        for batch in (packed[i : i + size] for i in range(0, len(packed), size)):
            for sequence, captured in zip(batch, capture_batch(teacher, batch, manifest), strict=True):
                writer.write(sequence, captured)
                tokens += len(sequence.input_ids_S)
            tokens_per_second = tokens / (time.monotonic() - started)
            progress.advance(num_records * len(batch) / len(packed), tokens_per_second=tokens_per_second)
        writer.commit(num_skipped=num_skipped)


# ------------------------------------------------------------------------------------ several workers


def share_of(config: CaptureConfig, num_shards: int) -> list[int]:
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


def start_worker(config: CaptureConfig, cache: Place, shards: Sequence[int], worker: int) -> SpawnProcess:
    """A worker as a process of its own, which ends with this one."""
    process = multiprocessing.get_context("spawn").Process(
        target=worker_process, args=(config, cache, shards, worker), daemon=True
    )
    process.start()
    return process


def worker_process(config: CaptureConfig, cache: Place, shards: Sequence[int], worker: int) -> None:
    """What a worker process runs: its share of the cores, one line where it cannot go on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    start_logging()
    set_num_threads(max(len(os.sched_getaffinity(0)) // config.num_workers, 1))
    try:
        work(config, cache, shards, worker)
    except InputError as error:
        log.error("error: %s", error)
        raise SystemExit(2) from None


def supervise(config: CaptureConfig, cache: Place, shards: Sequence[int]) -> None:
    """Run the workers; one that was killed is replaced, unless workers keep dying without a shard committed."""
    workers = {number: start_worker(config, cache, shards, number) for number in range(config.num_workers)}
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
            now = len(shards) - len(manifests.uncommitted(cache, shards))
            deaths, committed = (1 if now > committed else deaths + 1), now
            if deaths > DEATHS_WITHOUT_PROGRESS * config.num_workers:
                raise InputError(
                    f"workers: expected a shard between deaths, found {deaths} deaths without one (signal "
                    f"{-(process.exitcode or 0)}); look for the cause (often memory), then run the same command again"
                )
            log.warning("worker %d was killed (signal %d); starting another", number, -(process.exitcode or 0))
            workers[number] = start_worker(config, cache, shards, number)
