"""Does the teacher still predict what the cache holds? Its forward is run again and compared with the cached values.

The control compares two such forwards with different batch sizes: their difference is the numerical noise of this
machine.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from pipeline.audit.sampling import Sample
from pipeline.capture.teacher import capture_batch, finish_copy
from pipeline.core.progress import Progress
from pipeline.core.topk import kept_ids, log_probabilities, narrow
from pipeline.core.types import UNKNOWN_TARGET, Captured, InputError, Manifest, TokenSequence, TopK
from pipeline.models.forward import Model
from pipeline.models.model_files import weights_hash

CONTROL_MULTIPLE = 4.0  # a difference may be up to this multiple of the control's largest
FLOAT16_STEP = 2.0**-10  # largest relative distance of two neighbouring float16 values
WIDTH_FACTOR = 2  # recomputed k over captured k: a near tie at place k then changes the order, but no entry is missing

ValuesByMeasure = dict[str, Tensor]
"""Measure -> its values, per position or entry: differences, in nats (`draws`, `weights`: not logs), `top-1` 0 or 1."""


def check_teacher(manifest: Manifest, *, folder: Path, dtype: str, num_layers: int | None) -> None:
    """InputError if a model is not the teacher of the cache; called before the model is loaded."""
    options = (("teacher.num_layers", "teacher_num_layers", num_layers), ("teacher.dtype", "teacher_dtype", dtype))
    for option, name, found in options:
        expected = manifest.made_of.get(name)
        if found != expected:
            value = "null" if expected is None else expected
            raise InputError(f"{option}: expected {value} (as captured), found {found}; give {option}={value}")
    found_hash, expected_hash = weights_hash(folder), str(manifest.made_of.get("teacher_weights"))
    if found_hash != expected_hash:
        raise InputError(
            f"teacher.path: expected the weights {expected_hash[:12]} of the cache's teacher, found {found_hash[:12]} "
            f"in {folder}; give the folder of that teacher"
        )


def recompute(
    teacher: Model, samples: Sequence[Sample], manifest: Manifest, *, batch_sequences: int, progress: Progress
) -> list[Captured]:
    """Run the teacher's forward on the sampled sequences: what a capture would record today.

    Of kind topk more entries are kept than were captured (about WIDTH_FACTOR times k), so that a captured entry is
    found even where rounding has moved it beyond place k. With also_ids all cached entries are kept, and the largest.
    """
    has_also = "also_ids" in manifest.made_of
    if has_also:
        manifest = dataclasses.replace(manifest, k=1)
    elif manifest.kind == "topk":
        manifest = dataclasses.replace(manifest, k=min(WIDTH_FACTOR * manifest.k + 16, manifest.vocabulary_size))
    recomputed: list[Captured] = []
    for first in range(0, len(samples), batch_sequences):
        batch = [sequence for sequence, _ in samples[first : first + batch_sequences]]
        cached = [captured.top for _, captured in samples[first : first + batch_sequences]]
        also_NJ = kept_ids(TopK.cat(cached)) if has_also else None
        captured, _ = finish_copy(capture_batch(teacher, batch, manifest, also_NJ))
        recomputed += captured
        progress.advance(len(batch))
    return recomputed


def narrow_to_k(captured: Captured, manifest: Manifest) -> Captured:
    """The result of `recompute` with only the k entries that the capture keeps; the others become part of the tail."""
    if manifest.kind != "topk" or "also_ids" in manifest.made_of:
        return captured
    return dataclasses.replace(captured, top=narrow(captured.top, k=manifest.k))


def differences(cached: Captured, recomputed: Captured, sequence: TokenSequence, manifest: Manifest) -> ValuesByMeasure:
    """The differences between cached and recomputed values of one sequence, by measure."""
    values: ValuesByMeasure = {
        "entropy": (cached.entropy_N.float() - recomputed.entropy_N.float()).abs(),
        "top-1": (cached.top.ids_NK[:, 0] == recomputed.top.ids_NK[:, 0]).float(),
    }
    is_known_N = sequence.target_ids_N != UNKNOWN_TARGET
    if bool(is_known_N.any()):
        difference_N = (cached.next_log_prob_N - recomputed.next_log_prob_N).float().abs()
        values["next_log_prob"] = difference_N[is_known_N]
    if cached.weights_N is not None:
        values["weights"] = (cached.weights_N - recomputed.weights_or_ones()).abs()
    if manifest.kind == "topk":
        return values | _topk_differences(cached.top, recomputed.top, is_padded=manifest.has_kept_counts)
    return values | _drawn_differences(cached.top, recomputed.top)


def _topk_differences(cached: TopK, recomputed: TopK, *, is_padded: bool) -> ValuesByMeasure:
    """Differences of the kept entries and of the tails, and KL(cached || recomputed) over entries and tail.

    p are the cached probabilities of K entries, q the recomputed ones of L >= K entries. The log q of a cached entry
    that is not among the L is at most that of the last of them, so min(log p, log q of the last) is taken for it: the
    smallest difference that is possible.
    """
    is_found_NK, columns_NK = _find_columns(cached.ids_NK, recomputed.ids_NK)
    L = recomputed.ids_NK.shape[1]
    # whether an entry of L is outside the cached K; column L only takes those that were not found, and is cut off
    is_outside_NL = torch.ones(len(columns_NK), L + 1, dtype=torch.bool)
    is_outside_NL = is_outside_NL.scatter(1, torch.where(is_found_NK, columns_NK, L), False)[:, :-1]
    values: ValuesByMeasure = {}
    tails = []
    for T in cached.temperatures:
        log_p_NK, log_p_tail_N = log_probabilities(cached, temperature=T)
        log_q_NL, log_q_beyond_L_N = log_probabilities(recomputed, temperature=T)
        log_q_NK = torch.where(is_found_NK, log_q_NL.gather(1, columns_NK), torch.minimum(log_p_NK, log_q_NL[:, -1:]))
        log_q_outside_N = torch.logsumexp(torch.where(is_outside_NL, log_q_NL, -torch.inf), dim=1)
        log_q_tail_N = torch.logaddexp(log_q_outside_N, log_q_beyond_L_N)
        tails.append(_absolute_difference(log_p_tail_N, log_q_tail_N))
        if T == 1.0:
            kept = _absolute_difference(log_p_NK, log_q_NK)
            values["kept"] = kept[log_p_NK > -torch.inf] if is_padded else kept.flatten()
            head_NK = torch.where(log_p_NK > -torch.inf, log_p_NK.exp() * (log_p_NK - log_q_NK), 0.0)
            tail_N = torch.where(log_p_tail_N > -torch.inf, log_p_tail_N.exp() * (log_p_tail_N - log_q_tail_N), 0.0)
            values["KL"] = head_NK.sum(1) + tail_N
    return values | {"log_tail": torch.cat(tails)}


def _find_columns(ids_NK: Tensor, among_NL: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each id is among the L ids of its position, and in which column: [N, K] bool, [N, K] int64.

    The column of an id that is not found means nothing.
    """
    # id 4 among 9 4 6: sorted 4 6 9 with columns 1 2 0; 4 is at place 0 of the sorted ids, so it is in column 1
    # stable: padding repeats the first id, whose column is the first of that id
    sorted_NL, columns_NL = among_NL.sort(dim=1, stable=True)
    places_NK = torch.searchsorted(sorted_NL, ids_NK.contiguous()).clamp(max=among_NL.shape[1] - 1)
    return sorted_NL.gather(1, places_NK) == ids_NK, columns_NL.gather(1, places_NK)


