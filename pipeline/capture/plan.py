"""The plan of a capture: one pass over the corpus, which is tokenized, packed and written as one file per shard.

Each record is read, parsed and tokenized once, here, so a record that cannot be used stops the capture before the
teacher is loaded. The sequences stay in a local folder until they are captured; they take a few bytes per token, a few
percent of the finished cache. The manifest stays there too, so the same command finds its cache without reading the
corpus again.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from pipeline.cache import manifest as manifests
from pipeline.cache.leases import hold_lease
from pipeline.cache.plain_manifest import sealed
from pipeline.capture.also_caches import check_also_ids
from pipeline.capture.corpus import cached_tokenizer, open_corpus, tokenize_corpus
from pipeline.capture.identity import make_manifest
from pipeline.capture.plan_lookup import PlanFolder, file_states
from pipeline.config.schema import CaptureConfig
from pipeline.core.file_systems import check_folder
from pipeline.core.files import explain, sync_files
from pipeline.core.object_store import open_location, write_json
from pipeline.core.progress import log
from pipeline.core.types import InputError, Manifest
from pipeline.data.shown import log_supervised
from pipeline.data.text_files import Text
from pipeline.data.tokenize import text_hash
from pipeline.models.compatibility import check_window
from pipeline.models.loading import resolve_dtype
from pipeline.models.model_files import code_hash, weights_hash
from pipeline.models.paths import model_folder
from pipeline.models.preflight import check_model
from pipeline.models.tokenizer import tokenizer_hash, tokenizer_parts, vocabulary_size

PURPOSE = """\
Plans of captures, one folder each: the corpus as tokens, and the manifest of the cache that is made from it.
The tokens go when their cache is finished. The manifests stay, so that the same command finds its cache without reading
the corpus again. While no capture runs, the whole folder may be deleted: the next command plans anew.
"""


def make_plan(config: CaptureConfig, plan: PlanFolder, *, with_sequences: bool = True) -> Manifest:
    """Plan a capture, or wait for another process that is planning the same one; returns the manifest.

    The plan is kept in its folder. With `with_sequences=False` an existing manifest is enough: its sequences may have
    been captured and deleted. InputError for options that do not fit the teacher, and for records that cannot be used.
    """
    teacher = resolve_dtype(config.teacher)
    folder = model_folder(teacher.path, revision=teacher.revision, with_code=teacher.trust_remote_code)
    tokenizer = cached_tokenizer(folder, teacher.trust_remote_code)
    check_model(teacher, tokenizer)
    check_window(folder, config.window)
    if config.k > vocabulary_size(tokenizer):
        raise InputError(
            f"k: expected at most {vocabulary_size(tokenizer)} (the vocabulary of {folder}), found {config.k}; choose "
            "a smaller k"
        )
    if config.corpus.end_token and tokenizer.eos_token_id is None:
        raise InputError("corpus: expected a tokenizer with an end token, found none; set corpus.end_token=false")
    if config.also_ids is not None:  # only then: a tokenizer's hash takes a third of a second
        check_also_ids(config, tokenizer_hash(tokenizer), vocabulary_size(tokenizer))
    cache = open_location(config.cache or config.caches_dir)
    if isinstance(cache, Path):  # before the corpus is read: it may take hours
        check_folder(cache, "caches_dir" if config.cache is None else "cache")
    check_folder(plan.folder, "plans_dir")
    explain(plan.folder.parent, PURPOSE)
    logged = -math.inf
    while True:
        with hold_lease(plan.folder / "lease", lease_seconds=config.lease_seconds) as held:
            manifest = plan.load()
            if manifest is not None and (plan.sequences.exists() or not with_sequences):
                return manifest
            if held:
                return _write_plan(dataclasses.replace(config, teacher=teacher), folder, tokenizer, plan)
        if time.monotonic() - logged >= config.log_every_seconds:
            logged = time.monotonic()
            log.info("%s: another process is planning this capture; waiting", plan.folder)
        time.sleep(min(1.0, config.lease_seconds / 4))


def _write_plan(config: CaptureConfig, folder: Path, tokenizer: Any, plan: PlanFolder) -> Manifest:
    """Tokenize the corpus into the plan's folder and write the manifest last; `folder` is the teacher's."""
    text = open_corpus(config, folder)
    log_supervised(text, tokenizer, window=config.window)
    states_before = file_states([*text.files, folder])
    unfinished = plan.folder / ".unfinished"  # always this name: a plan that was interrupted goes on in it
    try:
        unfinished.mkdir(exist_ok=True)
        for leftover in unfinished.glob(".*.tmp"):  # a file that a killed process was writing
            leftover.unlink(missing_ok=True)
        manifest = _tokenize_and_hash(config, text, folder, tokenizer, unfinished)
        if file_states([*text.files, folder]) != states_before:
            raise InputError(
                "corpus: expected files that do not change, found one changed while it was read; run again"
            )
        sync_files(unfinished)
        shutil.rmtree(plan.sequences, ignore_errors=True)
        unfinished.rename(plan.sequences)
    except InputError:  # the corpus or an option has to be changed, which makes another plan
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    except BrokenProcessPool:
        raise InputError(
            "corpus: expected the processes that tokenize it to live, found one killed (often for want of memory); run "
            "the same command again: it goes on where it was"
        ) from None
    except OSError as error:
        raise InputError(
            f"{unfinished}: expected to write the tokenized corpus, found {error.strerror or error}; free disk space "
            "and run the same command again, or choose another folder with plans_dir="
        ) from error
    write_json(manifests.manifest_path(plan.folder), manifests.to_plain(manifest))
    return manifest


def _tokenize_and_hash(config: CaptureConfig, text: Text, folder: Path, tokenizer: Any, sequences: Path) -> Manifest:
    """Tokenize the corpus into a folder while its files and the teacher's weights are hashed; returns the manifest."""
    with ThreadPoolExecutor(2) as hashing:
        corpus_sha256 = hashing.submit(text_hash, text)
        weights_sha256 = hashing.submit(weights_hash, folder)
        found = tokenize_corpus(config, text, folder, sequences)
        tokenizer_sha256 = tokenizer_hash(tokenizer)
    hashes = {
        "corpus": corpus_sha256.result(),
        "teacher_weights": weights_sha256.result(),
        "tokenizer": tokenizer_sha256,
        **code_hash(folder, trust_remote_code=config.teacher.trust_remote_code),
    }
    return dataclasses.replace(
        make_manifest(config, text, tokenizer, folder, found, hashes),
        tokenizer=sealed(tokenizer_parts(tokenizer), tokenizer_sha256),
        skipped=sealed(found.skipped, tokenizer_sha256) if found.skipped else None,
    )
