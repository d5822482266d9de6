"""What lies in a cache, in numbers: how much, how sure the teacher is, what the kept entries hold, what it costs.

One pass, one row group in memory. Quantiles come from counts of float16 values, so they are exact to its rounding
however large the cache is.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.audit.row_groups import Columns, column_bytes, distributions, read_groups
from pipeline.cache import manifest as manifests
from pipeline.core.progress import Progress
from pipeline.core.topk import log_probabilities
from pipeline.core.types import UNKNOWN_TARGET, Manifest, TopK

QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
_HALVES = np.arange(65_536, dtype=np.uint16).view(np.float16).astype(np.float64)
_BY_VALUE = np.argsort(_HALVES, kind="stable")[: int((~np.isnan(_HALVES)).sum())]  # NaN sorts last


class Counts:
    """How often each float16 value was seen: quantiles and histograms of any number of values."""

    def __init__(self) -> None:
        self._seen = np.zeros(65_536, dtype=np.int64)

    def add(self, values: np.ndarray) -> None:
        """Count some more values, rounded to float16; NaN is left out."""
        halves = values.astype(np.float16)
        self._seen += np.bincount(halves[~np.isnan(halves)].view(np.uint16), minlength=65_536)

    def quantile(self, fraction: float) -> float | None:
        """The value below which that fraction lies (the lower neighbour); None of nothing."""
        ends = np.cumsum(self._seen[_BY_VALUE])
        if not ends[-1]:
            return None
        rank = math.floor(fraction * (int(ends[-1]) - 1))
        return float(_HALVES[_BY_VALUE[np.searchsorted(ends, rank, side="right")]])

    def quantiles(self) -> dict[str, float | None]:
        """Those of QUANTILES by name; -inf, which JSON does not know, as None."""
        found = {f"{fraction:g}": self.quantile(fraction) for fraction in QUANTILES}
        return {name: value if value is not None and math.isfinite(value) else None for name, value in found.items()}

    def histogram(self, *, low: float, high: float, bins: int) -> list[int]:
        """Counts in equal bins from low to high; what lies outside goes into the first or last."""
        values, seen = _HALVES[_BY_VALUE], self._seen[_BY_VALUE]
        place = np.clip(np.floor((np.clip(values, low, high) - low) / (high - low) * bins), 0, bins - 1)
        return np.bincount(place.astype(np.int64), weights=seen, minlength=bins).astype(np.int64).tolist()


class Tally:
    """The sums over all row groups."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.entropy, self.log_tail = Counts(), Counts()
        self.sums = {"entropy": 0.0, "next_log_prob": 0.0, "retained_mass": 0.0}
        self.totals: Counter[str] = Counter()
        self.retained_bins_B = np.zeros(20, dtype=np.int64)
        self.mass_by_rank_K = np.zeros(manifest.k + manifest.draws, dtype=np.float64)

    def add(self, columns: Columns) -> None:
        """One more row group."""
        top, values = distributions(columns, self.manifest), columns.values
        targets_N = values["target_ids"].astype(np.int64)
        known_N = targets_N != UNKNOWN_TARGET
        self.totals["sequences"] += columns.num_rows
        self.totals["segments"] += len(values["segment_lengths"])
        self.totals["tokens"] += len(values["input_ids"])
        self.totals["targets"] += len(targets_N)
        self.totals["known_targets"] += int(known_N.sum())
        self.totals["kept_entries"] += len(values["topk_ids"])
        agrees_N = top.ids_NK[:, 0].numpy() == targets_N
        self.totals["agreeing_targets"] += int(agrees_N[known_N].sum())
        self.sums["entropy"] += float(values["entropy"].sum(dtype=np.float64))
        self.sums["next_log_prob"] += float(values["next_log_prob"][known_N].sum(dtype=np.float64))
        self.entropy.add(values["entropy"])
        self._add_masses(top)

    def _add_masses(self, top: TopK) -> None:
        log_p_NK, log_tail_N = log_probabilities(top, temperature=1.0)
        p_NK = log_p_NK.exp()
        retained_N = p_NK.sum(dim=1).clamp(0.0, 1.0)
        self.log_tail.add(log_tail_N.numpy())
        self.sums["retained_mass"] += float(retained_N.sum(dtype=torch.float64))
        self.retained_bins_B += torch.histc(retained_N, bins=20, min=0.0, max=1.0).long().numpy()
        self.mass_by_rank_K[: p_NK.shape[1]] += p_NK.sum(dim=0, dtype=torch.float64).numpy()