def _absolute_difference(a: Tensor, b: Tensor) -> Tensor:
    """|a - b|, and 0 between two -inf."""
    return torch.where(a == b, 0.0, (a - b).abs())


def _drawn_differences(cached: TopK, recomputed: TopK) -> ValuesByMeasure:
    """Total variation of the drawn distributions: half the sum of |p - q|. One draw on another token adds 1 / draws."""
    width = max(cached.ids_NK.shape[1], recomputed.ids_NK.shape[1])
    cached, recomputed = cached.pad_to_width(width), recomputed.pad_to_width(width)
    p_NK = log_probabilities(cached, temperature=1.0)[0].exp()
    q_NK = log_probabilities(recomputed, temperature=1.0)[0].exp()
    # padding repeats an id, at probability 0
    is_same_NKK = (cached.ids_NK[:, :, None] == recomputed.ids_NK[:, None, :]).float()
    q_of_cached_NK = (is_same_NKK * q_NK[:, None, :]).sum(2)
    p_of_recomputed_NK = (is_same_NKK * p_NK[:, :, None]).sum(1)
    only_recomputed_NK = (q_NK > 0) & (p_of_recomputed_NK == 0)
    difference_NK = torch.where(p_NK > 0, (p_NK - q_of_cached_NK).abs(), 0.0)
    return {"draws": 0.5 * (difference_NK.sum(1) + torch.where(only_recomputed_NK, q_NK, 0.0).sum(1))}


