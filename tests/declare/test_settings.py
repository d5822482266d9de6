"""Settings of a new study follow from sizes alone, and its YAML gives every value back."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.schema import TrainConfig
from pipeline.core.types import InputError
from pipeline.declare.settings import MAX_GOLD_PASSES, Sizes, choose_settings, gold_fraction, learning_rate
from pipeline.declare.sizes import fit_window, given_window, quantile
from pipeline.declare.study_yaml import flow


def sizes(**changes: Any) -> Sizes:
    chosen: dict[str, Any] = {"corpus": 3000, "gold": 80, "teacher_labels": 2000, "ceiling": 3000, "window": 64}
    chosen |= {"student_parameters": 135_000_000, "teacher_parameters": 42_000_000, "has_dev": True}
    return Sizes(**chosen | changes)


def test_of_the_demo_they_are_near_those_that_were_measured() -> None:
    """docs/decisions.md: rates 1e-4 and 3e-4, batches of 16, two and three epochs, 24 steps of gold alone."""
    settings = choose_settings(sizes())
    assert (settings.learning_rate, settings.teacher_learning_rate) == (1e-4, 3e-4)
    assert (settings.global_batch, settings.micro_batch) == (16, 16)
    assert (settings.epochs, settings.teacher_epochs) == (2, 3)
    assert 1 / 16 <= settings.gold_fraction <= 1 / 8
    assert 24 <= settings.steps["gold_only"] <= 48
    assert settings.steps["teacher"] == 375


@given(gold=st.integers(1, 5000), corpus=st.integers(1, 200_000), window=st.integers(1, 512), large=st.booleans())
def test_invariants(gold: int, corpus: int, window: int, large: bool) -> None:
    """Gold is read eight times at most, unless 1/64 of a batch already is more; batches and steps are possible."""
    parameters = 8_000_000_000 if large else 1_000_000
    settings = choose_settings(sizes(gold=gold, corpus=corpus, window=16 * window, student_parameters=parameters))
    assert 1 / 64 <= settings.gold_fraction <= 1 / 2
    assert (settings.gold_fraction * 64).is_integer()
    gold_read = settings.gold_fraction * settings.global_batch * settings.steps["combined"]
    rounding = settings.global_batch  # half a step up or down
    assert settings.gold_fraction == 1 / 64 or gold_read <= MAX_GOLD_PASSES * gold + rounding
    assert math.isclose(gold_read, settings.gold_passes * gold)
    corpus_read = (1 - settings.gold_fraction) * settings.global_batch * settings.steps["combined"]
    assert abs(corpus_read - settings.epochs * corpus) <= rounding
    assert settings.micro_batch & (settings.micro_batch - 1) == 0
    assert 1 <= settings.micro_batch <= settings.global_batch
    assert settings.micro_batch == 1 or settings.micro_batch * 16 * window <= 2048
    assert settings.steps["gold_only"] >= 30
    assert settings.steps["combined"] >= 100 or settings.epochs == 10


@given(gold=st.integers(1, 10_000), corpus=st.integers(1, 100_000))
def test_gold_fraction_is_the_largest_that_keeps_the_limit(gold: int, corpus: int) -> None:
    """Mixed so, gold is f / (1 - f) times what is read of the corpus."""
    chosen = gold_fraction(gold=gold, corpus=corpus)
    allowed = [f / 64 for f in range(1, 33) if f / (64 - f) * corpus <= MAX_GOLD_PASSES * gold * (1 + 1e-12)]
    assert chosen == max(allowed, default=1 / 64)


def test_learning_rates_fall_with_size() -> None:
    rates = [learning_rate(10**power) for power in range(4, 13)]
    assert all(smaller >= larger for smaller, larger in itertools.pairwise(rates))
    assert (rates[0], rates[-1]) == (1e-3, 1e-5)


def test_without_dev_nothing_is_evaluated() -> None:
    assert choose_settings(sizes(has_dev=False)).evaluate_every_steps is None


def test_options_exist() -> None:
    """What the YAML calls them."""
    config = TrainConfig(name="x")
    for path in ("global_batch", "micro_batch", "optimizer.learning_rate", "evaluate_every_steps", "epochs", "steps"):
        value: Any = config
        for name in path.split("."):
            value = getattr(value, name)


# ---------------------------------------------------------------------------------------------- windows


@given(st.lists(st.integers(2, 3000), min_size=1, max_size=80), st.one_of(st.none(), st.integers(64, 4096)))
def test_a_window_fits_all_but_a_few(tokens: list[int], longest: int | None) -> None:
    limit = math.inf if longest is None else longest // 16 * 16
    try:
        window = fit_window(tokens, is_plain=False, longest=longest)
    except InputError:
        assert sum(length <= limit for length in tokens) < len(tokens) / 2
        return
    fitting = sum(length <= window.size for length in tokens) / len(tokens)
    assert window.size % 16 == 0
    assert window.size <= limit
    assert window.fitting_fraction == fitting
    assert (window.too_long is None) == (fitting == 1)
    if max(tokens) <= min(128, limit - 16):
        assert fitting == 1
    if window.size <= limit - 16:
        assert fitting >= 0.99
        assert window.size - 16 < max(quantile(tokens), min(max(tokens), window.size))


def test_windows_in_numbers() -> None:
    assert fit_window([30] * 99 + [120], is_plain=False, longest=None).size == 128
    assert fit_window([30] * 99 + [300], is_plain=False, longest=None).size == 32
    assert fit_window([200] * 99 + [300], is_plain=False, longest=None).size == 304
    assert fit_window([200] * 99 + [300], is_plain=False, longest=250).size == 240
    assert fit_window([9000], is_plain=True, longest=None).size == 512
    assert fit_window([9000], is_plain=True, longest=256).size == 256
    assert fit_window([100], is_plain=True, longest=None).size == 112
    assert quantile(list(range(1, 101))) == 99
    with pytest.raises(
        InputError, match=r"fits at least half of the records, found 32, which fits 33%; the longest has 9"
    ):
        given_window(32, [9, 99, 98])


# ------------------------------------------------------------------------------------------------- YAML

SCALARS = st.one_of(
    st.text(st.characters(exclude_categories=("Cs",))),
    st.sampled_from(
        ["yes", "No", "null", "1e-4", "0x1", ".5", "~", "a: b", "# c", "- x", "a,b", "{a}", "", " x", "1:30"]
    ),
    st.integers(-(10**9), 10**9),
    st.booleans(),
    st.none(),
    st.sampled_from([1.0, 0.0001, 0.09375, 0.00002, 2.5]),
)


@given(st.dictionaries(st.sampled_from(["files", "choices", "targets", "path"]), st.one_of(SCALARS, st.lists(SCALARS))))
def test_yaml_gives_every_value_back(value: dict[str, Any]) -> None:
    assert yaml.safe_load(flow(value)) == value
