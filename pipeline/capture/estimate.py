"""Estimate a capture's records, tokens, bytes, shards and hours from a short probe, before it is run."""

from __future__ import annotations

import dataclasses
import math
import shutil
import tempfile
import time
from pathlib import Path

from pipeline.cache import manifest as manifests
from pipeline.cache.sequence_files import SequenceFile, open_sequence_file, sequence_file
from pipeline.cache.shards import shard_writer
from pipeline.capture.also_caches import also_caches
from pipeline.capture.corpus import TokenizedCorpus, cached_tokenizer, open_corpus, write_sequences
from pipeline.capture.identity import make_manifest
from pipeline.capture.worker import shard_advice, teacher_batches, write_batch
from pipeline.config.schema import CaptureConfig, Kind
from pipeline.config.validate import check_capture
from pipeline.core.files import is_url
from pipeline.core.folds import parse_fold
from pipeline.core.progress import readable, readable_duration, start_logging
from pipeline.core.runtime import compute_device, keep_allocator_memory
from pipeline.core.types import InputError, Manifest
from pipeline.data.record_counts import count_records
from pipeline.data.text_files import Text, read_chunks
from pipeline.models.compatibility import check_window
from pipeline.models.forward import Model
from pipeline.models.loading import open_model, resolve_dtype
from pipeline.models.paths import model_folder
from pipeline.models.prepack import prepack

PROBE_RECORDS, PROBE_SECONDS = 2048, 20.0
MAX_SHARD_BYTES = 4 << 30  # above this size, smaller shards are recommended


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A short capture of the corpus's first records: what was captured, and the seconds it took."""

    num_records: int
    num_tokens: int
    num_targets: int
    bytes: int
    seconds: float


def run(config: CaptureConfig) -> int:
    """Print the size and duration of this capture, estimated from a probe; returns 1 if the disk is too small."""
    start_logging(level=30)
    check_capture(config)
    config = with_entries_of_also_ids(config)
    keep_allocator_memory()
    config = dataclasses.replace(config, teacher=resolve_dtype(config.teacher))
    teacher = config.teacher
    folder = model_folder(teacher.path, revision=teacher.revision, with_code=teacher.trust_remote_code)
    text = dataclasses.replace(open_corpus(config, folder), fold=None)  # the probe measures any sequences
    is_exact, num_records = count_records(text)
    probe = run_probe(config, text)
    scale = num_records / probe.num_records
    about = "" if is_exact else "about "
    print(f"Measured: {probe.num_records:,} records with {probe.num_tokens:,} tokens in {probe.seconds:.1f} s.")
    print(
        f"The corpus has {about}{num_records:,.0f} records with {probe.num_tokens * scale:,.0f} tokens in "
        f"{len(text.files)} files."
    )
    print(f"Each target takes {probe.bytes / probe.num_targets:.1f} bytes with {kept_entries(config)}.")
    if config.only_fold is not None:
        scale /= parse_fold(config.only_fold, "only_fold").of  # of the sequences, about
        print(f"Of them the sequences of fold {config.only_fold} are captured.")
    num_shards, cache_bytes = math.ceil(round(num_records) / config.records_per_shard), probe.bytes * scale
    print(
        f"The cache will take {readable(cache_bytes)}, with {probe.num_targets * scale:,.0f} targets in "
        f"{num_shards:,} shards."
    )
    print(
        f"One worker will capture it in {readable_duration(probe.seconds * scale)}, with the teacher in "
        f"{config.teacher.dtype.name} at {probe.num_tokens / probe.seconds:,.0f} tokens/s."
    )
    shard_bytes = cache_bytes / num_shards
    if shard_bytes > MAX_SHARD_BYTES:
        smaller = max(int(config.records_per_shard * MAX_SHARD_BYTES / shard_bytes), 1)
        print(
            f"Each shard will take {readable(shard_bytes)}; for shards of at most {readable(MAX_SHARD_BYTES)} set "
            f"records_per_shard={smaller}."
        )
    if advice := shard_advice(probe.seconds * scale / num_shards, config.records_per_shard):
        print(f"{advice[0].upper()}{advice[1:]}.")
    return 0 if is_url(config.cache or config.caches_dir) or fits_disk(Path(config.caches_dir), cache_bytes) else 1


