"""The actions of scripts/audit.py: verify, summary, replay and show. None of them writes into the cache."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import torch

from pipeline.audit.charts import draw_summary
from pipeline.audit.replay import CONTROL_MULTIPLE, check_teacher, replay
from pipeline.audit.sampling import random_samples, samples_of_record
from pipeline.audit.summary import summarize
from pipeline.audit.terminal import position_lines, replay_lines, summary_lines
from pipeline.audit.verify import findings, load_manifest
from pipeline.cache import manifest as manifests
from pipeline.config.commands import AuditConfig
from pipeline.config.schema import Dtype, ModelConfig
from pipeline.config.validate import check_audit
from pipeline.core.files import check_writable, write_json
from pipeline.core.object_store import Location, one_location
from pipeline.core.progress import Progress, log, readable, start_logging
from pipeline.core.runtime import compute_device
from pipeline.core.types import InputError, Manifest
from pipeline.models.loading import open_model
from pipeline.models.tokenizer import open_tokenizer, tokenizer_hash

EXIT_UNREAD = 141  # 128 + SIGPIPE, as the shell reports it of other programs


def run(action: str, config: AuditConfig) -> int:
    """Run one action; returns the exit code: 0 if nothing is wrong, 1 if something is wrong with the cache."""
    start_logging()
    check_audit(config)
    try:
        code = run_action(action, config)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output has ended, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is flushed when Python exits
        return EXIT_UNREAD
    return code


def run_action(action: str, config: AuditConfig) -> int:
    """Run one action; returns its exit code."""
    if action == "verify":
        return verify(open_cache(config.cache), config)
    if action == "summary":
        return summary(open_cache(config.cache), config)
    if action == "replay":
        return replay_rows(open_cache(config.cache), config)
    if action == "show":
        return show(open_cache(config.cache), config)
    raise InputError(f"action: expected verify, summary, replay or show, found {action!r}; give one of these")


def open_cache(location: str) -> Location:
    """The place of a cache: an address, or a folder from its path or a glob that matches exactly one."""
    return one_location(location, "cache")


def finished_manifest(cache: Location) -> Manifest:
    """The manifest of a cache; InputError if a shard is not committed or a ShardInfo cannot be read."""
    manifest = load_manifest(cache)
    try:
        manifests.committed_shards(cache, manifest)
    except InputError:
        raise
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{cache}: expected readable ShardInfos, found one damaged ({error}); run scripts/audit.py verify"
        ) from None
    return manifest


def verify(cache: Location, config: AuditConfig) -> int:
    """Print every finding; returns 1 if there is one, else 0."""
    lines = findings(cache, log_every_seconds=config.log_every_seconds)
    for line in lines:
        print(line)
    if lines:
        print(f"{cache}: {len(lines)} {'finding' if len(lines) == 1 else 'findings'}")
        return 1
    manifest = finished_manifest(cache)
    infos = manifests.committed_shards(cache, manifest)
    print(
        f"{cache}: complete and correct: {manifest.num_records} records ({manifest.num_skipped} skipped), "
        f"{sum(info.rows for info in infos)} sequences, {sum(info.targets for info in infos)} targets, "
        f"{readable(sum(info.bytes for info in infos))}"
    )
    return 0


# -------------------------------------------------------------------------------------------- summary


def summary(cache: Location, config: AuditConfig) -> int:
    """Print the figures of the cache; with `config.out` write them as JSON and as pictures too."""
    if config.out is not None:
        check_writable(Path(config.out), "out")
    figures = summarize(cache, finished_manifest(cache), log_every_seconds=config.log_every_seconds)
    for line in summary_lines(figures, cache):
        print(line)
    if config.out is not None:
        out = Path(config.out)
        write_json(out / "summary.json", figures)
        pictures = draw_summary(figures, name=cache.name, out=out)
        log.info("wrote %s", ", ".join(map(str, [out / "summary.json", *pictures])))
    return 0


# --------------------------------------------------------------------------------------------- replay


def replay_rows(cache: Location, config: AuditConfig) -> int:
    """Run the teacher again on random sequences; returns 1 if the cached values differ by more than noise, else 0."""
    manifest, teacher_config = finished_manifest(cache), _teacher(config)
    if "teacher_weights" not in manifest.made_of:
        raise InputError(
            f"{cache}: expected a cache that one teacher captured here, found an import or a pool; replay the "
            "members of a pool instead"
        )
    folder, tokenizer = open_tokenizer(teacher_config)
    _check_tokenizer(manifest, tokenizer, folder)
    num_layers = teacher_config.num_layers
    if teacher_config.dtype is Dtype.auto:  # the dtype of the capture, not the one that suits this machine
        teacher_config = dataclasses.replace(teacher_config, dtype=Dtype[manifest.made_of["teacher_dtype"]])
    check_teacher(manifest, folder=folder, dtype=teacher_config.dtype.name, num_layers=num_layers)
    samples = random_samples(cache, manifest, rows=config.rows, seed=config.seed)
    teacher = open_model(teacher_config, compute_device())
    progress = Progress("replay", total=2 * len(samples), unit=" sequences", log_every_seconds=config.log_every_seconds)
    results = replay(teacher, samples, manifest, batch_sequences=config.batch_sequences, progress=progress)
    progress.close()
    for line in replay_lines(results):
        print(line)
    exceeded = [result.measure for result in results if not result.is_within_tolerance]
    rule = f"tolerance: {CONTROL_MULTIPLE:g} times the largest difference of the control, plus float16 rounding"
    if exceeded:
        print(f"{cache}: NOT CONSISTENT in {', '.join(exceeded)} ({len(samples)} sequences; {rule}).")
        print(
            "Run scripts/audit.py verify. If it finds nothing, another teacher made the cache, "
            "or the machine that made it rounds differently."
        )
        return 1
    print(f"{cache}: consistent: {len(samples)} sequences replayed ({rule})")
    return 0


def _teacher(config: AuditConfig) -> ModelConfig:
    if config.teacher is None:
        raise InputError("teacher.path: expected the folder of the teacher, found none; give teacher.path=FOLDER")
    return config.teacher


def _check_tokenizer(manifest: Manifest, tokenizer: Any, folder: Path) -> None:
    found, expected = tokenizer_hash(tokenizer), str(manifest.made_of.get("tokenizer"))
    if found != expected:
        raise InputError(
            f"teacher.path: expected the tokenizer {expected[:12]} of the cache, found {found[:12]} in {folder}; "
            "give the folder of the cache's teacher"
        )


# ----------------------------------------------------------------------------------------------- show


def show(cache: Location, config: AuditConfig) -> int:
    """Print positions as text: one random position of each of some random sequences, or all positions of a record."""
    manifest = finished_manifest(cache)
    folder, tokenizer = open_tokenizer(_teacher(config))
    _check_tokenizer(manifest, tokenizer, folder)
    generator = torch.Generator().manual_seed(config.seed)
    if config.record is not None:
        samples = samples_of_record(cache, manifest, config.record)
    else:
        samples = random_samples(cache, manifest, rows=config.rows, seed=config.seed)
    for sample in samples:
        num_targets = len(sample[0].target_positions_N)
        random_index = int(torch.randint(num_targets, (1,), generator=generator))
        for n in range(num_targets) if config.record is not None else [random_index]:
            lines = position_lines(sample, n, tokenizer, top=config.top, record=config.record)
            if lines:
                print("\n".join(lines), end="\n\n")
    return 0
