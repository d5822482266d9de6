"""The identity of a run: its options, and its inputs by content; every input is read and checked for it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pipeline.cache import manifest as manifests
from pipeline.cache.shards import check_k
from pipeline.config.schema import HardLabels, Source, TrainConfig
from pipeline.core.object_store import one_location
from pipeline.core.progress import log
from pipeline.core.topk import temperature_index
from pipeline.core.types import InputError, Record
from pipeline.data.records import MalformedRecords, find_shape, parse_records
from pipeline.data.shown import log_supervised
from pipeline.data.text_files import all_records, open_text
from pipeline.data.tokenize import text_hash
from pipeline.evaluation.few_shot import Examples, open_examples
from pipeline.evaluation.predictions import teacher_score
from pipeline.evaluation.requests import EvaluationSet, check_generation_requests, read_evaluation_set
from pipeline.models.compatibility import check_window
from pipeline.models.model_files import code_hash, weights_hash
from pipeline.models.preflight import check_model
from pipeline.models.tokenizer import (
    chat_template_and_end_token,
    check_same_tokenizer,
    needs_begin_token,
    open_tokenizer,
    split_option,
    tokenizer_hash,
)
from pipeline.objective.divergences import NEEDS_EXACT_TAIL
from pipeline.training.builders import class_ids
from pipeline.training.dev_evaluation import evaluates_on_dev, teacher_choices_on_dev
from pipeline.training.held_out import held_out_texts, score_keys
from pipeline.training.inputs import GoldText, RunInputs
from pipeline.training.options_read import (
    adapts_weight,
    caches_read,
    decides_on_dev,
    measures_read,
    options_read,
    reads_corpus,
    reads_gold_text,
)
from pipeline.training.trust import check_measures, check_source


def identity_of(config: TrainConfig) -> tuple[dict[str, Any], RunInputs]:
    """All that decides what a run trains: its options, and its inputs by content; and those inputs.

    Held-out texts are no part of it, except where dev decides: scores belong to a model and a text (`ScoreKey`).
    Reads and checks every input on the way, so that a bad one is refused here, before any model loads. Gold is not
    tokenized here: `GoldText.check`.
    """
    folder, tokenizer, caches = read_model_and_caches(config)
    identity: dict[str, Any] = {
        "options": options_read(config),
        "student": [weights_hash(folder), tokenizer_hash(tokenizer), chat_template_and_end_token(tokenizer)],
        **split_option(tokenizer),
        **code_hash(folder, trust_remote_code=config.student.trust_remote_code),
        **caches,
    }
    gold, gold_records = None, iter(tuple[Record, ...]())
    records: dict[str, Sequence[Record]] = {}
    if reads_gold_text(config):
        assert config.gold is not None
        text = open_text(config.gold, "gold")
        if config.gold.window_begin_token is None:
            text = dataclasses.replace(text, begins_windows=needs_begin_token(folder))
        gold = GoldText(text=text, tokenizer=tokenizer, window=config.window)
        log_supervised(text, tokenizer, window=config.window)
        text = find_shape(text)
        raw = all_records(text.files, text.read_columns, take=text.take)
        gold_records = parse_records(raw, text, tokenizer, MalformedRecords(skip=True))  # counted by `GoldText`
        identity["gold"] = text_hash(text)
    examples = open_examples(config.scoring, config.gold, tokenizer)
    if examples is not None:
        records["few_shot"] = examples.records
        identity["few_shot"] = examples.sha256
    held_out = _read_held_out(config, folder, tokenizer, examples)
    if evaluates_on_dev(config):
        teacher_choices_on_dev(config, held_out["dev"])
    warn_of_shared_records(gold_records, records | {name: found.records for name, found in held_out.items()})
    if decides_on_dev(config):
        assert config.dev is not None
        identity["dev"] = text_hash(open_text(config.dev, "dev"))
    if adapts_weight(config) and (goal := config.loss.kd.adaptive_weight.teacher_predictions) is not None:
        identity["dev_goal"] = teacher_score(held_out["dev"], goal)
    return identity, RunInputs(gold=gold, held_out=held_out, keys=score_keys(config, held_out))


def read_model_and_caches(config: TrainConfig) -> tuple[Path, Any, dict[str, Any]]:
    """The student's folder and tokenizer, and the fingerprints of the caches: checked, in about a second."""
    folder, tokenizer = open_tokenizer(config.student)
    check_model(config.student, tokenizer)
    if config.steps != 0:
        check_window(folder, config.window)
        class_ids(config.loss.confidence.choices, tokenizer)
    return folder, tokenizer, _cache_identity(config, folder, tokenizer)


def _read_held_out(
    config: TrainConfig, folder: Path, tokenizer: Any, examples: Examples | None
) -> dict[str, EvaluationSet]:
    """The held-out texts as requests to the student in a folder."""
    max_new_tokens = config.scoring.max_new_tokens
    held_out = {
        name: read_evaluation_set(
            text, name, tokenizer, folder=folder, max_new_tokens=max_new_tokens, examples=examples
        )
        for name, text in held_out_texts(config).items()
    }
    check_generation_requests(list(held_out.values()))
    return held_out


