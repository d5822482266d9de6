"""What a capture would take, from a short probe: records, tokens, bytes, shards and hours, before they are spent."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
import tempfile
import time
from pathlib import Path

from pipeline.cache import manifest as manifests
from pipeline.cache.sequence_files import SequenceFile, open_sequence_file, sequence_file
from pipeline.cache.shards import shard_writer
from pipeline.capture.plan import corpus_of, make_manifest, tokenizer_of, write_sequences
from pipeline.capture.worker import teacher_batches, write
from pipeline.config.schema import CaptureConfig, Kind
from pipeline.config.validate import check_capture
from pipeline.core.files import is_url
from pipeline.core.progress import readable, start_logging
from pipeline.core.runtime import compute_device, keep_allocator_memory
from pipeline.core.types import Manifest
from pipeline.data.record_counts import count_records
from pipeline.data.records import Text, read_chunks
from pipeline.models import loading as models
from pipeline.models.compatibility import check_window
from pipeline.models.forward import Model
from pipeline.models.paths import model_folder
from pipeline.models.prepack import prepack

PROBE_RECORDS, PROBE_SECONDS = 2048, 20.0
COMFORTABLE_SHARD_BYTES = 4 << 30


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What some records of the corpus turned into, and how long that took."""

    num_records: int
    num_sequences: int
    num_tokens: int
    num_targets: int
    bytes: int
    seconds: float


def run(config: CaptureConfig) -> int:
    """Print what this capture would take; 1 if it would not fit on the disk."""
    start_logging(level=30)
    check_capture(config)
    keep_allocator_memory()
    config = dataclasses.replace(config, teacher=models.resolve_dtype(config.teacher))
    text = corpus_of(config)
    exact, num_records = count_records(text)
    found = probe(config, text)
    scale = num_records / found.num_records
    num_shards = -(-round(num_records) // config.records_per_shard)
    total_bytes, seconds = found.bytes * scale, found.seconds * scale
    kept = {Kind.topk: f"k {config.k}", Kind.sampled: f"{config.draws} draws"}
    kind = kept.get(config.kind, f"k {config.k} and {config.draws} draws")
    about = "" if exact else "about "
    print(f"probe     {found.num_records} records, {found.num_tokens} tokens in {found.seconds:.1f} s")
    tokens = found.num_tokens * scale
    print(f"corpus    {about}{num_records:,.0f} records, {tokens:,.0f} tokens in {len(text.files)} files")
    print(f"keeping   {config.kind.name}, {kind}: {found.bytes / found.num_targets:.1f} bytes a target")
    print(f"cache     {readable(total_bytes)}, {found.num_targets * scale:,.0f} targets in {num_shards:,} shards")
    speed = found.num_tokens / found.seconds
    print(f"teacher   {speed:,.0f} tokens/s in {config.teacher.dtype.name} by one worker: {hours(seconds)}")
    if total_bytes / num_shards > COMFORTABLE_SHARD_BYTES:
        smaller = max(int(config.records_per_shard * COMFORTABLE_SHARD_BYTES / (total_bytes / num_shards)), 1)
        print(f"advice    a shard would take {readable(total_bytes / num_shards)}: records_per_shard={smaller}")
    if is_url(config.cache or config.caches_dir):
        return 0
    folder = next(path for path in (Path(config.caches_dir).absolute() / "x").parents if path.exists())
    free = shutil.disk_usage(folder).free
    print(f"disk      {readable(free)} free at {folder}")
    if free < total_bytes:
        print("          NOT enough: a smaller k, or another caches_dir")
        return 1
    return 0


def hours(seconds: float) -> str:
    """A duration as people say it."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def probe(config: CaptureConfig, text: Text) -> Probe:
    """Capture the first records into a folder that goes away, for a few seconds, and measure."""
    teacher = config.teacher
    folder = model_folder(teacher.path, revision=teacher.revision, with_code=teacher.trust_remote_code)
    tokenizer = tokenizer_of(folder, teacher.trust_remote_code)
    check_window(folder, config.window)
    group = next(read_chunks(text.files, size=min(PROBE_RECORDS, config.records_per_shard)))
    with tempfile.TemporaryDirectory() as name:
        path = sequence_file(Path(name), 0)
        write_sequences(path, group, text, folder, teacher.trust_remote_code, config.window, 0)
        shard = open_sequence_file(sequence_file(Path(name), 0))
        num_records = sum(len(piece.numbers) for piece in group)
        manifest = make_manifest(config, tokenizer, num_records, hashes={})
        model = prepack(models.open_model(teacher, compute_device()))
        next(iter(teacher_batches(model, shard, manifest, config)))  # the first forward pays for what is set up once
        return _captured(config, model, shard, manifest, Path(name) / "cache")


def _captured(config: CaptureConfig, model: Model, shard: SequenceFile, manifest: Manifest, cache: Path) -> Probe:
    manifests.create_cache(cache, manifest)
    started, num_sequences, num_tokens, records = time.monotonic(), 0, 0, 0
    with shard_writer(cache, manifest, 0) as writer:
        for flight in itertools.takewhile(
            lambda _: time.monotonic() - started < PROBE_SECONDS, teacher_batches(model, shard, manifest, config)
        ):
            some, tokens, _ = write(writer, flight)
            num_sequences, num_tokens = num_sequences + some, num_tokens + tokens
            records += len({record for sequence in flight.sequences for record in sequence.record_ids})
        writer.commit(num_skipped=0)
    info = manifests.shard_info(cache, 0)
    assert info is not None
    return Probe(
        num_records=records,
        num_sequences=num_sequences,
        num_tokens=num_tokens,
        num_targets=info.targets,
        bytes=info.bytes,
        seconds=time.monotonic() - started,
    )
