"""Instead of stage one: what another project kept of its teacher becomes a cache of ours, row by row."""

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
from pipeline.core.files import file_hash, one_path
from pipeline.core.progress import Progress, log, start_logging
from pipeline.core.topk import from_log_probabilities
from pipeline.core.types import Captured, InputError, Manifest, TokenSequence
from pipeline.data.packing import sequence_key
from pipeline.importers.decode import ForeignRow, foreign_row
from pipeline.importers.sources import Row, Source, open_source, rows
from pipeline.models.tokenizer import chat_template_and_end_token, load_tokenizer, tokenizer_hash, vocabulary_size

ALIGNMENT_POSITIONS = 1000  # positions whose true token tells which way a data set is aligned
ALIGNMENT_NATS = 1.0  # by how much the other alignment may be better and still be chance
EXACT_EXCESS = 1e-3  # rounding of values that were written as text
RENORMALISED_ERROR = 1e-2
WIDEST = 65_535  # kept_counts is a uint16
ABANDONED_SECONDS = 3600.0  # a temporary file that old is a dead process's
EVERYTHING = range(1 << 62)


def run(config: ImportConfig) -> Path:
    """Import what is not imported yet; returns the cache folder."""
    start_logging()
    check_import(config)
    tokenizer = load_tokenizer(one_path(config.tokenizer, "tokenizer"))
    source = open_source(config, tokenizer)
    made_of = identity(config, source)
    cache = Path(config.caches_dir) / f"{config.name}-{manifests.fingerprint(made_of)[:12]}"
    if manifests.manifest_path(cache).exists():
        manifests.check_same_inputs(manifests.load_manifest(cache), made_of, cache)
    else:
        manifests.create_cache(cache, plan(config, source, made_of))
    manifest = manifests.load_manifest(cache)
    todo = [index for index in range(manifest.num_shards) if manifests.shard_info(cache, index) is None]
    progress = Progress(
        "import",
        total=sum(len(manifests.shard_range(manifest, index)) for index in todo),
        unit=" rows",
        log_every_seconds=config.log_every_seconds,
    )
    # one pass, from the first missing row on: a row group may hold the rows of many shards
    at = manifests.shard_range(manifest, todo[0]).start if todo else manifest.num_records
    stream = rows(source, range(at, manifest.num_records))
    for index in todo:
        if not manifests.adopt_orphan(cache, index):
            records = manifests.shard_range(manifest, index)
            taken = itertools.islice(stream, records.start - at, records.stop - at)
            import_shard(source, taken, cache, manifest, index, progress)
            at = records.stop
    progress.close()
    finished = manifests.finalize_cache(cache, manifest, stale_seconds=ABANDONED_SECONDS)
    infos = manifests.committed_shards(cache, manifest)
    log.info(
        "%s: %d rows (%d with nothing kept), %d targets, %.1f MB, tail %s",
        *(cache, finished.num_records, finished.num_skipped, sum(i.targets for i in infos)),
        *(sum(i.bytes for i in infos) / 1e6, finished.tail),
    )
    return cache


def check_import(config: ImportConfig) -> None:
    """Refuse what cannot be meant, before anything is read."""
    if config.records_per_shard < 1:
        raise InputError(f"records_per_shard: expected at least 1, found {config.records_per_shard}")
    if not config.log_every_seconds > 0:
        raise InputError(f"log_every_seconds: expected more than 0, found {config.log_every_seconds}")
    is_prepared = config.format is Format.axolotl_prepared
    if is_prepared and config.alignment is None:
        raise InputError(
            "alignment: expected current (row j is about token j + 1) or legacy (row j is about token j), found null; "
            "say it, because the data do not"
        )
    if not is_prepared and config.alignment is not None:
        raise InputError(
            f"alignment: expected null, because {config.format.name} has but one, found {config.alignment.name}"
        )


