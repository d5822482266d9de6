"""Stage one: the teacher reads the corpus once and leaves its top-k logits as shards."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from pipeline import manifest as manifests
from pipeline import models
from pipeline.config import CaptureConfig, Kind, check_capture
from pipeline.corpus import collate_inputs, sequences
from pipeline.runtime import Progress, compute_device, log, start_logging
from pipeline.schema import SCHEMA_VERSION
from pipeline.shards import shard_writer
from pipeline.text import Rejections, Survey, Text, open_text, raw_records, survey
from pipeline.topk import entropy, hybrid, sampled, top_k, uniforms, widen
from pipeline.types import UNKNOWN_TARGET, Captured, InputError, Manifest, TokenSequence, TopK

HEAD_POSITIONS = 512  # positions in one pass through the head: bounds the [N, V] matrix


def run(config: CaptureConfig) -> Path:
    """Capture what is not captured yet; returns the cache folder."""
    start_logging()
    check_capture(config)
    folder = models.model_folder(config.teacher.path, revision=config.teacher.revision)
    tokenizer = models.load_tokenizer(folder, trust_remote_code=config.teacher.trust_remote_code)
    models.check_window(folder, config.window)
    if config.k > models.vocabulary_size(tokenizer):
        raise InputError(
            f"k: expected at most {models.vocabulary_size(tokenizer)} (the vocabulary of {folder}), found {config.k}"
        )
    text = open_text(config.corpus, "corpus")
    manifest = plan(config, folder, tokenizer, survey(text, tokenizer))
    cache = Path(config.caches_dir) / f"{config.name}-{manifest.fingerprint[:12]}"
    manifests.start(cache, manifest)
    todo = [index for index in range(manifest.num_shards) if manifests.committed(cache, index) is None]
    if todo:
        log.info("capturing %d of %d shards into %s", len(todo), manifest.num_shards, cache)
        capture_shards(config, cache, manifest, todo, folder, tokenizer, text)
    finished = manifests.finish(cache, manifest)
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
        "chat_template": tokenizer.chat_template,
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


def capture_shards(
    config: CaptureConfig,
    cache: Path,
    manifest: Manifest,
    todo: Sequence[int],
    folder: Path,
    tokenizer: Any,
    text: Text,
) -> None:
    """Capture the shards of `todo`; the teacher loads once the first of them has proved readable."""
    total = sum(len(manifests.shard_range(manifest, index)) for index in todo)
    progress = Progress("capture", total=total, unit=" records", log_every_seconds=config.log_every_seconds)
    started, tokens = time.monotonic(), 0
    teacher: models.Model | None = None
    raw = raw_records(text.files)
    for index in range(manifest.num_shards):
        records = manifests.shard_range(manifest, index)
        mine = itertools.islice(raw, len(records))
        if index not in todo:
            for _ in mine:
                pass
            continue
        rejections = Rejections(skip=text.skip_malformed)
        packed = list(sequences(mine, text, tokenizer, rejections, window=config.window, first_id=records.start))
        teacher = teacher or load_teacher(config, folder)
        with shard_writer(cache, manifest, index) as writer:
            for batch in batched(packed, config.batch_sequences):
                for sequence, captured in zip(batch, capture_batch(teacher, batch, manifest), strict=True):
                    writer.write(sequence, captured)
                    tokens += len(sequence.input_ids_S)
                share = len(records) * len(batch) / max(len(packed), 1)
                progress.advance(share, tokens_per_second=tokens / (time.monotonic() - started))
            writer.commit(num_skipped=rejections.count)
    progress.close()


def load_teacher(config: CaptureConfig, folder: Path) -> models.Model:
    """The weak model, for reading only."""
    return models.load_model(
        folder,
        dtype=config.teacher.dtype.name,
        device=compute_device(),
        attention=config.teacher.attention,
        num_layers=config.teacher.num_layers,
        trust_remote_code=config.teacher.trust_remote_code,
    ).eval()


def batched(packed: Sequence[TokenSequence], size: int) -> Iterator[Sequence[TokenSequence]]:
    """Consecutive batches of at most `size`."""
    return (packed[i : i + size] for i in range(0, len(packed), size))


@torch.inference_mode()
def capture_batch(teacher: models.Model, batch: Sequence[TokenSequence], manifest: Manifest) -> list[Captured]:
    """One forward; what stage one stores about each sequence. Only supervised positions reach the head."""
    device = next(teacher.parameters()).device
    input_ids_BS, position_ids_BS, flat_N = collate_inputs(batch)
    hidden_BSH = models.hidden_states(teacher, input_ids_BS.to(device), position_ids_BS.to(device))
    hidden_NH = hidden_BSH.flatten(0, 1)[flat_N.to(device)]
    targets_N = torch.cat([sequence.target_ids_N for sequence in batch]).to(device)
    counts = [len(sequence.target_positions_N) for sequence in batch]
    draws = [
        uniforms(sequence.key, count, draws=manifest.draws, seed=manifest.draw_seed)
        for sequence, count in zip(batch, counts, strict=True)
    ]
    chunks = [
        _capture_chunk(models.logits(teacher, hidden, manifest.vocabulary_size).float(), targets, drawn, manifest)
        for hidden, targets, drawn in zip(
            *(part.split(HEAD_POSITIONS) for part in (hidden_NH, targets_N, torch.cat(draws))), strict=True
        )
    ]
    width = max(chunk[0].ids_NK.shape[1] for chunk in chunks)
    tops = [widen(top, width) for top, _, _ in chunks]
    columns = [
        torch.cat([top.ids_NK for top in tops]),
        torch.cat([top.relative_logits_NK for top in tops]),
        torch.cat([top.log_tail_NC for top in tops]),
        torch.cat([next_log_prob_N for _, next_log_prob_N, _ in chunks]),
        torch.cat([entropy_N for _, _, entropy_N in chunks]),
    ]
    return [
        Captured(
            top=TopK(ids_NK=ids, relative_logits_NK=relative, log_tail_NC=tail, temperatures=manifest.temperatures),
            next_log_prob_N=next_log_prob_N,
            entropy_N=entropy_N,
        )
        for ids, relative, tail, next_log_prob_N, entropy_N in zip(
            *(column.cpu().split(counts) for column in columns), strict=True
        )
    ]


def _capture_chunk(
    logits_NV: torch.Tensor, targets_N: torch.Tensor, uniforms_ND: torch.Tensor, manifest: Manifest
) -> tuple[TopK, torch.Tensor, torch.Tensor]:
    """What is kept of some positions: distribution, log-probability of the known target, entropy."""
    if manifest.kind == "topk":
        top = top_k(logits_NV, k=manifest.k, temperatures=manifest.temperatures)
    elif manifest.kind == "sampled":
        top = sampled(logits_NV, uniforms_ND=uniforms_ND)
    else:
        top = hybrid(logits_NV, k=manifest.k, uniforms_ND=uniforms_ND)
    target_logits_N = logits_NV.gather(1, targets_N.clamp(min=0)[:, None])[:, 0]
    log_prob_N = target_logits_N - torch.logsumexp(logits_NV, dim=1)
    log_prob_N = torch.where(targets_N == UNKNOWN_TARGET, torch.nan, log_prob_N)
    return top, log_prob_N.half(), entropy(logits_NV).half()
