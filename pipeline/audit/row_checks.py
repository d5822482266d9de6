"""What has to hold inside a row group: every check over all its rows at once.

A check yields what is wrong, in words, and the rows where it is; nothing where all is well. The lists have to fit
together before their values can be looked at.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch

from pipeline.audit.row_groups import Columns, distributions, sequence_keys
from pipeline.core.topk import log_probabilities
from pipeline.core.types import UNKNOWN_TARGET, Manifest, TopK

Wrong = tuple[str, np.ndarray]  # what is wrong, indices of the rows

MASS_SLACK = 1e-3  # fp32 sums of up to K rounded exponentials
HALF_STEP = 2.0**-9  # twice the relative rounding of float16, for a value that was rounded on two ways


def wrong_lists(columns: Columns, manifest: Manifest) -> Iterator[Wrong]:
    """Lists of a row that do not fit together."""
    lengths = columns.lengths
    num_R = lengths["target_positions"]
    yield "expected at least one target", np.flatnonzero(num_R < 1)
    one_each = ("target_ids", "next_log_prob", "entropy", "weak_ids")
    for name in (name for name in one_each if name in lengths):
        yield f"{name}: expected one value a target position", np.flatnonzero(lengths[name] != num_R)
    tails_R = num_R * len(manifest.temperatures)
    yield (
        "log_tail: expected one value a target position and temperature",
        np.flatnonzero(lengths["log_tail"] != tails_R),
    )
    kept_R = num_R * manifest.k
    if manifest.has_kept_counts:
        yield "kept_counts: expected one value a target position", np.flatnonzero(lengths["kept_counts"] != num_R)
        kept_R = row_sums(columns, "kept_counts")
        counts_N, rows_N = columns.values["kept_counts"], columns.rows("kept_counts")
        wrong_N = (counts_N < 1) | (counts_N > manifest.k + manifest.draws)
        yield f"kept_counts: expected 1 to {manifest.k + manifest.draws}", np.unique(rows_N[wrong_N])
    for name in ("topk_ids", "relative_logits"):
        yield f"{name}: expected as many values as entries are kept", np.flatnonzero(lengths[name] != kept_R)
    size_R = lengths["input_ids"]
    yield (
        f"input_ids: expected 1 to {manifest.window} tokens",
        np.flatnonzero((size_R < 1) | (size_R > manifest.window)),
    )
    sums_R = row_sums(columns, "segment_lengths")
    yield "segment_lengths: expected them to add up to the tokens", np.flatnonzero(sums_R != size_R)
    empty = columns.values["segment_lengths"] < 1
    yield "segment_lengths: expected 1 or more", np.unique(columns.rows("segment_lengths")[empty])
    unequal = np.flatnonzero(lengths["record_ids"] != lengths["segment_lengths"])
    yield "record_ids: expected one a segment", unequal


def row_sums(columns: Columns, name: str) -> np.ndarray:
    """The sum of a column's values over each row: [R] int64."""
    ends = np.concatenate([[0], np.cumsum(columns.values[name], dtype=np.int64)])
    starts_R = columns.starts(name)
    return ends[starts_R + columns.lengths[name]] - ends[starts_R]


def wrong_sequences(columns: Columns, manifest: Manifest, records: range) -> Iterator[Wrong]:
    """Tokens, records, positions and targets that cannot be; keys that are not of what they stand beside."""
    values, size = columns.values, manifest.vocabulary_size

    def rows(name: str, is_wrong: np.ndarray) -> np.ndarray:
        return np.unique(columns.rows(name)[is_wrong])

    ids, positions_N, targets_N = values["input_ids"], values["target_positions"], values["target_ids"]
    yield f"input_ids: expected ids from 0 to {size - 1}", rows("input_ids", (ids < 0) | (ids >= size))
    outside = (values["record_ids"] < records.start) | (values["record_ids"] >= records.stop)
    yield f"record_ids: expected {records.start} to {records.stop - 1}, as planned", rows("record_ids", outside)
    known_N = targets_N != UNKNOWN_TARGET
    is_wrong_N = known_N & ((targets_N < 0) | (targets_N >= size))
    yield f"target_ids: expected {UNKNOWN_TARGET} or ids from 0 to {size - 1}", rows("target_ids", is_wrong_N)
    rows_N = columns.rows("target_positions")
    is_wrong_N = (positions_N < 0) | (positions_N >= columns.lengths["input_ids"][rows_N])
    yield "target_positions: expected positions inside the sequence", rows("target_positions", is_wrong_N)
    descends = (np.diff(positions_N) <= 0) & (np.diff(rows_N) == 0)
    yield "target_positions: expected ascending positions", np.unique(rows_N[1:][descends])
    # position s speaks about token s+1: whatever follows it in its own segment has to be its target
    ends = np.zeros(len(ids) + 1, dtype=bool)
    ends[np.cumsum(values["segment_lengths"])] = True
    next_N = np.clip(columns.starts("input_ids")[rows_N] + positions_N + 1, 0, len(ids))
    follows_N = np.append(ids, 0)[next_N]
    said_N = values.get("weak_ids", targets_N)  # what the teacher completed has no known target, but follows too
    said_N = np.where(said_N == UNKNOWN_TARGET, targets_N, said_N)
    yield (
        f"{'weak_ids or ' * ('weak_ids' in values)}target_ids: expected the token that follows in the segment",
        np.unique(rows_N[~ends[next_N] & (follows_N != said_N)]),
    )
    names = ("input_ids", "segment_lengths", "target_positions")
    right = sequence_keys([(values[name], columns.lengths[name]) for name in names])
    differs_R = [key != other for key, other in zip(columns.keys, right, strict=True)]
    yield "key: expected the hash of tokens, segments and positions", np.flatnonzero(differs_R)


