"""The identity of a cache: everything that changes its tokens or its distributions, and nothing else."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from pipeline.cache import manifest as manifests
from pipeline.cache.schema import SCHEMA_VERSION
from pipeline.capture.also_caches import of_also_ids
from pipeline.capture.corpus import TokenizedCorpus
from pipeline.config.options import identity_options
from pipeline.config.schema import CaptureConfig, ChatConfig, ColumnsConfig, CompletionMode, Kind
from pipeline.core.types import Manifest
from pipeline.data.chat import reads_clock
from pipeline.data.file_kinds import format_suffix
from pipeline.data.text_files import Text
from pipeline.data.tokenize import CUT_LEFT
from pipeline.models.tokenizer import (
    chat_template_and_end_token,
    end_token_ids,
    split_option,
    vocabulary_size,
)


def make_manifest(
    config: CaptureConfig, text: Text, tokenizer: Any, folder: Path, found: TokenizedCorpus, hashes: dict[str, str]
) -> Manifest:
    """The manifest of a cache. `hashes` are the sha256 of its inputs; with the options they make the fingerprint.

    `folder` is the teacher's, `text` the corpus as it is read.
    """
    made_of = {
        **hashes,
        "schema_version": SCHEMA_VERSION,
        "teacher_num_layers": config.teacher.num_layers,
        "teacher_dtype": config.teacher.dtype.name,
        **chat_template_and_end_token(tokenizer),
        **split_option(tokenizer),
        "targets": text.targets,
        "malformed": config.corpus.malformed.name,
        "end_token": config.corpus.end_token,
        "window": config.window,
        "records_per_shard": config.records_per_shard,
        "kind": config.kind.name,
        "k": 0 if config.kind is Kind.sampled else config.k,
        "draws": 0 if config.kind is Kind.topk else config.draws,
        "draw_seed": 0 if config.kind is Kind.topk else config.seed,
        "temperatures": sorted(config.temperatures),
        **({} if config.only_fold is None else {"only_fold": config.only_fold}),  # it came later
        **_of_completions(config, folder, tokenizer),
        **of_also_ids(config, found.num_records),
        **_of_text(config, text, tokenizer, found),
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
        vocabulary_size=vocabulary_size(tokenizer),
        window=config.window,
        num_records=found.num_records,
        num_shards=math.ceil(found.num_records / config.records_per_shard),
        records_per_shard=config.records_per_shard,
    )


def _of_completions(config: CaptureConfig, folder: Path, tokenizer: Any) -> dict[str, Any]:
    """What completions by the teacher are made of, where there are any."""
    if config.complete.how is CompletionMode.none:
        return {}
    complete: dict[str, Any] = {**dataclasses.asdict(config.complete), "how": config.complete.how.name}
    if config.complete.how is CompletionMode.sample:  # earlier versions drew the same completion for equal prompts
        complete["draws_by_record"] = True
    end_ids = end_token_ids(folder, tokenizer)
    if end_ids == (tokenizer.eos_token_id,):  # the one at which earlier versions ended, in any case
        return {"complete": complete}
    return {"complete": complete, "end_token_ids": list(end_ids)}


def _of_text(config: CaptureConfig, text: Text, tokenizer: Any, found: TokenizedCorpus) -> dict[str, Any]:
    """What decides about the tokens of a corpus besides its bytes.

    Options that came later are left out where they change nothing, so that caches of before keep their fingerprint.
    """
    corpus = config.corpus
    columns = dataclasses.asdict(corpus.columns)
    if columns["tools"] == ColumnsConfig().tools:
        del columns["tools"]
    suffixes = [format_suffix(file) for file in text.files]
    later = {
        # the same bytes are other records as lines of JSON, as lines of text and as a table
        "file_suffixes": suffixes if {*suffixes} & {".txt", ".csv", ".tsv"} else None,
        "shape": None if text.shape == "own" else text.shape,
        "chat": None if corpus.chat == ChatConfig() else identity_options(corpus.chat),
        "chat_date": corpus.chat.date if reads_clock(tokenizer) else None,
        "too_long": text.too_long,
        "window_begin_token": text.begins_windows or None,
        "choices": corpus.choices,
        "take": corpus.take,
        # records that an earlier version tokenized otherwise
        "tokenization": 2 if {*found.notes} - {CUT_LEFT} else None,
    }
    return {"columns": columns, **{name: value for name, value in later.items() if value is not None}}
