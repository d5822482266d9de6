"""The checks on the values of a row group; each check is computed for all rows at once.

A check yields what is expected and the rows that break it, an empty array if none does. The values can only be checked
once `check_lists` has passed: before that a value cannot be assigned to a position.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch

from pipeline.audit.row_groups import RowGroup, distributions, sequence_keys
from pipeline.core.folds import parse_fold
from pipeline.core.topk import log_probabilities
from pipeline.core.types import UNKNOWN_TARGET, Manifest, TopK

CheckResult = tuple[str, np.ndarray]  # what is expected; the rows of the row group where it does not hold

MASS_SLACK = 1e-3  # error of a float32 sum of up to K rounded exponentials
FLOAT16_SLACK = 2.0**-9  # twice the relative rounding of float16: a value was rounded twice, in different ways


def check_lists(group: RowGroup, manifest: Manifest) -> Iterator[CheckResult]:
    """Whether the lists of each row have lengths that fit together."""
    lengths = group.lengths
    num_targets_R = lengths["target_positions"]
    yield "expected at least one target", np.flatnonzero(num_targets_R < 1)
    for name in ("target_ids", "depths", "next_log_prob", "entropy", "weak_ids", "weights"):
        if name in lengths:
            yield f"{name}: expected one value per target position", np.flatnonzero(lengths[name] != num_targets_R)
    num_tails_R = num_targets_R * len(manifest.temperatures)
    yield (
        "log_tail: expected one value per target position and temperature",
        np.flatnonzero(lengths["log_tail"] != num_tails_R),
    )
    num_kept_R = num_targets_R * manifest.k
    if manifest.has_kept_counts:
        yield (
            "kept_counts: expected one value per target position",
            np.flatnonzero(lengths["kept_counts"] != num_targets_R),
        )
        num_kept_R = group.row_sums("kept_counts")
        counts_N, most = group.values["kept_counts"], manifest.most_kept
        is_wrong_N = (counts_N < 1) | (counts_N > most)
        yield f"kept_counts: expected 1 to {most}", np.unique(group.row_indices("kept_counts")[is_wrong_N])
    for name in ("topk_ids", "relative_logits"):
        yield f"{name}: expected one value per kept entry", np.flatnonzero(lengths[name] != num_kept_R)
    yield from _check_segments(group, manifest)


def _check_segments(group: RowGroup, manifest: Manifest) -> Iterator[CheckResult]:
    num_tokens_R = group.lengths["input_ids"]
    yield (
        f"input_ids: expected 1 to {manifest.window} tokens",
        np.flatnonzero((num_tokens_R < 1) | (num_tokens_R > manifest.window)),
    )
    sums_R = group.row_sums("segment_lengths")
    yield "segment_lengths: expected their sum to be the number of tokens", np.flatnonzero(sums_R != num_tokens_R)
    is_empty = group.values["segment_lengths"] < 1
    yield "segment_lengths: expected 1 or more", np.unique(group.row_indices("segment_lengths")[is_empty])
    differs_R = group.lengths["record_ids"] != group.lengths["segment_lengths"]
    yield "record_ids: expected one per segment", np.flatnonzero(differs_R)


def check_sequences(group: RowGroup, manifest: Manifest, records: range) -> Iterator[CheckResult]:
    """Whether token ids, record ids, positions and targets are valid, and each key is the hash of its row."""
    values, vocabulary_size = group.values, manifest.vocabulary_size

    def rows_of(name: str, is_wrong: np.ndarray) -> np.ndarray:
        return np.unique(group.row_indices(name)[is_wrong])

    ids, positions_N, targets_N = values["input_ids"], values["target_positions"], values["target_ids"]
    is_wrong = (ids < 0) | (ids >= vocabulary_size)
    yield f"input_ids: expected ids from 0 to {vocabulary_size - 1}", rows_of("input_ids", is_wrong)
    is_wrong = (values["record_ids"] < records.start) | (values["record_ids"] >= records.stop)
    yield (
        f"record_ids: expected {records.start} to {records.stop - 1}, the records of this shard",
        rows_of("record_ids", is_wrong),
    )
    is_wrong_N = (targets_N != UNKNOWN_TARGET) & ((targets_N < 0) | (targets_N >= vocabulary_size))
    yield (
        f"target_ids: expected {UNKNOWN_TARGET} or ids from 0 to {vocabulary_size - 1}",
        rows_of("target_ids", is_wrong_N),
    )
    rows_N = group.row_indices("target_positions")
    is_wrong_N = (positions_N < 0) | (positions_N >= group.lengths["input_ids"][rows_N])
    yield "target_positions: expected positions inside the sequence", rows_of("target_positions", is_wrong_N)
    descends = (np.diff(positions_N) <= 0) & (np.diff(rows_N) == 0)
    yield "target_positions: expected ascending positions", np.unique(rows_N[1:][descends])
    yield from _check_depths(group) if "depths" in values else [_check_targets(group)]
    key_columns = ("input_ids", "segment_lengths", "target_positions")
    expected_keys = sequence_keys([(values[name], group.lengths[name]) for name in key_columns])
    differs_R = [found != expected for found, expected in zip(group.keys, expected_keys, strict=True)]
    yield "key: expected the hash of tokens, segment lengths and target positions", np.flatnonzero(differs_R)
    if (only_fold := manifest.made_of.get("only_fold")) is not None:
        fold = parse_fold(only_fold, "only_fold")
        yield f"key: expected sequences of fold {fold}", np.flatnonzero([not fold.holds(key) for key in group.keys])


def _check_targets(group: RowGroup) -> CheckResult:
    """Position s predicts token s+1: inside a segment the target is the token that follows."""
    values, rows_N = group.values, group.row_indices("target_positions")
    ids, positions_N, targets_N = values["input_ids"], values["target_positions"], values["target_ids"]
    # segments of 3 and 2 tokens: a segment begins (or the row group ends) at the tokens 3 and 5
    is_boundary = np.zeros(len(ids) + 1, dtype=bool)
    is_boundary[np.cumsum(values["segment_lengths"])] = True
    next_N = np.clip(group.row_starts("input_ids")[rows_N] + positions_N + 1, 0, len(ids))
    next_ids_N = np.append(ids, 0)[next_N]  # the 0 stands behind the last token and is never compared
    expectation = "target_ids: expected the token that follows in the segment"
    if "weak_ids" in values:  # a token that the teacher generated has no known target, but follows as well
        expectation = f"weak_ids or {expectation}"
        targets_N = np.where(values["weak_ids"] == UNKNOWN_TARGET, targets_N, values["weak_ids"])
    return expectation, np.unique(rows_N[~is_boundary[next_N] & (next_ids_N != targets_N)])


def _check_depths(group: RowGroup) -> Iterator[CheckResult]:
    """Whether depths and weights fit a tree of choices. Its targets need not follow: the answer may take another path.

    All targets of a segment have read the same prompt, so the position less the depth is the same for all of them.
    """
    values, rows_N = group.values, group.row_indices("target_positions")
    depths_N, weights_N = values["depths"], values["weights"]
    tokens_N = group.row_starts("input_ids")[rows_N] + values["target_positions"]
    starts = np.cumsum(values["segment_lengths"]) - values["segment_lengths"]
    segments_N = np.searchsorted(starts, tokens_N, side="right") - 1
    roots_N = tokens_N - depths_N
    is_wrong_N = (depths_N < 0) | (roots_N < starts[segments_N])
    yield "depths: expected 0 or more tokens of a choice, all in the segment", np.unique(rows_N[is_wrong_N])
    differs = (np.diff(segments_N) == 0) & (np.diff(roots_N) != 0)
    yield "depths: expected one prompt for all targets of a segment", np.unique(rows_N[1:][differs])
    # a very unlikely path may underflow to 0; negated, so that NaN is wrong too
    is_right_N = np.where(depths_N == 0, weights_N == 1, (weights_N >= 0) & (weights_N <= 1 + MASS_SLACK))
    yield "weights: expected 1 at depth 0, and 0 to 1 below", np.unique(rows_N[~is_right_N])


def check_distributions(group: RowGroup, manifest: Manifest) -> Iterator[CheckResult]:
    """Whether the captured values are distributions, and ones that this kind of capture can record."""
    rows_N = group.row_indices("target_positions")
    top = distributions(group, manifest)

    def rows_where(is_wrong_N: torch.Tensor) -> np.ndarray:
        return np.unique(rows_N[is_wrong_N.numpy()])

    relative_NK, vocabulary_size = top.relative_logits_NK.float(), manifest.vocabulary_size
    is_wrong_N = (top.ids_NK >= vocabulary_size).any(1)
    yield f"topk_ids: expected ids from 0 to {vocabulary_size - 1}", rows_where(is_wrong_N)
    yield "topk_ids: expected different ids at a position", rows_where(_has_repeated_id(top, manifest))
    # the checks from here on negate what is right, so that NaN is wrong too
    yield "relative_logits: expected 0 first", rows_where(~(relative_NK[:, 0] == 0))
    is_falling_N = (relative_NK[:, 1:] <= relative_NK[:, :-1]).all(1)
    yield "relative_logits: expected numbers that do not increase", rows_where(~is_falling_N)
    expectation, is_right_NC = _check_tails(top.log_tail_NC, manifest)
    yield expectation, rows_where(~is_right_NC.all(1))
    for T in manifest.temperatures:
        log_p_NK, log_tail_N = log_probabilities(top, temperature=T)
        mass_N = log_p_NK.exp().sum(1)
        is_right_N = (mass_N >= 0) & (mass_N <= 1 + MASS_SLACK) & ((mass_N + log_tail_N.exp() - 1).abs() <= MASS_SLACK)
        yield f"distribution: expected a finite sum and a mass of 1 at temperature {T:g}", rows_where(~is_right_N)
    if manifest.tail == "exact":  # imports and pools need not hold them
        yield from _check_entropy_and_log_prob(group, manifest, top)


def _check_tails(log_tail_NC: torch.Tensor, manifest: Manifest) -> tuple[str, torch.Tensor]:
    """What is expected of the tails, and where it holds: [N, C] bool."""
    is_minus_inf_NC = log_tail_NC == -torch.inf
    if manifest.tail == "renormalised":
        return "log_tail: expected -inf, because the kept entries were renormalised to 1", is_minus_inf_NC
    if manifest.tail != "exact":
        return "log_tail: expected finite numbers or -inf", log_tail_NC < torch.inf
    if manifest.kind != "topk":
        return "log_tail: expected -inf, because tokens that were not drawn have probability 0", is_minus_inf_NC
    if manifest.most_kept >= manifest.vocabulary_size:
        return "log_tail: expected finite numbers or -inf", log_tail_NC.isfinite() | is_minus_inf_NC
    return "log_tail: expected finite numbers", log_tail_NC.isfinite()


def _has_repeated_id(top: TopK, manifest: Manifest) -> torch.Tensor:
    """Whether a position holds an id twice, not counting the first id that padding repeats: [N] bool."""
    is_kept_NK = top.relative_logits_NK > -torch.inf
    if not manifest.has_kept_counts:
        is_kept_NK = torch.ones_like(is_kept_NK)
    unique_fillers_K = -1 - torch.arange(is_kept_NK.shape[1])  # -1, -2, -3, ... in place of the padding
    sorted_NK = torch.where(is_kept_NK, top.ids_NK, unique_fillers_K).int().sort(1).values
    return (sorted_NK[:, 1:] == sorted_NK[:, :-1]).any(1)


def _check_entropy_and_log_prob(group: RowGroup, manifest: Manifest, top: TopK) -> Iterator[CheckResult]:
    """Whether entropies and log-probabilities of the target are possible and agree with the distribution."""
    rows_N = group.row_indices("target_positions")
    entropy_N = group.values["entropy"].astype(np.float32)
    max_entropy = math.log(manifest.vocabulary_size)
    is_right_N = (entropy_N >= -MASS_SLACK) & (entropy_N <= max_entropy * (1 + FLOAT16_SLACK) + MASS_SLACK)
    yield (
        f"entropy: expected 0 to {max_entropy:.2f} nats (the log of the vocabulary size)",
        np.unique(rows_N[~is_right_N]),
    )
    targets_N = group.values["target_ids"]
    is_known_N = targets_N != UNKNOWN_TARGET
    recorded_N = group.values["next_log_prob"].astype(np.float32)
    is_right_N = np.where(is_known_N, recorded_N <= MASS_SLACK, np.isnan(recorded_N))
    yield "next_log_prob: expected 0 or less where the target is known, NaN elsewhere", np.unique(rows_N[~is_right_N])
    if manifest.kind != "topk":  # drawn entries are only estimates of the teacher's distribution
        return
    log_p_NK, _ = log_probabilities(top, temperature=1.0)
    is_target_NK = top.ids_NK == torch.from_numpy(targets_N.astype(np.int64))[:, None]
    log_p_N = torch.where(is_target_NK, log_p_NK, -torch.inf).max(1).values.numpy()
    is_kept_N = is_target_NK.any(1).numpy()
    lowest_N = log_p_NK[:, : manifest.k][:, -1].numpy()  # of the largest; what also_ids added may be any tokens
    with np.errstate(invalid="ignore"):
        slack_N = 0.02 + FLOAT16_SLACK * (np.abs(recorded_N) + np.abs(lowest_N))
        differs_N = ~(np.abs(recorded_N - log_p_N) <= slack_N)
        is_too_likely_N = (
            recorded_N > lowest_N + slack_N
        )  # a target that is not kept is not above the lowest kept entry
        is_wrong_N = is_known_N & np.where(is_kept_N, differs_N, is_too_likely_N)
    yield "next_log_prob: expected agreement with the kept entries", np.unique(rows_N[is_wrong_N])
