"""Does the teacher still say what the cache holds? A fresh forward against the cached values.

Beside it stands the control: fresh against fresh at another batch size, which is the noise of this machine.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.audit.sampling import Sample
from pipeline.capture.teacher import capture_batch, finish_copy
from pipeline.core.progress import Progress
from pipeline.core.topk import log_probabilities, narrow
from pipeline.core.types import UNKNOWN_TARGET, Captured, InputError, Manifest, TopK
from pipeline.models import loading as models
from pipeline.models.forward import Model

CONTROL_MULTIPLE = 4.0  # a difference may be so many times the control's
HALF_STEP = 2.0**-10  # relative step of float16
WIDER = 2  # fresh entries are kept this many times deeper, so that a near tie at place k is not a missing entry

Differences = dict[str, Tensor]  # by measure, one number a position (or entry); nats, or a probability for `draws`


def check_teacher(manifest: Manifest, *, folder: Path, dtype: str, num_layers: int | None) -> None:
    """Refuse a model that is not the teacher of the cache, before it loads."""
    told = {"teacher.num_layers": ("teacher_num_layers", num_layers), "teacher.dtype": ("teacher_dtype", dtype)}
    for option, (name, found) in told.items():
        expected = manifest.made_of.get(name)
        if found != expected:
            said = "null" if expected is None else expected
            raise InputError(f"{option}: expected {said} (the capture's), found {found}; give {option}={said}")
    found, expected = models.weights_hash(folder), str(manifest.made_of.get("teacher_weights"))
    if found != expected:
        raise InputError(
            f"teacher.path: expected the weights {expected[:12]} that captured, found {found[:12]} in {folder}; "
            "give the folder of that teacher"
        )


def fresh(
    teacher: Model, samples: Sequence[Sample], manifest: Manifest, *, batch_sequences: int, progress: Progress
) -> list[Captured]:
    """What the teacher says now; of kind topk deeper than was captured."""
    if manifest.kind == "topk":
        deep = min(WIDER * manifest.k + 16, manifest.vocabulary_size)
        manifest = dataclasses.replace(manifest, k=deep)
    found: list[Captured] = []
    for first in range(0, len(samples), batch_sequences):
        batch = [sequence for sequence, _ in samples[first : first + batch_sequences]]
        found += finish_copy(capture_batch(teacher, batch, manifest))[0]
        progress.advance(len(batch))
    return found


def as_captured(found: Captured, manifest: Manifest) -> Captured:
    """The part of a fresh forward that a capture keeps."""
    return dataclasses.replace(found, top=narrow(found.top, k=manifest.k)) if manifest.kind == "topk" else found


def differences(kept: Captured, other: Captured, sequence: Any, manifest: Manifest) -> Differences:
    """How far a fresh forward lies from what was kept, measure by measure."""
    found: Differences = {
        "entropy": (kept.entropy_N.float() - other.entropy_N.float()).abs(),
        "top-1": (kept.top.ids_NK[:, 0] == other.top.ids_NK[:, 0]).float(),
    }
    if bool((known_N := sequence.target_ids_N != UNKNOWN_TARGET).any()):
        found["next_log_prob"] = (kept.next_log_prob_N - other.next_log_prob_N).float().abs()[known_N]
    distances = _exact_distances if manifest.kind == "topk" else _drawn_distances
    return found | distances(kept.top, other.top)


def _exact_distances(kept: TopK, other: TopK) -> Differences:
    """Kept entries, tails and divergence; an entry that the fresh forward has not is at least as far as its last."""
    has_NK, at_NK = _find(kept.ids_NK, other.ids_NK)
    width = other.ids_NK.shape[1]
    is_other_NL = torch.ones(len(at_NK), width + 1, dtype=torch.bool)  # one column more for those not found
    is_other_NL = is_other_NL.scatter(1, torch.where(has_NK, at_NK, width), False)[:, :-1]
    found: Differences = {}
    tails = []
    for T in kept.temperatures:
        log_p_NK, log_tail_N = log_probabilities(kept, temperature=T)
        other_NL, other_tail_N = log_probabilities(other, temperature=T)
        log_q_NK = torch.where(has_NK, other_NL.gather(1, at_NK), torch.minimum(log_p_NK, other_NL[:, -1:]))
        rest_N = torch.logsumexp(torch.where(is_other_NL, other_NL, -torch.inf), dim=1)
        log_rest_N = torch.logaddexp(rest_N, other_tail_N)
        tails.append(_distance(log_tail_N, log_rest_N))
        if T == 1.0:
            found["kept"] = _distance(log_p_NK, log_q_NK).flatten()
            head_NK = torch.where(log_p_NK > -torch.inf, log_p_NK.exp() * (log_p_NK - log_q_NK), 0.0)
            tail_N = torch.where(log_tail_N > -torch.inf, log_tail_N.exp() * (log_tail_N - log_rest_N), 0.0)
            found["KL"] = head_NK.sum(1) + tail_N
    return found | {"log_tail": torch.cat(tails)}


def _find(ids_NK: Tensor, among_NL: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each id is among others of its position, and at which place: [N, K] twice."""
    sorted_NL, order_NL = among_NL.sort(dim=1)
    at_NK = torch.searchsorted(sorted_NL, ids_NK.contiguous()).clamp(max=among_NL.shape[1] - 1)
    return sorted_NL.gather(1, at_NK) == ids_NK, order_NL.gather(1, at_NK)


