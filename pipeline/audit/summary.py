"""The figures of a cache: its size, the teacher's entropy and perplexity, the retained mass, the bytes by column.

One pass over the shards, one row group in memory. Quantiles are computed from counts of float16 values, so they are
exact up to the rounding of float16, however large the cache is.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import torch

from pipeline.audit.row_groups import RowGroup, column_bytes, distributions, read_row_groups
from pipeline.cache import manifest as manifests
from pipeline.cache.downloads import local_copy
from pipeline.core.object_store import Location
from pipeline.core.progress import Progress
from pipeline.core.topk import log_probabilities
from pipeline.core.types import UNKNOWN_TARGET, Manifest

QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
KEPT_FRACTIONS = (0.1, 0.25, 0.5, 0.8, 0.9, 1.0)
MASS_BINS, ENTROPY_BINS = 20, 40
NUM_FLOAT16 = 65_536
_FLOAT16_VALUES = np.arange(NUM_FLOAT16, dtype=np.uint16).view(np.float16).astype(np.float64)  # value of each bit code
_NUM_WITHOUT_NAN = int((~np.isnan(_FLOAT16_VALUES)).sum())
_CODES_ASCENDING = np.argsort(_FLOAT16_VALUES, kind="stable")[:_NUM_WITHOUT_NAN]  # NaN sorts last


class Float16Counts:
    """How often each float16 value occurred: quantiles and histograms of any number of values."""

    def __init__(self) -> None:
        self._counts = np.zeros(NUM_FLOAT16, dtype=np.int64)

    def add(self, values: np.ndarray) -> None:
        """Count more values, rounded to float16; NaN is left out."""
        rounded = values.astype(np.float16)
        self._counts += np.bincount(rounded[~np.isnan(rounded)].view(np.uint16), minlength=NUM_FLOAT16)

    def quantile(self, fraction: float) -> float | None:
        """Of all values in ascending order that at index floor(fraction * (count - 1)); None if there are none."""
        ends = np.cumsum(self._counts[_CODES_ASCENDING])
        if not ends[-1]:
            return None
        index = math.floor(fraction * (int(ends[-1]) - 1))
        return float(_FLOAT16_VALUES[_CODES_ASCENDING[np.searchsorted(ends, index, side="right")]])

    def quantiles(self) -> dict[str, float | None]:
        """The quantiles at QUANTILES by name; None for -inf, which JSON cannot hold."""
        values = {f"{fraction:g}": self.quantile(fraction) for fraction in QUANTILES}
        return {name: value if value is not None and math.isfinite(value) else None for name, value in values.items()}

    def from_largest(self) -> np.ndarray:
        """For each possible value, the largest first: how many values are at least as large; int64."""
        return np.cumsum(self._counts[_CODES_ASCENDING[::-1]])

    def histogram(self, *, low: float, high: float, bins: int) -> list[int]:
        """Counts in equal bins from low to high; values outside are counted in the first or the last bin."""
        values, counts = _FLOAT16_VALUES[_CODES_ASCENDING], self._counts[_CODES_ASCENDING]
        bin_of_value = np.clip(np.floor((np.clip(values, low, high) - low) / (high - low) * bins), 0, bins - 1)
        return np.bincount(bin_of_value.astype(np.int64), weights=counts, minlength=bins).astype(np.int64).tolist()


class CacheTotals:
    """Counts and sums over all row groups of a cache."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.entropy, self.log_tail = Float16Counts(), Float16Counts()
        # log-probability of the top entry at the known targets, and at those of them that are the top entry: in float16
        # it tells apart very confident positions, which a probability does not
        self.log_confidence, self.log_confidence_right = Float16Counts(), Float16Counts()
        self.counts: Counter[str] = Counter()
        self.sums = {"entropy": 0.0, "next_log_prob": 0.0, "retained_mass": 0.0}
        self.mass_histogram = np.zeros(MASS_BINS, dtype=np.int64)
        self.mass_by_entry_K = np.zeros(manifest.most_kept, dtype=np.float64)

    def add(self, group: RowGroup) -> None:
        """Add one row group."""
        top, values = distributions(group, self.manifest), group.values
        targets_N = values["target_ids"].astype(np.int64)
        is_known_N = targets_N != UNKNOWN_TARGET
        self.counts["sequences"] += group.num_rows
        self.counts["segments"] += len(values["segment_lengths"])
        self.counts["tokens"] += len(values["input_ids"])
        self.counts["targets"] += len(targets_N)
        self.counts["known_targets"] += int(is_known_N.sum())
        self.counts["kept_entries"] += len(values["topk_ids"])
        top_is_target_N = top.ids_NK[:, 0].numpy() == targets_N
        self.counts["top_is_target"] += int(top_is_target_N[is_known_N].sum())
        self.sums["entropy"] += float(values["entropy"].sum(dtype=np.float64))
        self.sums["next_log_prob"] += float(values["next_log_prob"][is_known_N].sum(dtype=np.float64))
        self.entropy.add(values["entropy"])
        log_p_NK, log_tail_N = log_probabilities(top, temperature=1.0)
        first_N = log_p_NK[:, 0].numpy()
        self.log_confidence.add(first_N[is_known_N])
        self.log_confidence_right.add(first_N[is_known_N & top_is_target_N])
        self._add_masses(log_p_NK, log_tail_N)

    def _add_masses(self, log_p_NK: torch.Tensor, log_tail_N: torch.Tensor) -> None:
        p_NK = log_p_NK.exp()
        retained_N = p_NK.sum(dim=1).clamp(0.0, 1.0)
        self.log_tail.add(log_tail_N.numpy())
        self.sums["retained_mass"] += float(retained_N.sum(dtype=torch.float64))
        self.mass_histogram += torch.histc(retained_N, bins=MASS_BINS, min=0.0, max=1.0).long().numpy()
        self.mass_by_entry_K[: p_NK.shape[1]] += p_NK.sum(dim=0, dtype=torch.float64).numpy()

    def largest_num_kept(self) -> int:
        """The largest number of entries kept at any position."""
        return int(np.flatnonzero(self.mass_by_entry_K)[-1]) + 1 if self.mass_by_entry_K.any() else 0


