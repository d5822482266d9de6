"""Checks of row groups: those that the caches captured here do not reach."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pipeline.audit.row_checks import CheckResult, check_distributions, check_lists, check_sequences
from pipeline.audit.row_groups import RowGroup, read_row_groups
from pipeline.audit.verify import load_manifest
from pipeline.cache.manifest import shard_path, shard_range
from pipeline.core.types import UNKNOWN_TARGET


def first_row_group(cache: Path, **changed_values: np.ndarray) -> RowGroup:
    group = next(read_row_groups(shard_path(cache, 0)))
    return dataclasses.replace(group, values={**group.values, **changed_values})


def failed(results: Iterator[CheckResult]) -> dict[str, list[int]]:
    return {expectation: rows.tolist() for expectation, rows in results if len(rows)}


@pytest.mark.parametrize(
    ("kind", "tail", "expected"),
    [
        ("topk", "renormalised", ["log_tail: expected -inf, because the kept entries were renormalised to 1"]),
        ("topk", "remainder", []),
        ("topk", "approximate", []),
        ("hybrid", "renormalised", []),
        ("hybrid", "remainder", []),
    ],
)
def test_the_tail_is_what_the_manifest_declares(
    labeled_caches: dict[str, Path], kind: str, tail: str, expected: list[str]
) -> None:
    manifest = dataclasses.replace(load_manifest(labeled_caches[kind]), tail=tail)
    assert list(failed(check_distributions(first_row_group(labeled_caches[kind]), manifest))) == expected


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_tail_that_is_no_number_is_found_in_an_imported_cache(labeled_caches: dict[str, Path], value: float) -> None:
    manifest = dataclasses.replace(load_manifest(labeled_caches["topk"]), tail="remainder")
    log_tail = first_row_group(labeled_caches["topk"]).values["log_tail"].copy()
    log_tail[0] = value
    group = first_row_group(labeled_caches["topk"], log_tail=log_tail)
    assert failed(check_distributions(group, manifest))["log_tail: expected finite numbers or -inf"] == [0]


def test_a_generated_token_has_to_follow_where_the_target_is_unknown(labeled_caches: dict[str, Path]) -> None:
    manifest = load_manifest(labeled_caches["topk"])
    targets_N = first_row_group(labeled_caches["topk"]).values["target_ids"]

    def failed_with(targets_N: np.ndarray, weak_ids_N: np.ndarray) -> dict[str, list[int]]:
        group = first_row_group(labeled_caches["topk"], target_ids=targets_N)
        lengths = {**group.lengths, "weak_ids": group.lengths["target_ids"]}
        group = dataclasses.replace(group, values={**group.values, "weak_ids": weak_ids_N}, lengths=lengths)
        return failed(check_sequences(group, manifest, shard_range(manifest, 0)))

    unknown_N = np.full_like(targets_N, UNKNOWN_TARGET)
    assert failed_with(targets_N, unknown_N) == {}
    assert failed_with(unknown_N, targets_N) == {}
    wrong_N = targets_N.copy()
    wrong_N[0] = (wrong_N[0] + 1) % manifest.vocabulary_size
    expectation = "weak_ids or target_ids: expected the token that follows in the segment"
    assert failed_with(unknown_N, wrong_N) == {expectation: [0]}
    assert failed_with(wrong_N, unknown_N) == {expectation: [0]}


@pytest.mark.parametrize(
    ("name", "place", "value", "expected"),
    [
        ("weights", 0, 0.5, "weights: expected 1 at depth 0, and 0 to 1 below"),
        ("weights", 1, 1.5, "weights: expected 1 at depth 0, and 0 to 1 below"),
        ("weights", 1, np.nan, "weights: expected 1 at depth 0, and 0 to 1 below"),
        ("depths", 1, 2, "depths: expected one prompt for all targets of a segment"),
        ("depths", 0, 40, "depths: expected 0 or more tokens of a choice, all in the segment"),
        ("depths", 1, -1, "depths: expected 0 or more tokens of a choice, all in the segment"),
    ],
)
def test_depths_and_weights_fit_a_tree(choices_cache: Path, name: str, place: int, value: float, expected: str) -> None:
    manifest, values = load_manifest(choices_cache), first_row_group(choices_cache).values
    records = shard_range(manifest, 0)
    assert values["depths"][:2].tolist() == [0, 1]  # the prompt's end and the first inner node
    assert failed(check_sequences(first_row_group(choices_cache), manifest, records)) == {}
    changed = values[name].copy()
    changed[place] = value
    found = failed(check_sequences(first_row_group(choices_cache, **{name: changed}), manifest, records))
    assert found[expected] == [0]


def test_every_target_has_a_depth_and_a_weight(choices_cache: Path) -> None:
    manifest, group = load_manifest(choices_cache), first_row_group(choices_cache)
    for name in ("depths", "weights"):
        lengths = {**group.lengths, name: group.lengths[name] + 1}
        shorter = dataclasses.replace(group, lengths=lengths)
        assert f"{name}: expected one value per target position" in failed(check_lists(shorter, manifest))