def with_entries_of_also_ids(config: CaptureConfig) -> CaptureConfig:
    """The options of a probe: the first records are packed otherwise than in a shard, so no key of theirs is found.

    Instead of what other caches keep at their positions, as many of the teacher's own largest logits are kept.
    """
    found = also_caches(config.also_ids)
    if not found:
        return config
    k = min(config.k + max(other.most_kept for _, other in found), found[0][1].vocabulary_size)
    print(f"also_ids: measured with the largest number of entries that it can keep, as k={k}.")
    return dataclasses.replace(config, k=k, also_ids=None)


def fits_disk(caches_dir: Path, cache_bytes: float) -> bool:
    """Print the free disk space at the folder of the caches, and whether it is enough."""
    folder = caches_dir.absolute()
    while not folder.exists():  # it may have to be created yet
        folder = folder.parent
    free_bytes = shutil.disk_usage(folder).free
    print(f"The disk has {readable(free_bytes)} free at {folder}.")
    if free_bytes < cache_bytes:
        print("This is NOT enough: choose a smaller k, or another caches_dir.")
    return free_bytes >= cache_bytes


def kept_entries(config: CaptureConfig) -> str:
    """The kind of the cache and its options, as in `kind=hybrid k=8 draws=16`."""
    if config.kind is Kind.topk:
        return f"kind=topk k={config.k}"
    if config.kind is Kind.sampled:
        return f"kind=sampled draws={config.draws}"
    return f"kind={config.kind.name} k={config.k} draws={config.draws}"


def run_probe(config: CaptureConfig, text: Text) -> Probe:
    """Capture the corpus's first records for a few seconds, into a temporary folder."""
    teacher = config.teacher
    teacher_folder = model_folder(teacher.path, revision=teacher.revision, with_code=teacher.trust_remote_code)
    tokenizer = cached_tokenizer(teacher_folder, teacher.trust_remote_code)
    check_window(teacher_folder, config.window)
    size = min(PROBE_RECORDS, config.records_per_shard)
    chunks = next(read_chunks(text.files, size=size, columns=text.read_columns, take=text.take))
    with tempfile.TemporaryDirectory() as name:
        path = sequence_file(Path(name), 0)
        arguments = (chunks, text, teacher_folder, teacher.trust_remote_code, config.window, 0)
        write_sequences(path, *arguments)
        shard = open_sequence_file(path)
        if shard.num_rows == 0:
            raise InputError(
                f"corpus: expected usable records, found none at its beginning ({shard.num_skipped} malformed); check "
                "the files and corpus.columns"
            )
        num_records = sum(len(chunk.numbers) for chunk in chunks)
        found = TokenizedCorpus(num_records=num_records, skipped={}, notes={})
        manifest = make_manifest(config, text, tokenizer, teacher_folder, found, hashes={})
        model = prepack(open_model(teacher, compute_device()))
        next(iter(teacher_batches(model, shard, manifest, config)))  # warm-up: the first forward is slower
        return _measure(config, model, shard, manifest, Path(name) / "cache")


def _measure(config: CaptureConfig, model: Model, shard: SequenceFile, manifest: Manifest, cache: Path) -> Probe:
    """Capture the batches of a shard into `cache` until PROBE_SECONDS have passed, and at least one."""
    manifests.create_cache(cache, manifest)
    started, num_tokens, records = time.monotonic(), 0, set[int]()
    with shard_writer(cache, manifest, 0) as writer:
        for pending in teacher_batches(model, shard, manifest, config):
            num_tokens += write_batch(writer, pending)[1]
            records.update(record for sequence in pending.sequences for record in sequence.record_ids)
            if time.monotonic() - started >= PROBE_SECONDS:
                break
        writer.commit(num_skipped=0)
    info = manifests.shard_info(cache, 0)
    assert info is not None
    return Probe(
        num_records=len(records),
        num_tokens=num_tokens,
        num_targets=info.targets,
        bytes=info.bytes,
        seconds=time.monotonic() - started,
    )