def wrong_distributions(columns: Columns, manifest: Manifest) -> Iterator[Wrong]:
    """Distributions that are none, or that no capture of this kind could have left."""
    rows_N = columns.rows("target_positions")
    top = distributions(columns, manifest)

    def rows(is_wrong_N: torch.Tensor) -> np.ndarray:
        return np.unique(rows_N[is_wrong_N.numpy()])

    ids_NK, relative_NK, tail_NC = top.ids_NK, top.relative_logits_NK.float(), top.log_tail_NC
    size = manifest.vocabulary_size
    yield f"topk_ids: expected ids from 0 to {size - 1}", rows((ids_NK >= size).any(1))
    yield "topk_ids: expected different ids at a position", rows(_repeats(top, manifest))
    # `not right` and not `wrong`, so that NaN fails too
    yield "relative_logits: expected 0 first", rows(~(relative_NK[:, 0] == 0))
    falls_N = (relative_NK[:, 1:] <= relative_NK[:, :-1]).all(1)
    yield "relative_logits: expected numbers that do not increase", rows(~falls_N)
    if manifest.tail != "exact":
        is_right_NC = (tail_NC < torch.inf) & ((tail_NC == -torch.inf) | (manifest.tail != "renormalised"))
        yield f"log_tail: expected what a tail that is {manifest.tail} can be", rows(~is_right_NC.all(1))
    elif manifest.kind == "topk":
        is_right_NC = tail_NC.isfinite() | ((tail_NC == -torch.inf) & (manifest.k == size))
        yield "log_tail: expected finite numbers", rows(~is_right_NC.all(1))
    else:
        yield "log_tail: expected -inf, because what was not drawn counts as 0", rows(~(tail_NC == -torch.inf).all(1))
    for T in manifest.temperatures:
        log_p_NK, log_tail_N = log_probabilities(top, temperature=T)
        mass_N = log_p_NK.exp().sum(1)
        is_right_N = (mass_N >= 0) & (mass_N <= 1 + MASS_SLACK) & ((mass_N + log_tail_N.exp() - 1).abs() <= MASS_SLACK)
        yield f"distribution: expected a finite sum and a mass of 1 at temperature {T:g}", rows(~is_right_N)
    yield from _wrong_scalars(columns, manifest, top, rows_N)


def _repeats(top: TopK, manifest: Manifest) -> torch.Tensor:
    """Whether a position lists an id twice; padding repeats its first id on purpose: [N] bool."""
    kept_NK = top.relative_logits_NK > -torch.inf
    if not manifest.has_kept_counts:
        kept_NK = torch.ones_like(kept_NK)
    filler_K = -1 - torch.arange(kept_NK.shape[1])
    sorted_NK = torch.where(kept_NK, top.ids_NK, filler_K).int().sort(1).values
    return (sorted_NK[:, 1:] == sorted_NK[:, :-1]).any(1)


def _wrong_scalars(columns: Columns, manifest: Manifest, top: TopK, rows_N: np.ndarray) -> Iterator[Wrong]:
    """Entropies and log-probabilities of the target that cannot be, or that contradict the distribution."""
    if manifest.tail != "exact":  # imported: nobody knows the entropy, nor what is said of a target that was not kept
        return
    entropy_N = columns.values["entropy"].astype(np.float32)
    most = math.log(manifest.vocabulary_size)
    is_right_N = (entropy_N >= -MASS_SLACK) & (entropy_N <= most * (1 + HALF_STEP) + MASS_SLACK)
    yield f"entropy: expected 0 to {most:.2f} nats (the log of the vocabulary)", np.unique(rows_N[~is_right_N])
    targets_N = columns.values["target_ids"]
    known_N = targets_N != UNKNOWN_TARGET
    said_N = columns.values["next_log_prob"].astype(np.float32)
    is_right_N = np.where(known_N, said_N <= MASS_SLACK, np.isnan(said_N))
    yield "next_log_prob: expected 0 or less where the target is known, NaN elsewhere", np.unique(rows_N[~is_right_N])
    if manifest.kind != "topk":  # there the entries are estimates of what the teacher said
        return
    log_p_NK, _ = log_probabilities(top, temperature=1.0)
    is_target_NK = top.ids_NK == torch.from_numpy(targets_N.astype(np.int64))[:, None]
    log_p_N = torch.where(is_target_NK, log_p_NK, -torch.inf).max(1).values.numpy()
    kept_N = is_target_NK.any(1).numpy()
    lowest_N = log_p_NK[:, -1].numpy()
    with np.errstate(invalid="ignore"):
        slack_N = 0.02 + HALF_STEP * (np.abs(said_N) + np.abs(lowest_N))
        differs_N = np.where(kept_N, ~(np.abs(said_N - log_p_N) <= slack_N), said_N > lowest_N + slack_N)
    yield "next_log_prob: expected what the kept entries say of the target", np.unique(rows_N[known_N & differs_N])