def summarize(cache: Path, manifest: Manifest, *, log_every_seconds: float = 10.0) -> dict[str, Any]:
    """All figures as plain data; refuses a cache that is not finished or whose bytes are damaged."""
    infos = manifests.committed_shards(cache, manifest)
    tally, sizes = Tally(manifest), Counter[str]()
    total = sum(info.rows for info in infos)
    progress = Progress("summary", total=total, unit=" sequences", log_every_seconds=log_every_seconds)
    for info in infos:
        manifests.check_shard_hash(cache, info)
        path = manifests.shard_path(cache, info.index)
        columns = column_bytes(path)
        sizes += columns
        sizes["(footers)"] += info.bytes - columns.total()
        for group in read_groups(path):
            tally.add(group)
            progress.advance(group.num_rows)
    progress.close()
    return figures(manifest, tally, sizes)


def figures(manifest: Manifest, tally: Tally, sizes: Counter[str]) -> dict[str, Any]:
    """The summary as it is written: fractions from 0 to 1, nats, bytes."""
    totals, sums = tally.totals, tally.sums
    targets, known = max(totals["targets"], 1), totals["known_targets"]
    mean_log_prob = sums["next_log_prob"] / known if known else None
    most = math.log(manifest.vocabulary_size)
    mass_K = np.cumsum(tally.mass_by_rank_K) / targets
    tail_quantiles = tally.log_tail.quantiles()
    return {
        "kind": manifest.kind,
        "k": manifest.k,
        "draws": manifest.draws,
        "temperatures": list(manifest.temperatures),
        "vocabulary_size": manifest.vocabulary_size,
        "num_records": manifest.num_records,
        "num_skipped": manifest.num_skipped,
        "num_shards": manifest.num_shards,
        **{f"num_{name}": totals[name] for name in ("sequences", "segments", "tokens", "targets", "known_targets")},
        "bytes": sizes.total(),
        "bytes_a_token": sizes.total() / max(totals["tokens"], 1),
        "bytes_a_target": sizes.total() / targets,
        "column_bytes": dict(sizes.most_common()),
        "kept_entries_a_target": totals["kept_entries"] / targets,
        "retained_mass": {
            "mean": sums["retained_mass"] / targets,
            # the mass is 1 - exp(log tail): its low quantiles are the tail's high ones
            "quantiles": {
                f"{q:g}": -math.expm1(tail) if (tail := tally.log_tail.quantile(1 - q)) is not None else None
                for q in QUANTILES
            },
            "histogram": tally.retained_bins_B.tolist(),
            "mean_at_k": {str(k): float(mass_K[k - 1]) for k in _ladder(_reached(tally))},
        },
        "log_tail": {"quantiles": tail_quantiles},
        "entropy": {
            "mean": sums["entropy"] / targets,
            "quantiles": tally.entropy.quantiles(),
            "histogram": tally.entropy.histogram(low=0.0, high=most, bins=40),
            "most": most,
        },
        "next_log_prob": mean_log_prob,
        "perplexity": None if mean_log_prob is None else math.exp(-mean_log_prob),
        "top_is_target_fraction": totals["agreeing_targets"] / known if known else None,
    }


def _reached(tally: Tally) -> int:
    """The most entries kept at any position."""
    return int(np.flatnonzero(tally.mass_by_rank_K)[-1]) + 1 if tally.mass_by_rank_K.any() else 0


def _ladder(most: int) -> list[int]:
    """1, 2, 4, ... and the last."""
    return sorted({*(1 << i for i in range(most.bit_length()) if 1 << i <= most), *([most] if most else [])})
