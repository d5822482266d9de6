"""A held-out text as requests to a model: tokens to read, and what to score or to generate after them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.config.options import identity_options
from pipeline.config.schema import TextConfig
from pipeline.core.files import content_hash, write_atomically
from pipeline.core.types import UNKNOWN_TARGET, InputError, Record
from pipeline.data.choice_tree import check_no_choice_begins_another
from pipeline.data.file_kinds import format_suffix
from pipeline.data.records import MalformedRecords, find_shape, read_records
from pipeline.data.text_files import Text, open_text
from pipeline.data.tokenize import (
    EncodedRecord,
    Targets,
    encode_records,
    record_segments,
    shifted_targets,
    text_hash,
)
from pipeline.evaluation.few_shot import Examples, with_examples
from pipeline.models.compatibility import max_positions
from pipeline.models.tokenizer import end_token_ids

UNREAD_BY_SCORING = ("too_long", "window_begin_token")  # options of a text: a held-out text is not packed


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LikelihoodRequest:
    """One continuation of one record, whose log-likelihood is asked for."""

    record_id: int
    choice: int | None
    """Index of the choice; None: the record's own targets, for the negative log-likelihood."""
    ids: tuple[int, ...]
    """The tokens to read."""
    targets: Targets
    """The (position, token) pairs to score."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """A record without choices whose completion the model generates."""

    record_id: int
    ids: tuple[int, ...]
    """The prompt's tokens."""
    end_ids: frozenset[int]
    """The tokens at which generation ends."""
    expected: str
    """The completion as the tokenizer decodes it, without spaces around it."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSet:
    """A held-out text, read and tokenized: everything that can be wrong with it is found before a model loads."""

    records: tuple[Record, ...]
    likelihoods: tuple[LikelihoodRequest, ...]
    generations: tuple[GenerationRequest, ...]
    """Empty where `max_new_tokens` is 0."""
    max_new_tokens: int
    tokenizer: Any


def read_evaluation_set(
    config: TextConfig,
    name: str,
    tokenizer: Any,
    *,
    folder: Path,
    max_new_tokens: int,
    examples: Examples | None = None,
) -> EvaluationSet:
    """From options to a value: the requests of a text to the model that lies in a folder."""
    return open_evaluation_set(
        open_text(config, name),
        tokenizer,
        longest=max_positions(folder),
        max_new_tokens=max_new_tokens,
        end_ids=end_token_ids(folder, tokenizer),
        examples=examples,
    )


def held_out_hash(config: TextConfig, name: str) -> str:
    """sha256 of a held-out text as it is read: the content of its files, and the options that are not as by default.

    Scores on texts with the same hash can be compared. Options that only training reads are no part of it.
    """
    text, defaults = open_text(config, name), identity_options(TextConfig())
    options = {
        option: value
        for option, value in identity_options(config).items()
        if value != defaults[option] and option not in UNREAD_BY_SCORING
    }
    # the same bytes are other records as lines of JSON, as lines of text and as a table
    suffixes = [suffix for suffix in map(format_suffix, text.files) if suffix in (".txt", ".csv", ".tsv")]
    return content_hash([text_hash(text), options, suffixes])


def open_evaluation_set(
    text: Text,
    tokenizer: Any,
    *,
    longest: int | None,
    max_new_tokens: int,
    end_ids: Sequence[int],
    examples: Examples | None = None,
) -> EvaluationSet:
    """Read a held-out text; refuses one without requests, and records longer than the model's positions.

    With `max_new_tokens` above 0 the model completes the records without choices, by at most that many tokens, and ends
    with one of `end_ids`. With `examples` these precede each prompt with choices; the records stay as they are, so that
    predictions with and without examples are joined by the same keys.
    """
    malformed, text = MalformedRecords(skip=text.skip_malformed), find_shape(text)
    plain = {record.record_id: record for record in read_records(text, tokenizer)}
    asked = list(plain.values()) if examples is None else _with_examples(text, plain.values(), examples)
    records: list[Record] = []
    likelihoods: list[LikelihoodRequest] = []
    generations: list[GenerationRequest] = []
    for encoded in encode_records(asked, tokenizer, malformed, end_token=text.end_token, with_choices=True):
        record = plain[encoded.record.record_id]
        try:
            to_score = [*_own_targets(encoded, text.targets), *_choices(encoded)]
            to_generate = _generations(encoded, tokenizer, frozenset(end_ids)) if max_new_tokens > 0 else []
            _check_length(to_score, to_generate, longest, max_new_tokens)
        except InputError as error:
            if examples is not None and record.choices:  # skipped, it would be missing beside the scores without
                raise InputError(f"{record.where}, after {len(examples.records)} examples: {error}") from error
            malformed.reject(record.where, str(error))
            continue
        records.append(record)
        likelihoods += to_score
        generations += to_generate
    malformed.log_count(text.what)
    if not likelihoods:
        raise InputError(f"{text.what}: expected records with targets or choices, found none; give some to score")
    return EvaluationSet(
        records=tuple(records),
        likelihoods=tuple(likelihoods),
        generations=tuple(generations),
        max_new_tokens=max_new_tokens,
        tokenizer=tokenizer,
    )


def _with_examples(text: Text, records: Iterable[Record], examples: Examples) -> list[Record]:
    found = list(records)
    if not any(record.choices for record in found):
        raise InputError(
            f"scoring.few_shot={len(examples.records)}: expected records with choices in {text.what}, found none; use "
            "scoring.few_shot=0"
        )
    if text.targets == "all":  # the examples' own tokens would count as targets of each record
        raise InputError(
            f"{text.what}.targets: expected completion, next or choices with scoring.few_shot, found all; name one"
        )
    return list(with_examples(found, examples))


def _check_length(
    to_score: Sequence[LikelihoodRequest],
    to_generate: Sequence[GenerationRequest],
    longest: int | None,
    max_new_tokens: int,
) -> None:
    lengths = [len(request.ids) for request in to_score]
    lengths += [len(request.ids) + max_new_tokens for request in to_generate]
    if longest is not None and max(lengths, default=0) > longest:
        raise InputError(f"expected at most {longest} tokens, the model's positions, found {max(lengths)}")


def check_generation_requests(sets: Sequence[EvaluationSet]) -> None:
    """Refuse to measure exact match where no record can be completed."""
    if any(held_out.max_new_tokens > 0 for held_out in sets) and not any(held_out.generations for held_out in sets):
        raise InputError(
            "scoring.max_new_tokens: expected records with a prompt and a completion and without choices, found none; "
            "use scoring.max_new_tokens=0"
        )


def _own_targets(encoded: EncodedRecord, targets: str) -> Iterator[LikelihoodRequest]:
    if encoded.record.completion is None:
        return
    for segment in record_segments(encoded, targets, window=None):
        known = tuple((s, token) for s, token in segment.targets if token != UNKNOWN_TARGET)
        if known:  # with targets=choices, only the answer's tokens are
            ids = segment.ids[: known[-1][0] + 1]
            yield LikelihoodRequest(record_id=segment.record_id, choice=None, ids=ids, targets=known)


def _choices(encoded: EncodedRecord) -> Iterator[LikelihoodRequest]:
    record, prompt_ids = encoded.record, encoded.prompt_ids
    if not record.choices:
        return
    if record.prompt is None:
        raise InputError("expected a prompt beside the choices, found plain text")
    check_no_choice_begins_another(encoded.choice_ids)
    for index, choice_ids in enumerate(encoded.choice_ids):
        ids = prompt_ids + choice_ids
        targets = shifted_targets(ids, first=len(prompt_ids) - 1)
        yield LikelihoodRequest(record_id=record.record_id, choice=index, ids=tuple(ids[:-1]), targets=targets)


def _generations(encoded: EncodedRecord, tokenizer: Any, end_ids: frozenset[int]) -> list[GenerationRequest]:
    record, expected_ids = encoded.record, encoded.completion_ids
    if record.choices or record.prompt is None or expected_ids is None:
        return []
    if expected_ids[-1] not in end_ids:
        raise InputError(
            "expected a completion that ends with an end token, because generation stops there, found none; "
            "set end_token=true (a chat template has to end a turn with one), or use scoring.max_new_tokens=0"
        )
    return [
        GenerationRequest(
            record_id=record.record_id,
            ids=tuple(encoded.prompt_ids),
            end_ids=end_ids,
            expected=decode_answer(tokenizer, expected_ids),
        )
    ]


def decode_answer(tokenizer: Any, ids: Sequence[int]) -> str:
    """Token ids as text, without special tokens and without spaces around it."""
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)).strip()


def record_key(record: Record) -> bytes:
    """16 bytes over all that a prediction answers to: predictions of two models are joined by it."""
    parts = [record.prompt or "", record.completion or "", *record.choices, str(record.answer)]
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part.encode()).to_bytes(8, "little") + part.encode())
    return digest.digest()


# ------------------------------------------------------------------------------------------- on disk


def save_evaluation_set(held_out: EvaluationSet, path: Path) -> None:
    """Write the requests as JSON, for processes that should not tokenize the text again."""
    saved = {
        "max_new_tokens": held_out.max_new_tokens,
        "records": [dataclasses.asdict(record) for record in held_out.records],
        "likelihoods": [dataclasses.asdict(request) for request in held_out.likelihoods],
        "generations": [
            dataclasses.asdict(request) | {"end_ids": sorted(request.end_ids)} for request in held_out.generations
        ],
    }
    write_atomically(path, json.dumps(saved))


def load_evaluation_set(path: Path, tokenizer: Any) -> EvaluationSet:
    """Read what `save_evaluation_set` wrote."""
    saved = json.loads(path.read_text())
    return EvaluationSet(
        records=tuple(_record(row) for row in saved["records"]),
        likelihoods=tuple(
            LikelihoodRequest(**row | {"ids": tuple(row["ids"]), "targets": tuple(map(tuple, row["targets"]))})
            for row in saved["likelihoods"]
        ),
        generations=tuple(
            GenerationRequest(**row | {"ids": tuple(row["ids"]), "end_ids": frozenset(row["end_ids"])})
            for row in saved["generations"]
        ),
        max_new_tokens=saved["max_new_tokens"],
        tokenizer=tokenizer,
    )


def _record(row: dict[str, Any]) -> Record:
    spans = tuple(map(tuple, row["prompt_spans"]))
    return Record(
        **row | {"choices": tuple(row["choices"]), "choice_turns": tuple(row["choice_turns"]), "prompt_spans": spans}
    )