def warn_of_shared_records(gold: Iterable[Record], others: dict[str, Sequence[Record]]) -> None:
    """Warn of records that a later text shares with an earlier one, gold first: scores on them measure memory.

    Gold may be larger than memory: of its records only those are kept that another text has too.
    """
    keys = {name: [_content(record) for record in found] for name, found in others.items()}
    all_keys = set(itertools.chain.from_iterable(keys.values()))
    known = {name: set(found) for name, found in keys.items()}
    known["gold"] = all_keys.intersection(map(_content, gold)) if all_keys else set()
    for earlier, later in itertools.combinations(("gold", *keys), 2):
        num_shared = sum(key in known[earlier] for key in keys[later])
        if num_shared:
            log.warning("%d of %d records of %s are in %s too", num_shared, len(keys[later]), later, earlier)


def _content(record: Record) -> tuple[str, str]:
    """Prompt and completion; of a record with choices alone, the right one is its completion."""
    right = record.choices[record.answer] if record.completion is None and record.answer is not None else None
    return record.prompt or "", record.completion or right or ""


def _cache_identity(config: TrainConfig, folder: Path, tokenizer: Any) -> dict[str, Any]:
    """The fingerprints of the caches that a run reads."""
    read = caches_read(config)
    found = [(what, check_cache(config, address, what, folder, tokenizer)) for what, address in read]
    if reads_corpus(config):
        check_same_temperatures([address for _, address in read])
    identity: dict[str, Any] = {what: fingerprint for what, fingerprint in found if what != "more_caches"}
    if more := [fingerprint for what, fingerprint in found if what == "more_caches"]:
        identity["more_caches"] = more
    if (learnt_on := check_source(config, folder, tokenizer)) is not None:
        identity["learn_on"] = learnt_on
    return identity


def check_cache(config: TrainConfig, address: str, what: str, folder: Path, tokenizer: Any) -> str:
    """The fingerprint of a cache; InputError where it is incomplete, or this student or objective cannot read it."""
    cache, kd, hard = one_location(address, what), config.loss.kd, config.loss.hard
    manifest = manifests.load_manifest(cache)
    manifests.committed_shards(cache, manifest)
    check_same_tokenizer(manifest, tokenizer, cache=str(cache), student=str(folder))
    check_window(folder, manifest.window)
    temperature_index(manifest.temperatures, kd.temperature)
    if config.k is not None:
        check_k(config.k, manifest, cache)
    if kd.divergence.name in NEEDS_EXACT_TAIL and kd.weight > 0 and (manifest.kind, manifest.tail) != ("topk", "exact"):
        raise InputError(
            f"divergence={kd.divergence.name}: expected a topk cache with an exact tail, because it is "
            f"not linear in the teacher's probabilities, found {manifest.kind}, tail {manifest.tail} ({cache}); "
            "use forward_kl"
        )
    check_measures(measures_read(config), manifest, cache, k=config.k)
    if kd.tail_weight != 1.0 and kd.weight > 0 and manifest.kind != "topk":
        raise InputError(
            f"loss.kd.tail_weight: expected 1 or a topk cache, whose tail has a mass, found {kd.tail_weight} and "
            f"{manifest.kind} ({cache}); capture with kind=topk"
        )
    if config.curriculum_parts > 1 and what != "gold_cache" and manifest.tail != "exact":
        raise InputError(
            f"curriculum_parts: expected caches with the teacher's entropy, found one with tail {manifest.tail} "
            f"({cache}), an import or a pool, which have none; capture with this project, or use curriculum_parts=1"
        )
    if hard.weight == 0 or (Source.gold if what == "gold_cache" else Source.corpus) not in hard.on:
        return manifest.fingerprint
    if hard.take is HardLabels.likeliest and manifest.kind == "sampled":
        raise InputError(
            f"loss.hard.take=likeliest: expected a cache that keeps the largest logits, found {manifest.kind} "
            f"({cache}), whose top entry is a matter of chance; capture with kind=topk or hybrid"
        )
    if hard.take is HardLabels.generated and "complete" not in manifest.made_of:
        raise InputError(
            f"loss.hard.take=generated: expected a cache whose records the teacher completed, found none in {cache}; "
            "capture with complete.how, or use loss.hard.take=likeliest"
        )
    return manifest.fingerprint


def check_same_temperatures(addresses: list[str]) -> None:
    """Refuse caches with different temperatures: their distributions share batches."""
    found = {address: manifests.load_manifest(one_location(address, "cache")).temperatures for address in addresses}
    if len(set(found.values())) > 1:
        raise InputError(
            f"cache: expected the same captured temperatures in all that are read together, found "
            f"{ {address: list(temperatures) for address, temperatures in found.items()} }; capture them with the same"
        )