def summarize(cache: Location, manifest: Manifest, *, log_every_seconds: float = 10.0) -> dict[str, Any]:
    """All figures as plain data; InputError if the cache is not finished or a shard is damaged."""
    infos = manifests.committed_shards(cache, manifest)
    totals, sizes = CacheTotals(manifest), Counter[str]()
    num_rows = sum(info.rows for info in infos)
    progress = Progress("summary", total=num_rows, unit=" sequences", log_every_seconds=log_every_seconds)
    for info in infos:
        with local_copy(manifests.shard_file(cache, info)) as path:
            manifests.check_shard_hash(cache, info, path)
            sizes_of_shard = column_bytes(path)
            sizes += sizes_of_shard
            sizes["(footers)"] += info.bytes - sizes_of_shard.total()
            for group in read_row_groups(path):
                totals.add(group)
                progress.advance(group.num_rows)
    progress.close()
    return summary_figures(manifest, totals, sizes)


def summary_figures(manifest: Manifest, totals: CacheTotals, sizes: Counter[str]) -> dict[str, Any]:
    """The content of summary.json: fractions from 0 to 1, nats, bytes."""
    counts, sums = totals.counts, totals.sums
    num_targets, num_known = max(counts["targets"], 1), counts["known_targets"]
    mean_log_prob = sums["next_log_prob"] / num_known if num_known else None
    max_entropy = math.log(manifest.vocabulary_size)
    return {
        "kind": manifest.kind,
        "k": manifest.k,
        "draws": manifest.draws,
        "temperatures": list(manifest.temperatures),
        "vocabulary_size": manifest.vocabulary_size,
        "num_records": manifest.num_records,
        "num_skipped": manifest.num_skipped,
        "num_shards": manifest.num_shards,
        **{f"num_{name}": counts[name] for name in ("sequences", "segments", "tokens", "targets", "known_targets")},
        "bytes": sizes.total(),
        "bytes_a_token": sizes.total() / max(counts["tokens"], 1),
        "bytes_a_target": sizes.total() / num_targets,
        "column_bytes": dict(sizes.most_common()),
        "kept_entries_a_target": counts["kept_entries"] / num_targets,
        "retained_mass": _mass_figures(totals),
        "log_tail": {"quantiles": totals.log_tail.quantiles()},
        "entropy": {
            "mean": sums["entropy"] / num_targets,
            "quantiles": totals.entropy.quantiles(),
            "histogram": totals.entropy.histogram(low=0.0, high=max_entropy, bins=ENTROPY_BINS),
            "most": max_entropy,
        },
        "next_log_prob": mean_log_prob,
        "perplexity": None if mean_log_prob is None else math.exp(-mean_log_prob),
        "top_is_target_fraction": counts["top_is_target"] / num_known if num_known else None,
        "top_is_target_of_surest": of_surest(totals.log_confidence, totals.log_confidence_right),
    }


def of_surest(all_values: Float16Counts, right: Float16Counts) -> dict[str, float]:
    """For each of KEPT_FRACTIONS, how often the top entry is the target where its probability is largest.

    As a gate with this `keep_fraction` would keep the known targets; equal probabilities are kept together. Empty
    without known targets.
    """
    num_kept, num_right = all_values.from_largest(), right.from_largest()
    if not num_kept[-1]:
        return {}
    needed = [max(round(fraction * int(num_kept[-1])), 1) for fraction in KEPT_FRACTIONS]
    places = np.searchsorted(num_kept, needed)
    shares = (num_right[places] / num_kept[places]).tolist()
    return {f"{fraction:g}": share for fraction, share in zip(KEPT_FRACTIONS, shares, strict=True)}


def _mass_figures(totals: CacheTotals) -> dict[str, Any]:
    num_targets = max(totals.counts["targets"], 1)
    mass_at_k_K = np.cumsum(totals.mass_by_entry_K) / num_targets
    quantiles: dict[str, float | None] = {}
    for fraction in QUANTILES:
        # the retained mass is 1 - exp(log tail): its low quantiles are the high ones of the tail
        log_tail = totals.log_tail.quantile(1 - fraction)
        quantiles[f"{fraction:g}"] = None if log_tail is None else -math.expm1(log_tail)
    return {
        "mean": totals.sums["retained_mass"] / num_targets,
        "quantiles": quantiles,
        "histogram": totals.mass_histogram.tolist(),
        "mean_at_k": {str(k): float(mass_at_k_K[k - 1]) for k in powers_of_two(totals.largest_num_kept())},
    }


def powers_of_two(last: int) -> list[int]:
    """1, 2, 4, ... below `last`, then `last`; empty for 0. Of 12: 1, 2, 4, 8, 12."""
    powers = [2**i for i in range(last.bit_length()) if 2**i < last]
    return [*powers, last] if last else []