def _distance(one: Tensor, other: Tensor) -> Tensor:
    """|a - b|, 0 between two -inf."""
    return torch.where(one == other, 0.0, (one - other).abs())


def _drawn_distances(kept: TopK, other: TopK) -> Differences:
    """Half the summed difference of probabilities: a draw that moves, moves 1 / draws."""
    width = max(kept.ids_NK.shape[1], other.ids_NK.shape[1])
    p_NK, q_NK = (log_probabilities(top.pad_to_width(width), temperature=1.0)[0].exp() for top in (kept, other))
    ids_NK, others_NK = kept.pad_to_width(width).ids_NK, other.pad_to_width(width).ids_NK
    same_NKK = (ids_NK[:, :, None] == others_NK[:, None, :]).float()  # padding repeats an id, at probability 0
    q_at_p_NK = (same_NKK * q_NK[:, None, :]).sum(2)
    p_at_q_NK = (same_NKK * p_NK[:, :, None]).sum(1)
    first_NK = p_NK > 0
    missed_NK = (q_NK > 0) & (p_at_q_NK == 0)
    both_NK = torch.where(first_NK, (p_NK - q_at_p_NK).abs(), 0.0)
    return {"draws": 0.5 * (both_NK.sum(1) + torch.where(missed_NK, q_NK, 0.0).sum(1))}


def tolerance(measure: str, control: float, samples: Sequence[Sample], manifest: Manifest) -> float:
    """The largest difference that is still noise: a multiple of the control's, and the rounding of what is stored.

    float16 steps by 2^-10 of a value: of the lowest kept logit, of the target's log-probability, of an entropy; sums
    over entries (tails, draws) by at most that of the log of the vocabulary. One draw in each direction may move.
    """
    sizes = {
        "kept": max(_size(captured.top.relative_logits_NK) for _, captured in samples),
        "next_log_prob": max(_size(captured.next_log_prob_N) for _, captured in samples),
        "entropy": max(_size(captured.entropy_N) for _, captured in samples),
    }
    rounding = HALF_STEP * max(sizes.get(measure, 0.0), math.log(manifest.vocabulary_size))
    moved = 2 / manifest.draws if measure == "draws" else 0.0
    return CONTROL_MULTIPLE * control + rounding + moved


def _size(values: Tensor) -> float:
    values = values.float().abs()
    return float(torch.where(values.isfinite(), values, 0.0).max())


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One measure of a replay."""

    measure: str
    largest: float
    mean: float
    control_largest: float
    control_mean: float
    tolerance: float | None
    """None where the measure only informs."""

    @property
    def is_right(self) -> bool:
        """Within the tolerance; NaN is not."""
        return self.tolerance is None or self.largest <= self.tolerance


def replay(
    teacher: Model, samples: Sequence[Sample], manifest: Manifest, *, batch_sequences: int, progress: Progress
) -> list[Verdict]:
    """Cached against fresh, and fresh against fresh at another batch size, over the same sequences."""
    said = fresh(teacher, samples, manifest, batch_sequences=batch_sequences, progress=progress)
    other_size = 1 if batch_sequences > 1 and len(samples) > 1 else 2
    again = fresh(teacher, samples, manifest, batch_sequences=other_size, progress=progress)
    cached = [captured for _, captured in samples]
    kept = [as_captured(captured, manifest) for captured in again]
    sequences = [sequence for sequence, _ in samples]
    measured, control = (
        _joined([differences(*three, manifest) for three in zip(side, said, sequences, strict=True)])
        for side in (cached, kept)
    )
    return [
        Verdict(
            measure=measure,
            largest=float(values.max()),
            mean=float(values.mean()),
            control_largest=float(control[measure].max()),
            control_mean=float(control[measure].mean()),
            tolerance=None
            if measure in ("KL", "top-1")
            else tolerance(measure, float(control[measure].max()), samples, manifest),
        )
        for measure, values in measured.items()
    ]


def _joined(parts: list[Differences]) -> Differences:
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: torch.cat([part[name] for part in parts if name in part]) for name in names}
