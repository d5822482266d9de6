"""The identity of a run: its options, and its inputs by content; every input is read and checked on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.cache import manifest as manifests
from pipeline.config.options import identity_options
from pipeline.config.schema import HardLabels, Source, TrainConfig
from pipeline.core.files import content_hash
from pipeline.core.object_store import one_location
from pipeline.core.topk import temperature_index
from pipeline.core.types import InputError
from pipeline.data.records import open_text
from pipeline.data.tokenize import check_text, text_hash
from pipeline.evaluation.predictions import teacher_choices, teacher_score
from pipeline.evaluation.requests import check_generation_requests, open_evaluation_set
from pipeline.models import loading as models
from pipeline.models.compatibility import check_window, max_positions
from pipeline.models.tokenizer import chat_template_and_end_token, check_same_tokenizer, open_tokenizer, tokenizer_hash
from pipeline.objective.divergences import NEEDS_TAIL
from pipeline.training.builders import class_ids


def identity_of(config: TrainConfig) -> dict[str, Any]:
    """All that decides the result of a run: its options, and its inputs by their content.

    Reads and checks every input on the way, so that a bad one stops here, before any model loads.
    """
    folder, tokenizer = open_tokenizer(config.student)
    check_window(folder, config.window)
    class_ids(config.loss.confidence.choices, tokenizer)
    identity: dict[str, Any] = {
        "options": identity_options(config),
        "student": [models.weights_hash(folder), tokenizer_hash(tokenizer), chat_template_and_end_token(tokenizer)],
    }
    if config.cache is not None and config.gold_fraction < 1:
        identity["cache"] = check_cache(config, config.cache, "cache", folder, tokenizer)
        further = [check_cache(config, address, "more_caches", folder, tokenizer) for address in config.more_caches]
        identity |= {"more_caches": further} if further else {}
        check_same_temperatures(
            [config.cache, *config.more_caches, *([config.gold_cache] if config.gold_cache else [])]
        )
    if config.gold_cache is not None and config.gold_fraction > 0:
        identity["gold_cache"] = check_cache(config, config.gold_cache, "gold_cache", folder, tokenizer)
    follows = config.loss.kd.adaptive_weight
    if config.gold is not None and config.gold_cache is None and config.gold_fraction > 0:
        gold = open_text(config.gold, "gold")
        identity["gold"] = check_text(gold, tokenizer, window=config.window, require_targets=True).sha256
    longest, exams = max_positions(folder), []
    for split, held_out in (("dev", config.dev), ("test", config.test)):
        if held_out is not None:
            text = open_text(held_out, split)
            exam = open_evaluation_set(text, tokenizer, longest=longest, max_new_tokens=config.scoring.max_new_tokens)
            exams.append(exam)
            identity[split] = text_hash(text)
            if split == "dev" and follows.every_steps > 0 and follows.teacher_predictions is not None:
                identity["dev_goal"] = teacher_score(exam, follows.teacher_predictions)
            if split == "test" and config.scoring.teacher_predictions is not None:
                chosen = teacher_choices(exam, config.scoring.teacher_predictions)
                identity["teacher_predictions"] = content_hash(chosen.to_list())
    check_generation_requests(exams)
    return identity


def check_cache(config: TrainConfig, address: str, what: str, folder: Path, tokenizer: Any) -> str:
    """The fingerprint of a whole cache that this student and this objective can read."""
    cache, kd, hard = one_location(address, what), config.loss.kd, config.loss.hard
    manifest = manifests.load_manifest(cache)
    manifests.committed_shards(cache, manifest)
    check_same_tokenizer(
        manifest.made_of["tokenizer"], tokenizer_hash(tokenizer), cache=str(cache), student=str(folder)
    )
    check_window(folder, manifest.window)
    temperature_index(manifest.temperatures, kd.temperature)
    if config.k is not None and not 1 <= config.k <= manifest.k:
        raise InputError(f"k: expected 1 to {manifest.k} (captured in {cache}), found {config.k}")
    if kd.divergence.name in NEEDS_TAIL and kd.weight > 0 and (manifest.kind, manifest.tail) != ("topk", "exact"):
        raise InputError(
            f"divergence={kd.divergence.name}: expected a topk cache with an exact tail, because it is not "
            f"linear in what the teacher says, found {manifest.kind}, tail {manifest.tail} ({cache}); use forward_kl"
        )
    if config.curriculum_parts > 1 and what != "gold_cache" and manifest.tail != "exact":
        raise InputError(
            f"curriculum_parts: expected caches that know the teacher's entropy, found one with tail {manifest.tail} "
            f"({cache}), which was imported; capture with this project, or use curriculum_parts=1"
        )
    if hard.weight == 0 or (Source.gold if what == "gold_cache" else Source.corpus) not in hard.on:
        return manifest.fingerprint
    if hard.take is HardLabels.likeliest and manifest.kind == "sampled":
        raise InputError(
            f"loss.hard.take=likeliest: expected a cache that keeps the largest logits, found {manifest.kind} "
            f"({cache}), whose likeliest draw is chance; capture with kind=topk or hybrid"
        )
    if hard.take is HardLabels.generated and "complete" not in manifest.made_of:
        raise InputError(
            f"loss.hard.take=generated: expected a cache whose records the teacher completed, found none in {cache}; "
            "capture with complete.how, or use loss.hard.take=likeliest"
        )
    return manifest.fingerprint


def check_same_temperatures(addresses: list[str]) -> None:
    """Refuse caches of different temperatures: their distributions stand in one batch."""
    found = {address: manifests.load_manifest(one_location(address, "cache")).temperatures for address in addresses}
    if len(set(found.values())) > 1:
        raise InputError(
            f"cache: expected the same captured temperatures in all that are read together, found "
            f"{ {address: list(temperatures) for address, temperatures in found.items()} }; capture them alike"
        )
