"""Recipes against the definition, one position after the other; and their commands against the real options."""

from __future__ import annotations

import math
import shlex

import pytest
import torch
from torch import Tensor

from pipeline.config.commands import ROOTS
from pipeline.config.validate_train import check_train
from pipeline.core.types import TopK
from pipeline.objective.gates import threshold, top_probability
from pipeline.pooling.distributions import logarithmic_pool
from pipeline.preview.recipes import FIT_PRIOR, RECIPES, Recipe, pool_weights, targets_of
from support.commands import composed


def log_probs(count: int, *, seed: int, outcomes: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, outcomes, generator=generator, dtype=torch.float64).mul(2).log_softmax(dim=1)


def recipe(**values: object) -> Recipe:
    return Recipe(name="own", commands=(), **values)  # type: ignore[arg-type]


def twin(one: Recipe, teacher: list[float], member: list[float], weights: tuple[float, float]) -> list[float]:
    """The targets of one position, with plain numbers."""
    powers = [
        math.exp(weights[0] * t + weights[1] * m) if one.is_pooled else math.exp(t)
        for t, m in zip(teacher, member, strict=True)
    ]
    sharp = [power ** (1 / one.temperature) for power in powers]
    return [value / sum(sharp) for value in sharp]


@pytest.mark.parametrize(
    "one",
    [
        recipe(),
        recipe(temperature=0.5),
        recipe(pool=(0.3, 0.7)),
        recipe(pool=(0.5, 0.5), temperature=0.5),
        recipe(pool=(0.9, 0.6)),
    ],
)
def test_targets_are_those_of_the_formula(one: Recipe) -> None:
    teacher_NC, member_NC = log_probs(7, seed=0), log_probs(7, seed=1)
    found = targets_of(one, teacher_NC, member_NC if one.is_pooled else None, one.pool)
    expected = [
        twin(one, *rows, one.pool or (1, 0)) for rows in zip(teacher_NC.tolist(), member_NC.tolist(), strict=True)
    ]
    torch.testing.assert_close(found.p_NC, torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(found.weight_N, torch.full((7,), 1 / 7, dtype=torch.float64))


@pytest.mark.parametrize("keep", [0.9, 0.5, 0.1])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_a_gate_keeps_exactly_the_most_confident(keep: float, temperature: float) -> None:
    """By the likeliest token, at the temperature of the targets; the last outcome is no token."""
    teacher_NC = log_probs(20, seed=2)
    found = targets_of(recipe(keep_fraction=keep, temperature=temperature), teacher_NC, None, None)
    sharp = [[math.exp(value / temperature) for value in row] for row in teacher_NC.tolist()]
    confidence = [max(row[:-1]) / sum(row) for row in sharp]
    kept = sorted(range(20), key=lambda row: -confidence[row])[: round(keep * 20)]
    assert sorted(found.weight_N.nonzero()[:, 0].tolist()) == sorted(kept)
    assert found.weight_N[found.weight_N > 0].tolist() == pytest.approx([1 / len(kept)] * len(kept))


def test_the_gate_is_that_of_training() -> None:
    log_p_NC = log_probs(50, seed=3)
    top = TopK(
        ids_NK=torch.arange(4).expand(50, 4),
        relative_logits_NK=(log_p_NC[:, :4] - log_p_NC[:, :4].amax(1, keepdim=True)).half(),
        log_tail_NC=(log_p_NC[:, 4:] - log_p_NC[:, :4].amax(1, keepdim=True)).float(),
        temperatures=(1.0,),
    )
    confidence_N = top_probability(top)
    expected_N = confidence_N >= threshold(confidence_N, 0.6, largest=True)
    assert torch.equal(targets_of(recipe(keep_fraction=0.6), log_p_NC, None, None).weight_N > 0, expected_N)


def test_the_pool_is_that_of_the_pipeline() -> None:
    """With all tokens kept, and the last outcome as its tail."""
    teacher_NC, member_NC = log_probs(9, seed=4), log_probs(9, seed=5)

    def top_of(log_p_NC: Tensor) -> TopK:
        return TopK(
            ids_NK=torch.arange(4).expand(9, 4),
            relative_logits_NK=log_p_NC[:, :4],  # float64: without the rounding of a shard
            log_tail_NC=log_p_NC[:, 4:],
            temperatures=(1.0,),
        )

    nothing_N = torch.full((9,), torch.nan)
    pooled = logarithmic_pool(
        [top_of(teacher_NC), top_of(member_NC)], [nothing_N] * 2, (0.3, 0.7), vocabulary_size=5, temperature=0.5
    ).top
    by_id_NK = torch.empty_like(pooled.relative_logits_NK).scatter(1, pooled.ids_NK, pooled.relative_logits_NK)
    expected_NC = torch.cat([by_id_NK.double(), pooled.log_tail_NC.double()], dim=1).softmax(dim=1)
    found = targets_of(recipe(pool=(0.3, 0.7), temperature=0.5), teacher_NC, member_NC, (0.3, 0.7))
    torch.testing.assert_close(found.p_NC, expected_NC, atol=2e-3, rtol=0)  # the pool is stored in float16


def test_hard_targets_and_weights_by_confidence() -> None:
    teacher_NC = torch.tensor([[0.5, 0.2, 0.3], [0.1, 0.3, 0.6]], dtype=torch.float64).log()
    assert targets_of(recipe(hard=True), teacher_NC, None, None).p_NC.tolist() == [[1, 0, 0], [0, 1, 0]]
    weights = targets_of(recipe(power=4.0), teacher_NC, None, None).weight_N.tolist()
    assert weights == pytest.approx([0.5**4 / (0.5**4 + 0.3**4), 0.3**4 / (0.5**4 + 0.3**4)])


def test_fitted_weights_are_the_best_of_a_fine_grid() -> None:
    teacher_GC, member_GC = log_probs(30, seed=6), log_probs(30, seed=7)
    answer_G = (teacher_GC + 2 * member_GC)[:, :-1].argmax(dim=1)
    answer_G[::3] = 0

    def loss(first: float, second: float) -> float:
        log_p_GC = (first * teacher_GC + second * member_GC).log_softmax(dim=1)
        prior = FIT_PRIOR * ((first - 0.5) ** 2 + (second - 0.5) ** 2)
        return float(-log_p_GC.gather(1, answer_G[:, None]).mean()) + prior

    found = pool_weights(recipe(fits_pool=True), teacher_GC, member_GC, answer_G)
    assert found is not None
    assert min(found) >= 0
    grid = [(i / 50, j / 50) for i in range(150) for j in range(150)]
    best = min(grid, key=lambda weights: loss(*weights))
    assert loss(*found) <= loss(*best) + 1e-9
    assert found == pytest.approx(best, abs=0.03)
    assert pool_weights(recipe(pool=(0.3, 0.7)), teacher_GC, member_GC, answer_G) == (0.3, 0.7)


def test_names_are_unique_and_the_first_is_plain() -> None:
    assert len({one.name for one in RECIPES}) == len(RECIPES)
    assert RECIPES[0] == Recipe(name="weak_only", commands=RECIPES[0].commands)


TRAINED = [
    pytest.param(one, command, id=f"{one.name}-{place}")
    for one in RECIPES
    for place, command in enumerate(one.commands)
]


@pytest.mark.parametrize(("one", "command"), TRAINED)
def test_a_command_trains_what_its_recipe_is(one: Recipe, command: str) -> None:
    """Every option exists and has the value of the recipe; pools are those of a study."""
    scripts = {"TRAIN": "train study=demo", "POOL": "pool study=demo", "STUDY": "study study=demo"}
    fields = {**scripts, "CACHE": "c", "CACHES": "caches", "FOLDS": "5"}
    root, *words = shlex.split(command.format(**fields))
    of_students = [word for word in words if root == "study" and word.startswith("loss.")]
    config = composed(root, *(word for word in words if word not in of_students))
    assert isinstance(config, ROOTS[root])
    if root == "pool":
        assert config.temperature == one.temperature
        return
    if root == "study":
        weights = None if one.pool is None else list(one.pool)
        assert (config.pool.weights, config.pool.fit, config.pool.temperature) == (
            weights,
            one.fits_pool,
            one.temperature,
        )
        assert config.experiments == ["pooled"]
        of_grid = [axis.replace(":", "=") for axis in config.grid]
        student = composed("train", "study=demo", "experiment=pooled", *of_students, *of_grid)
        assert (student.loss.lm.weight, student.loss.kd.weight) == (one.gold_weight, 1.0)
        assert student.loss.kd.gate.keep_fraction == one.keep_fraction
        return
    check_train(config)
    kd, hard = config.loss.kd, config.loss.hard
    assert (config.loss.lm.weight if config.gold_fraction > 0 else 0.0) == one.gold_weight
    assert (kd.gate.keep_fraction, kd.weight, kd.temperature) == (one.keep_fraction, 0.0 if one.hard else 1.0, 1.0)
    assert (hard.weight, hard.take.name) == ((1.0, "likeliest") if one.hard else (0.0, "generated"))
    of_pool = "caches/demo/pooled-demo-*" if one.is_pooled else "caches/demo/demo-*"
    assert config.cache == ("caches/sharp-*" if one.temperature < 1 else of_pool)
    weight = kd.position_weight
    assert (weight.by.name, weight.power) == (("confidence", one.power) if one.power else ("none", 1.0))