def tolerance(measure: str, control: float, samples: Sequence[Sample], manifest: Manifest) -> float:
    """The largest difference that still counts as noise: CONTROL_MULTIPLE * control + rounding of the stored values.

    float16 rounds by up to 2^-10 of a value: of the lowest kept logit, of the target's log-probability, of an entropy;
    sums over entries (tails, draws) by at most that of the log of the vocabulary. In each direction one draw may fall
    on another token. Weights are probabilities.
    """
    largest_values = {
        "kept": max(_largest(captured.top.relative_logits_NK) for _, captured in samples),
        "next_log_prob": max(_largest(captured.next_log_prob_N) for _, captured in samples),
        "entropy": max(_largest(captured.entropy_N) for _, captured in samples),
    }
    largest = max(largest_values.get(measure, 0.0), math.log(manifest.vocabulary_size))
    rounding = FLOAT16_STEP * (1.0 if measure == "weights" else largest)
    moved_draws = 2 / manifest.draws if measure == "draws" else 0.0
    return CONTROL_MULTIPLE * control + rounding + moved_draws


def _largest(values: Tensor) -> float:
    """The largest finite absolute value."""
    values = values.float().abs()
    return float(torch.where(values.isfinite(), values, 0.0).max())


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MeasureResult:
    """One measure of a replay: cached against recomputed values, and the control."""

    measure: str
    largest: float
    mean: float
    control_largest: float
    control_mean: float
    tolerance: float | None
    """None for a measure that is only printed."""

    @property
    def is_within_tolerance(self) -> bool:
        """False for NaN too."""
        return self.tolerance is None or self.largest <= self.tolerance


def replay(
    teacher: Model, samples: Sequence[Sample], manifest: Manifest, *, batch_sequences: int, progress: Progress
) -> list[MeasureResult]:
    """Compare cached with recomputed values, and as the control recomputed values of two batch sizes."""
    recomputed = recompute(teacher, samples, manifest, batch_sequences=batch_sequences, progress=progress)
    other_size = 1 if batch_sequences > 1 and len(samples) > 1 else 2
    recomputed_again = recompute(teacher, samples, manifest, batch_sequences=other_size, progress=progress)
    cached = [captured for _, captured in samples]
    as_cached = [narrow_to_k(captured, manifest) for captured in recomputed_again]
    sequences = [sequence for sequence, _ in samples]
    values = _differences_of_all(cached, recomputed, sequences, manifest)
    control = _differences_of_all(as_cached, recomputed, sequences, manifest)
    results = []
    for measure in values:
        control_largest = float(control[measure].max())
        is_judged = measure not in ("KL", "top-1")
        results.append(
            MeasureResult(
                measure=measure,
                largest=float(values[measure].max()),
                mean=float(values[measure].mean()),
                control_largest=control_largest,
                control_mean=float(control[measure].mean()),
                tolerance=tolerance(measure, control_largest, samples, manifest) if is_judged else None,
            )
        )
    return results


def _differences_of_all(
    cached: list[Captured], recomputed: list[Captured], sequences: list[TokenSequence], manifest: Manifest
) -> ValuesByMeasure:
    """`differences` of every sequence, one after another; a sequence without known targets has no next_log_prob."""
    parts = [
        differences(old, new, sequence, manifest)
        for old, new, sequence in zip(cached, recomputed, sequences, strict=True)
    ]
    measures = dict.fromkeys(measure for part in parts for measure in part)
    return {measure: torch.cat([part[measure] for part in parts if measure in part]) for measure in measures}
