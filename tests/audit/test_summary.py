"""summary: its figures equal those that polars and the shard reader compute row by row."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.audit import commands
from pipeline.audit.summary import Float16Counts, powers_of_two, summarize
from pipeline.audit.verify import load_manifest
from pipeline.cache.shards import ShardReader
from pipeline.config.commands import AuditConfig
from pipeline.core.topk import log_probabilities
from pipeline.core.types import InputError


def test_figures_equal_those_of_a_slow_reader(labeled_copy: Path) -> None:
    figures = summarize(labeled_copy, load_manifest(labeled_copy))
    reader = ShardReader(labeled_copy)
    masses: list[float] = []
    entries_of_positions: list[list[float]] = []
    top_is_target: list[bool] = []
    confidence: list[float] = []
    for block, rows in enumerate(reader.blocks):
        for row in range(rows):
            sequence, captured = reader.row(block, row)
            p_NK = log_probabilities(captured.top, temperature=1.0)[0].exp()
            masses += p_NK.sum(1).tolist()
            entries_of_positions += p_NK.tolist()
            is_known_N = sequence.target_ids_N >= 0
            log_p_N = log_probabilities(captured.top, temperature=1.0)[0].amax(1)
            confidence += log_p_N[is_known_N].half().tolist()
            top_is_target += (captured.top.ids_NK[:, 0] == sequence.target_ids_N)[is_known_N].tolist()
    table = pl.read_parquet(labeled_copy / "shards" / "*.parquet")
    entropy = table.explode("entropy")["entropy"].cast(pl.Float64)
    next_log_prob = table.explode("next_log_prob")["next_log_prob"].cast(pl.Float64)
    assert figures["num_sequences"] == len(table)
    assert figures["num_tokens"] == table["input_ids"].list.len().sum()
    assert figures["num_targets"] == len(entropy) == len(masses)
    assert figures["kept_entries_a_target"] == pytest.approx(table["topk_ids"].list.len().sum() / len(masses))
    assert figures["bytes"] == sum(path.stat().st_size for path in (labeled_copy / "shards").glob("*.parquet"))
    assert sum(figures["column_bytes"].values()) == figures["bytes"]
    assert figures["next_log_prob"] == pytest.approx(next_log_prob.drop_nans().mean())
    assert figures["perplexity"] == pytest.approx(math.exp(-figures["next_log_prob"]))
    assert figures["top_is_target_fraction"] == pytest.approx(sum(top_is_target) / len(top_is_target))
    ordered = sorted(zip(confidence, top_is_target, strict=True), reverse=True)
    for kept, share in figures["top_is_target_of_surest"].items():
        least = ordered[max(round(float(kept) * len(ordered)), 1) - 1][0]
        of_surest = [is_target for value, is_target in ordered if value >= least]
        assert share == pytest.approx(sum(of_surest) / len(of_surest)), kept
    assert figures["entropy"]["mean"] == pytest.approx(entropy.mean())
    assert sum(figures["entropy"]["histogram"]) == sum(figures["retained_mass"]["histogram"]) == len(masses)
    for name, value in figures["entropy"]["quantiles"].items():
        assert value == entropy.quantile(float(name), interpolation="lower")
    assert figures["retained_mass"]["mean"] == pytest.approx(sum(masses) / len(masses))
    for name, value in figures["retained_mass"]["quantiles"].items():
        assert value == pytest.approx(pl.Series(masses).quantile(float(name), interpolation="nearest"), abs=0.02)
    mean_at_k = figures["retained_mass"]["mean_at_k"]
    assert list(mean_at_k) == (["1", "2", "4", "8"] if figures["kind"] == "topk" else ["1", "2", "4", "8", "16"])
    for k, value in mean_at_k.items():
        expected = sum(sum(entries[: int(k)]) for entries in entries_of_positions) / len(entries_of_positions)
        assert value == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("last", "expected"), [(0, []), (1, [1]), (8, [1, 2, 4, 8]), (12, [1, 2, 4, 8, 12])])
def test_powers_of_two_end_with_the_last(last: int, expected: list[int]) -> None:
    assert powers_of_two(last) == expected


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-50, 50, width=16) | st.just(float("nan")), min_size=1, max_size=40), st.floats(0, 1))
def test_quantiles_and_histograms_of_counts_are_those_of_the_values(values: list[float], fraction: float) -> None:
    counts = Float16Counts()
    for part in (values[::2], values[1::2]):
        counts.add(np.array(part, dtype=np.float16))
    numbers = sorted(value for value in values if not math.isnan(value))
    expected = numbers[math.floor(fraction * (len(numbers) - 1))] if numbers else None
    assert counts.quantile(fraction) == expected
    expected_bins = np.histogram(np.clip(numbers, -25, 25), bins=5, range=(-25, 25))[0].tolist()
    assert counts.histogram(low=-25, high=25, bins=5) == expected_bins


def test_summary_writes_numbers_and_pictures(
    labeled_caches: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind, cache in labeled_caches.items():
        config = AuditConfig(cache=str(cache.parent / f"{kind}-*"), out=str(tmp_path / kind))
        assert commands.run("summary", config) == 0
        printed = capsys.readouterr().out
        written = json.loads((tmp_path / kind / "summary.json").read_text())
        assert written["kind"] == kind
        assert f"{written['perplexity']:,.3f}" in printed
        assert "█" in printed
        assert (tmp_path / kind / "summary.png").read_bytes().startswith(b"\x89PNG")
        assert "Bytes by column" in (tmp_path / kind / "summary.svg").read_text()


def test_the_summary_of_a_damaged_cache_is_refused(cache_copy: Path) -> None:
    (cache_copy / "shards/00001.json").write_text("{")
    with pytest.raises(InputError, match="ShardInfo"):
        commands.run("summary", AuditConfig(cache=str(cache_copy)))
