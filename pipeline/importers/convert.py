"""Instead of stage one: convert the teacher outputs of another project into a cache, row by row."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.cache import manifest as manifests
from pipeline.cache.schema import SCHEMA_VERSION
from pipeline.cache.shards import shard_writer
from pipeline.config.schema import Format, ImportConfig
from pipeline.config.validate import plain_name
from pipeline.core.files import file_hash, one_path
from pipeline.core.progress import Progress, log, start_logging
from pipeline.core.topk import from_log_probabilities
from pipeline.core.types import Captured, InputError, Manifest, TokenSequence
from pipeline.data.packing import sequence_key
from pipeline.importers.decode import ForeignRow, appended_token, decode_row
from pipeline.importers.sources import ForeignSource, Row, open_source, read_rows
from pipeline.models.tokenizer import chat_template_and_end_token, load_tokenizer, tokenizer_hash, vocabulary_size

ALIGNMENT_POSITIONS = 1000  # positions at which the two alignments are compared
ALIGNMENT_NATS = 1.0  # the other alignment may be better by this much by chance
MAX_EXCESS_MASS = 1e-3  # rounding of values that were written as text
RENORMALISED_ERROR = 1e-2
MAX_ENTRIES = 65_535  # kept_counts is a uint16
ABANDONED_SECONDS = 3600.0  # a temporary file of this age belongs to a dead process
ALL_ROWS = range(1 << 62)


def run(config: ImportConfig) -> Path:
    """Import the shards that are missing; returns the cache folder."""
    start_logging()
    check_import(config)
    tokenizer = load_tokenizer(one_path(config.tokenizer, "tokenizer"))
    source = open_source(config, tokenizer)
    made_of = identity(config, source)
    cache = Path(config.caches_dir) / f"{config.name}-{manifests.fingerprint(made_of)[:12]}"
    if not manifests.manifest_path(cache).exists():
        manifests.create_cache(cache, make_manifest(config, source, made_of))
    manifest = manifests.load_manifest(cache)
    manifests.check_same_inputs(manifest, made_of, cache)
    todo = [index for index in range(manifest.num_shards) if manifests.shard_info(cache, index) is None]
    progress = Progress(
        "import",
        total=sum(len(manifests.shard_range(manifest, index)) for index in todo),
        unit=" rows",
        log_every_seconds=config.log_every_seconds,
    )
    # one pass, from the first missing row on: a row group may hold the rows of many shards
    next_row = manifests.shard_range(manifest, todo[0]).start if todo else manifest.num_records
    remaining = read_rows(source, range(next_row, manifest.num_records))
    for index in todo:
        if not manifests.adopt_orphan(cache, index):
            records = manifests.shard_range(manifest, index)
            # at row 10, shard 3 with rows 15 to 19 skips the next 5 and takes 5
            rows = itertools.islice(remaining, records.start - next_row, records.stop - next_row)
            import_shard(source, rows, cache, manifest, index, progress)
            next_row = records.stop
    progress.close()
    finished = manifests.finalize_cache(cache, manifest, stale_seconds=ABANDONED_SECONDS)
    infos = manifests.committed_shards(cache, manifest)
    log.info(
        "%s: %d rows (%d without entries), %d targets, %.1f MB, tail %s",
        cache,
        finished.num_records,
        finished.num_skipped,
        sum(info.targets for info in infos),
        sum(info.bytes for info in infos) / 1e6,
        finished.tail,
    )
    return cache


def check_import(config: ImportConfig) -> None:
    """Raise InputError for contradictory options, before any input is read."""
    plain_name(name=config.name)
    if config.records_per_shard < 1:
        raise InputError(f"records_per_shard: expected at least 1, found {config.records_per_shard}")
    if not config.log_every_seconds > 0:
        raise InputError(f"log_every_seconds: expected more than 0, found {config.log_every_seconds}")
    is_prepared = config.format is Format.axolotl_prepared
    if is_prepared and config.alignment is None:
        raise InputError(
            "alignment: expected current (row j predicts token j + 1) or legacy (row j predicts token j), found null; "
            "set it, because the files do not contain it"
        )
    if not is_prepared and config.alignment is not None:
        raise InputError(
            f"alignment: expected null, because {config.format.name} has only one, found {config.alignment.name}"
        )


def identity(config: ImportConfig, source: ForeignSource) -> dict[str, Any]:
    """Everything that changes the content of the cache: the content of the files and the options to read them."""
    joined = "".join(file_hash(file) for file in source.files)
    token = appended_token(source)
    return {
        "schema_version": SCHEMA_VERSION,
        "source": hashlib.sha256(joined.encode()).hexdigest(),
        "packing": source.compression_file and file_hash(source.compression_file),
        "format": source.format,
        "alignment": source.alignment,
        "columns": dict(source.columns),
        "tokenizer": tokenizer_hash(source.tokenizer),
        **chat_template_and_end_token(source.tokenizer),
        "records_per_shard": config.records_per_shard,
        **({} if token is None else {"appended_token": token}),  # earlier versions took it for a part of the text
    }


# ------------------------------------------------------------------------------------- first reading


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceSizes:
    """Sizes that a first reading of all rows finds."""

    num_rows: int
    max_entries: int
    """The most entries of any position."""
    max_tokens: int
    """The tokens of the longest row."""


def make_manifest(config: ImportConfig, source: ForeignSource, made_of: dict[str, Any]) -> Manifest:
    """The manifest of a cache; every row is decoded and checked for it, before a folder is created."""
    log.info("reading %d files to check every row", len(source.files))
    sizes = check_all_rows(source)
    return Manifest(
        schema_version=SCHEMA_VERSION,
        fingerprint=manifests.fingerprint(made_of),
        made_of=made_of,
        kind="topk",
        k=sizes.max_entries,
        draws=0,
        draw_seed=0,
        temperatures=(1.0,),
        vocabulary_size=vocabulary_size(source.tokenizer),
        window=sizes.max_tokens,
        num_records=sizes.num_rows,
        num_shards=-(-sizes.num_rows // config.records_per_shard),
        records_per_shard=config.records_per_shard,
        tail=source.tail,
    )


def check_all_rows(source: ForeignSource) -> SourceSizes:
    """Decode and check every row; InputError also if no row has entries or if the other alignment is the right one."""
    num_rows = max_entries = max_tokens = 0
    chosen: list[Tensor] = []  # log-probabilities of the true tokens under the alignment that was chosen
    other: list[Tensor] = []
    realigned = dataclasses.replace(source, alignment="legacy" if source.alignment == "current" else "current")
    num_compared = 0
    for where, row in read_rows(source, ALL_ROWS):
        num_rows += 1
        foreign = decode_checked_row(source, where, row)
        max_tokens = max(max_tokens, len(foreign.input_ids_S))
        if len(foreign.target_positions_N) == 0:
            continue
        max_entries = max(max_entries, int((foreign.log_p_NK > -torch.inf).sum(dim=1).max()))
        if source.alignment is not None and num_compared < ALIGNMENT_POSITIONS:
            num_missing = ALIGNMENT_POSITIONS - num_compared
            chosen.append(foreign.target_log_p_N[:num_missing])
            other.append(decode_row(realigned, row).target_log_p_N[:num_missing])
            num_compared += len(chosen[-1])
    if max_entries == 0:
        raise InputError(f"source: expected rows with log-probabilities, found none in {num_rows} rows")
    if max_entries > MAX_ENTRIES:
        raise InputError(f"source: expected at most {MAX_ENTRIES} entries a position, found {max_entries}")
    if source.alignment is not None:
        check_alignment(torch.cat(chosen), torch.cat(other), chosen=source.alignment, other=str(realigned.alignment))
    return SourceSizes(num_rows=num_rows, max_entries=max_entries, max_tokens=max_tokens)


def check_alignment(chosen_N: Tensor, other_N: Tensor, *, chosen: str, other: str) -> None:
    """Raise InputError where the true tokens are more likely under the other alignment.

    Takes their log-probabilities under each of the two: NaN where the true token is not among the entries.
    """
    chosen_mean, num_chosen = _mean_of_known(chosen_N)
    other_mean, num_other = _mean_of_known(other_N)
    if other_mean > chosen_mean + ALIGNMENT_NATS and num_other >= num_chosen:
        raise InputError(
            f"alignment: expected the one under which the text is likely, found {chosen} with a mean log-probability "
            f"of {chosen_mean:.2f} nats ({num_chosen} of {len(chosen_N)} true tokens kept) where {other} has "
            f"{other_mean:.2f} ({num_other} of {len(other_N)}); set alignment={other}"
        )


def _mean_of_known(log_p_N: Tensor) -> tuple[float, int]:
    """Mean and number of the values that are not NaN; the mean of none is -inf."""
    known = log_p_N[~log_p_N.isnan()]
    return (known.mean().item() if len(known) else float("-inf")), len(known)


# ------------------------------------------------------------------------------------------- one row


def decode_checked_row(source: ForeignSource, where: str, row: Row) -> ForeignRow:
    """Decode a row and check that it can be stored; an InputError names its file and row."""
    try:
        foreign = decode_row(source, row)
        _check_ids(foreign, vocabulary_size(source.tokenizer))
        _check_mass(foreign, source.tail)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    return foreign


def _check_ids(foreign: ForeignRow, vocabulary_size: int) -> None:
    """Token ids are in the vocabulary, and no position has one twice."""
    is_kept_NK = ~torch.isneginf(foreign.log_p_NK)
    for name, ids in (("input_ids", foreign.input_ids_S), ("kept ids", foreign.ids_NK[is_kept_NK])):
        is_outside = (ids < 0) | (ids >= vocabulary_size)
        if is_outside.any():
            raise InputError(
                f"{name}: expected 0 to {vocabulary_size - 1} (the tokenizer's vocabulary), found "
                f"{ids[is_outside][0].item()}; give the teacher's own tokenizer"
            )
    filler_K = -1 - torch.arange(foreign.ids_NK.shape[1])  # -1, -2, ...: equal to no id and to no other filler
    sorted_NK = torch.where(is_kept_NK, foreign.ids_NK, filler_K).sort(dim=1).values
    is_twice_NK = sorted_NK[:, 1:] == sorted_NK[:, :-1]  # equal ids are neighbours after the sort
    if is_twice_NK.any():
        n, k = is_twice_NK.nonzero()[0].tolist()
        raise InputError(
            f"position {foreign.target_positions_N[n]}: expected different ids, found {sorted_NK[n, k]} twice"
        )


def _check_mass(foreign: ForeignRow, tail: str) -> None:
    """The values are log-probabilities: none is NaN, and their sum is what the format requires."""
    if foreign.log_p_NK.isnan().any() or torch.isposinf(foreign.log_p_NK).any():
        raise InputError("expected log-probabilities, found a NaN, a null or an infinity")
    sum_N = foreign.log_p_NK.exp().sum(dim=1)
    is_wrong_N = {
        "remainder": sum_N > 1 + MAX_EXCESS_MASS,
        "renormalised": (sum_N - 1).abs() > RENORMALISED_ERROR,
        "approximate": sum_N > 10,  # a fitted curve may exceed 1, but not by that much
    }[tail]
    if is_wrong_N.any():
        n = int(is_wrong_N.nonzero()[0])
        expected = "sum to 1" if tail == "renormalised" else "sum to at most 1"
        raise InputError(
            f"position {foreign.target_positions_N[n]}: expected kept probabilities that {expected}, found "
            f"{sum_N[n]:.4f}; the values are not this format's log-probabilities at temperature 1"
        )


def import_shard(
    source: ForeignSource,
    rows: Iterable[tuple[str, Row]],
    cache: Path,
    manifest: Manifest,
    index: int,
    progress: Progress,
) -> None:
    """Write and commit one shard; rows without entries are skipped and counted."""
    records = manifests.shard_range(manifest, index)
    num_skipped = 0
    with shard_writer(cache, manifest, index) as writer:
        for record_id, (where, row) in zip(records, rows, strict=True):
            foreign = decode_checked_row(source, where, row)
            if len(foreign.target_positions_N):
                sequence = token_sequence(foreign, record_id)
                writer.write(sequence, captured(foreign, has_tail=manifest.tail != "renormalised"))
            else:
                num_skipped += 1
            progress.advance(1)
        writer.commit(num_skipped=num_skipped)


def token_sequence(foreign: ForeignRow, record_id: int) -> TokenSequence:
    """The tokens, segments and targets of a row; all its segments belong to one record."""
    lengths = torch.tensor(foreign.segment_lengths)
    return TokenSequence(
        key=sequence_key(foreign.input_ids_S.numpy(), lengths.numpy(), foreign.target_positions_N.numpy()),
        input_ids_S=foreign.input_ids_S,
        segment_lengths=foreign.segment_lengths,
        record_ids=(record_id,) * len(foreign.segment_lengths),
        target_positions_N=foreign.target_positions_N,
        target_ids_N=foreign.target_ids_N,
    )


def captured(foreign: ForeignRow, *, has_tail: bool) -> Captured:
    """The distributions of a row; the entropy is NaN, because it needs the teacher's full distribution."""
    return Captured(
        top=from_log_probabilities(foreign.ids_NK, foreign.log_p_NK, has_tail=has_tail),
        next_log_prob_N=foreign.target_log_p_N.half(),
        entropy_N=torch.full((len(foreign.target_positions_N),), torch.nan, dtype=torch.float16),
    )
