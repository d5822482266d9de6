"""Ramps have the right ends, no jumps but the declared one, and fall steadily."""

import itertools

import pytest

from pipeline.ramps import SHAPES, learning_rate, ramp


@pytest.mark.parametrize("shape", sorted(set(SHAPES) - {"constant"}))
def test_ends(shape: str) -> None:
    settings = {"num_steps": 100, "shape": shape, "start_fraction": 0.2, "end_fraction": 0.6}
    assert all(ramp(step, **settings, start_value=0.5, end_value=2.0) == 0.5 for step in range(21))
    assert all(ramp(step, **settings, start_value=0.5, end_value=2.0) == 2.0 for step in range(60, 101))


def test_constant_stays() -> None:
    assert {ramp(step, num_steps=10, shape="constant", start_value=0.7) for step in range(11)} == {0.7}


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_continuous_and_monotone(shape: str) -> None:
    values = [ramp(step, num_steps=1000, shape=shape, start_fraction=0.1, end_fraction=0.9) for step in range(1001)]
    falls = [a - b for a, b in itertools.pairwise(values)]
    assert min(falls) >= 0
    assert max(falls) < 0.002  # at most pi/2 times the mean slope of 1/800


def test_step_jumps_once() -> None:
    values = [ramp(step, num_steps=100, shape="step", start_fraction=0.5) for step in range(101)]
    assert sum(a != b for a, b in itertools.pairwise(values)) == 1
    assert (values[50], values[51]) == (1.0, 0.0)


def test_a_ramp_of_no_width_is_a_step() -> None:
    values = [ramp(s, num_steps=4, shape="linear", start_fraction=0.5, end_fraction=0.5) for s in range(5)]
    assert values == [1.0, 1.0, 0.0, 0.0, 0.0]


def test_learning_rate_warms_up_to_the_peak_and_decays_to_the_end() -> None:
    settings = {"num_steps": 100, "peak": 1.0, "warmup_fraction": 0.1, "shape": "linear", "final_fraction": 0.2}
    values = [learning_rate(step, **settings) for step in range(100)]
    assert values[0] == pytest.approx(0.1)
    assert values[9] == values[10] == 1.0 == max(values)
    assert all(a >= b for a, b in itertools.pairwise(values[10:]))
    assert values[-1] == pytest.approx(0.2 + 0.8 / 90)
    assert learning_rate(0, **{**settings, "warmup_fraction": 0.0}) == 1.0
