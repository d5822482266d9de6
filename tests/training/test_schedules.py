"""Ramps have the right ends, no jumps but the declared one, and fall steadily."""

import itertools

import pytest
import torch

from pipeline.config.schema import OptimizerConfig, Shape
from pipeline.training.builders import learning_rate_at
from pipeline.training.schedules import SHAPES, adaptive_kd_factor, learning_rate, ramp, step_decay


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
    settings = {
        "num_steps": 100,
        "peak": 1.0,
        "warmup_fraction": 0.1,
        "shape": "linear",
        "final_fraction": 0.2,
        "decay_fraction": 0.2,
    }
    values = [learning_rate(step, **settings) for step in range(100)]
    assert values[0] == pytest.approx(0.1)
    assert values[9] == values[10] == 1.0 == max(values)
    assert all(a >= b for a, b in itertools.pairwise(values[10:]))
    assert values[-1] == pytest.approx(0.2 + 0.8 / 90)
    assert learning_rate(0, **{**settings, "warmup_fraction": 0.0}) == 1.0


def test_wsd_rises_stays_and_falls_without_jumps() -> None:
    settings = {"num_steps": 1000, "shape": "wsd", "start_fraction": 0.1, "end_fraction": 0.8}
    values = [ramp(step, **settings, start_value=2.0, end_value=0.5) for step in range(1001)]
    assert (values[0], values[100], values[800], values[1000]) == (0.0, 2.0, 2.0, 0.5)
    assert set(values[100:801]) == {2.0}
    assert max(abs(a - b) for a, b in itertools.pairwise(values)) < 0.021
    assert all(a <= b for a, b in itertools.pairwise(values[:101]))
    assert all(a >= b for a, b in itertools.pairwise(values[800:]))


def test_learning_rate_wsd_stays_at_the_peak_until_the_last_fifth() -> None:
    settings = {
        "num_steps": 100,
        "peak": 1.0,
        "warmup_fraction": 0.1,
        "shape": "wsd",
        "final_fraction": 0.0,
        "decay_fraction": 0.2,
    }
    values = [learning_rate(step, **settings) for step in range(100)]
    assert set(values[9:81]) == {1.0}
    assert all(a > b for a, b in itertools.pairwise(values[81:]))
    assert values[-1] == pytest.approx(0.05)


def test_step_is_the_step_decay_of_schedulers() -> None:
    """torch's MultiStepLR, after the warm-up; no other factor at the end."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[50, 75], gamma=0.1)
    expected = []
    for _ in range(100):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    settings = {"num_steps": 100, "peak": 2.0, "at_fractions": [0.5, 0.75], "factor": 0.1}
    assert [step_decay(step, warmup_fraction=0.0, **settings) for step in range(100)] == pytest.approx(expected)
    warmed = [step_decay(step, warmup_fraction=0.1, **settings) for step in range(100)]
    assert warmed[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert warmed[10:] == pytest.approx(expected[10:])
    options = OptimizerConfig(schedule=Shape.step, learning_rate=2.0, warmup_fraction=0.1)
    assert [learning_rate_at(options, step, 100) for step in range(100)] == warmed


def test_the_confidence_ramp_of_the_paper_does_not_jump() -> None:
    """0 to 0.5 over the first fifth: a known implementation goes to 0.05 and then jumps to 0.5."""
    settings = {"num_steps": 1000, "shape": "linear", "end_fraction": 0.2, "start_value": 0.0, "end_value": 0.5}
    values = [ramp(step, **settings) for step in range(1001)]
    assert (values[0], values[100], values[200], values[1000]) == (0.0, 0.25, 0.5, 0.5)
    assert max(b - a for a, b in itertools.pairwise(values)) < 0.003


def test_adaptive_weight_falls_when_ahead_rises_when_behind_and_noise_does_not_move_it() -> None:
    rule = {"teacher": 0.8, "margin": 0.01, "factor": 0.5, "least": 0.1}
    assert adaptive_kd_factor(1.0, student=0.82, **rule) == 0.5
    assert adaptive_kd_factor(0.5, student=0.78, **rule) == 1.0
    assert adaptive_kd_factor(1.0, student=0.78, **rule) == 1.0  # never above what was asked for
    assert adaptive_kd_factor(0.15, student=0.9, **rule) == 0.1
    value = 0.5
    for noise in (0.809, 0.791, 0.805, 0.795):  # to and fro within the margin
        value = adaptive_kd_factor(value, student=noise, **rule)
    assert value == 0.5


def test_every_shape_among_the_options_is_known() -> None:
    assert set(SHAPES) | {"wsd"} == {shape.name for shape in Shape}