def identity(config: ImportConfig, source: Source) -> dict[str, Any]:
    """All that changes the content of the cache: the files by content, and how they are read."""
    joined = "".join(file_hash(file) for file in source.files)
    return {
        "schema_version": SCHEMA_VERSION,
        "source": hashlib.sha256(joined.encode()).hexdigest(),
        "packing": source.packing_file and file_hash(source.packing_file),
        "format": source.format,
        "alignment": source.alignment,
        "columns": dict(source.columns),
        "tokenizer": tokenizer_hash(source.tokenizer),
        **chat_template_and_end_token(source.tokenizer),
        "records_per_shard": config.records_per_shard,
    }


# ---------------------------------------------------------------------------------------- first look


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a first reading of the whole source found."""

    num_rows: int
    widest: int
    """Entries of the position that has most."""
    longest: int
    """Tokens of the longest row."""


def plan(config: ImportConfig, source: Source, made_of: dict[str, Any]) -> Manifest:
    """The promise of a cache; every row is decoded and checked for it, before a folder is made."""
    log.info("reading %d files to check every row", len(source.files))
    found = look(source)
    return Manifest(
        schema_version=SCHEMA_VERSION,
        fingerprint=manifests.fingerprint(made_of),
        made_of=made_of,
        kind="topk",
        k=found.widest,
        draws=0,
        draw_seed=0,
        temperatures=(1.0,),
        vocabulary_size=vocabulary_size(source.tokenizer),
        window=found.longest,
        num_records=found.num_rows,
        num_shards=-(-found.num_rows // config.records_per_shard),
        records_per_shard=config.records_per_shard,
        tail=source.tail,
    )


def look(source: Source) -> Found:
    """Decode and check every row; refuses a source without one that can be used, or aligned otherwise."""
    num_rows = widest = longest = 0
    given: list[Tensor] = []
    other: list[Tensor] = []
    flipped = dataclasses.replace(source, alignment="legacy" if source.alignment == "current" else "current")
    num_compared = 0
    for where, row in rows(source, EVERYTHING):
        num_rows += 1
        foreign = checked_row(source, where, row)
        longest = max(longest, len(foreign.input_ids_S))
        if len(foreign.target_positions_N) == 0:
            continue
        widest = max(widest, int((foreign.log_p_NK > -torch.inf).sum(dim=1).max()))
        if source.alignment is not None and num_compared < ALIGNMENT_POSITIONS:
            given.append(foreign.target_log_p_N[: ALIGNMENT_POSITIONS - num_compared])
            other.append(foreign_row(flipped, row).target_log_p_N[: ALIGNMENT_POSITIONS - num_compared])
            num_compared += len(given[-1])
    if widest == 0:
        raise InputError(f"source: expected rows with kept log-probabilities, found none in {num_rows} rows")
    if widest > WIDEST:
        raise InputError(f"source: expected at most {WIDEST} entries a position, found {widest}")
    if source.alignment is not None:
        check_alignment(torch.cat(given), torch.cat(other), given=source.alignment, other=str(flipped.alignment))
    return Found(num_rows=num_rows, widest=widest, longest=longest)


def check_alignment(given_N: Tensor, other_N: Tensor, *, given: str, other: str) -> None:
    """Refuse the alignment under which the text is less likely; NaN where the true token was not kept."""
    means = [part[~part.isnan()].mean().item() if (~part.isnan()).any() else -torch.inf for part in (given_N, other_N)]
    counts = [int((~part.isnan()).sum()) for part in (given_N, other_N)]
    if means[1] > means[0] + ALIGNMENT_NATS and counts[1] >= counts[0]:
        raise InputError(
            f"alignment: expected the one under which the text is likely, found {given} with a mean log-probability of "
            f"{means[0]:.2f} nats ({counts[0]} of {len(given_N)} true tokens kept) where {other} has {means[1]:.2f} "
            f"({counts[1]} of {len(other_N)}); set alignment={other}"
        )


# ------------------------------------------------------------------------------------------- one row


def checked_row(source: Source, where: str, row: Row) -> ForeignRow:
    """A decoded row that can be stored; an InputError names it."""
    try:
        foreign = foreign_row(source, row)
        _check_ids(foreign, vocabulary_size(source.tokenizer))
        _check_mass(foreign, source.tail)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    return foreign


def _check_ids(foreign: ForeignRow, vocabulary_size: int) -> None:
    """Token ids exist, and no position keeps one twice."""
    is_kept_NK = ~torch.isneginf(foreign.log_p_NK)
    for what, ids in (("input_ids", foreign.input_ids_S), ("kept ids", foreign.ids_NK[is_kept_NK])):
        is_outside = (ids < 0) | (ids >= vocabulary_size)
        if is_outside.any():
            raise InputError(
                f"{what}: expected 0 to {vocabulary_size - 1} (the tokenizer's vocabulary), found "
                f"{ids[is_outside][0].item()}; give the teacher's own tokenizer"
            )
    unlike_K = -1 - torch.arange(foreign.ids_NK.shape[1])  # what is not kept equals nothing
    sorted_NK = torch.where(is_kept_NK, foreign.ids_NK, unlike_K).sort(dim=1).values
    is_twice_NK = sorted_NK[:, 1:] == sorted_NK[:, :-1]
    if is_twice_NK.any():
        n, k = is_twice_NK.nonzero()[0].tolist()
        raise InputError(
            f"position {foreign.target_positions_N[n]}: expected different ids, found {sorted_NK[n, k]} twice"
        )


def _check_mass(foreign: ForeignRow, tail: str) -> None:
    """The values are log-probabilities: no NaN, and they sum to what the format says."""
    if foreign.log_p_NK.isnan().any() or torch.isposinf(foreign.log_p_NK).any():
        raise InputError("expected log-probabilities, found a NaN, a null or an infinity")
    sum_N = foreign.log_p_NK.exp().sum(dim=1)
    is_wrong_N = {
        "remainder": sum_N > 1 + EXACT_EXCESS,
        "renormalised": (sum_N - 1).abs() > RENORMALISED_ERROR,
        "approximate": sum_N > 10,  # a fit may overshoot, but not that far: those were no log-probabilities
    }[tail]
    if is_wrong_N.any():
        n = int(is_wrong_N.nonzero()[0])
        wanted = "probabilities that sum to 1" if tail == "renormalised" else "probabilities that sum to at most 1"
        raise InputError(
            f"position {foreign.target_positions_N[n]}: expected kept {wanted}, found {sum_N[n]:.4f}; "
            "the values are not this format's log-probabilities at temperature 1"
        )


def import_shard(
    source: Source, taken: Iterable[tuple[str, Row]], cache: Path, manifest: Manifest, index: int, progress: Progress
) -> None:
    """One shard, from its source rows to its commit."""
    records, num_skipped = manifests.shard_range(manifest, index), 0
    with shard_writer(cache, manifest, index) as writer:
        for record_id, (where, row) in zip(records, taken, strict=True):
            foreign = checked_row(source, where, row)
            if len(foreign.target_positions_N):
                writer.write(*stored(foreign, record_id, tail=manifest.tail))
            else:
                num_skipped += 1
            progress.advance(1)
        writer.commit(num_skipped=num_skipped)


def stored(foreign: ForeignRow, record_id: int, *, tail: str) -> tuple[TokenSequence, Captured]:
    """A row as a shard holds it; the entropy of the whole distribution is not known."""
    lengths = torch.tensor(foreign.segment_lengths)
    arrays = (foreign.input_ids_S.numpy(), lengths.numpy(), foreign.target_positions_N.numpy())
    sequence = TokenSequence(
        key=sequence_key(*arrays),
        input_ids_S=foreign.input_ids_S,
        segment_lengths=foreign.segment_lengths,
        record_ids=(record_id,) * len(foreign.segment_lengths),
        target_positions_N=foreign.target_positions_N,
        target_ids_N=foreign.target_ids_N,
    )
    captured = Captured(
        top=from_log_probabilities(foreign.ids_NK, foreign.log_p_NK, has_tail=tail != "renormalised"),
        next_log_prob_N=foreign.target_log_p_N.half(),
        entropy_N=torch.full((len(foreign.target_positions_N),), torch.nan, dtype=torch.float16),
    )
    return sequence, captured
