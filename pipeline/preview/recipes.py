"""Recipes as data: what each makes of the teacher's distributions, and the commands of its real training.

A recipe's targets and weights are a pure function of the teacher, of cross-fitted students (members) and, for pools
whose weights are fitted, of gold:

    pool       log p  =  w_teacher log p_teacher + w_member log p_member - log z
    sharpen    log p  ->  log p / T - log z
    gate       weight 1 for the `keep_fraction` most confident positions, 0 for the others; or confidence^power
    hard       p  ->  1 for the likeliest token, 0 for all others
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from pipeline.objective.gates import threshold

FIT_PRIOR = 1e-3  # weight of the squared distance of fitted pool weights from 1/2: they stay finite where all is right


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a student is trained on the teacher's cache."""

    name: str
    commands: tuple[str, ...]
    """Of the real training, with fields such as TRAIN for its script."""
    gold_weight: float = 0.0
    """Of the mean cross entropy on gold, beside the mean over the corpus."""
    pool: tuple[float, float] | None = None
    """Weights of teacher and member; None: the teacher alone."""
    fits_pool: bool = False
    """These weights are fitted on gold instead."""
    temperature: float = 1.0
    keep_fraction: float = 1.0
    power: float = 0.0
    """Positions are weighted by confidence^power."""
    hard: bool = False

    @property
    def is_pooled(self) -> bool:
        """Whether it reads cross-fitted students."""
        return self.fits_pool or self.pool is not None

    @property
    def reads_gold(self) -> bool:
        """Whether its student depends on gold."""
        return self.fits_pool or self.gold_weight > 0


POOL_GOLD = 0.3  # weight of gold for members of pools and for students of pools
# whatever the study's file has: the weights of a linear student are these
WEAK, COMBINED = "{TRAIN} experiment=weak_only loss.kd.weight=1", "{TRAIN} experiment=combined loss.kd.weight=1"
SHARP = "{POOL} name=sharp 'members=[{CACHE}]' temperature=0.5"
OF_SHARP = f"{WEAK} 'cache={{CACHES}}/sharp-*'"
POOLED = "{STUDY} 'experiments=[pooled]' folds={FOLDS} loss.lm.weight=0.3 loss.kd.weight=1"
KEEP = "loss.kd.gate.keep_fraction"


def _gold(weight: float) -> Recipe:
    return Recipe(name=f"gold {weight:g}", commands=(f"{COMBINED} loss.lm.weight={weight:g}",), gold_weight=weight)


def _gate(keep: float) -> Recipe:
    return Recipe(name=f"keep {keep:g}", commands=(f"{WEAK} {KEEP}={keep:g}",), keep_fraction=keep)


def _pool(name: str, options: str, *more: str, **values: Any) -> Recipe:
    """As a study makes it: its members and its student learn gold, too."""
    return Recipe(name=name, commands=(f"{POOLED} {options}", *more), gold_weight=POOL_GOLD, **values)


RECIPES: tuple[Recipe, ...] = (
    Recipe(name="weak_only", commands=(WEAK,)),
    *map(_gold, (0.1, 0.3, 1.0, 3.0)),
    *map(_gate, (0.9, 0.8, 0.7, 0.6, 0.5)),
    Recipe(
        name="gold 0.3, keep 0.8",
        commands=(f"{COMBINED} loss.lm.weight=0.3 {KEEP}=0.8",),
        gold_weight=0.3,
        keep_fraction=0.8,
    ),
    Recipe(name="sharpened", commands=(SHARP, OF_SHARP), temperature=0.5),
    Recipe(
        name="sharpened, keep 0.8",
        commands=(SHARP, f"{OF_SHARP} {KEEP}=0.8"),
        temperature=0.5,
        keep_fraction=0.8,
    ),
    Recipe(
        name="hard",
        commands=("{TRAIN} experiment=weak_only loss.kd.weight=0 loss.hard.weight=1 loss.hard.take=likeliest",),
        hard=True,
    ),
    Recipe(
        name="confidence^4",
        commands=(f"{WEAK} loss.kd.position_weight.by=confidence loss.kd.position_weight.power=4",),
        power=4.0,
    ),
    _pool("pool 0.5/0.5", "'pool.weights=[0.5,0.5]'", pool=(0.5, 0.5)),
    _pool("pool 0.3/0.7", "'pool.weights=[0.3,0.7]'", pool=(0.3, 0.7)),
    _pool("pool fitted on gold", "pool.fit=true", fits_pool=True),
    _pool(
        "pool 0.5/0.5, keep 0.8",
        f"'pool.weights=[0.5,0.5]' 'grid=[{KEEP}:0.8]'",
        pool=(0.5, 0.5),
        keep_fraction=0.8,
    ),
    _pool("pool 0.5/0.5, sharpened", "'pool.weights=[0.5,0.5]' pool.temperature=0.5", pool=(0.5, 0.5), temperature=0.5),
)
"""The first is what all others are compared with. Members of pools learn the corpus and gold of the other folds."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Targets:
    """What a student learns at the positions of the corpus."""

    p_NC: Tensor
    weight_N: Tensor
    """Sum 1."""


def targets_of(
    recipe: Recipe, teacher_NC: Tensor, member_NC: Tensor | None, pool: tuple[float, float] | None
) -> Targets:
    """Targets and weights from log-probabilities (nats, float64); the last of the C columns is no token.

    `pool`: the weights of teacher and member, as given or fitted.
    """
    log_p_NC = teacher_NC
    if recipe.is_pooled:
        assert member_NC is not None
        assert pool is not None
        log_p_NC = pool[0] * teacher_NC + pool[1] * member_NC
    log_p_NC = (log_p_NC / recipe.temperature).log_softmax(dim=1)
    confidence_N = log_p_NC[:, :-1].amax(dim=1).exp()
    weight_N = confidence_N**recipe.power
    if recipe.keep_fraction < 1:
        weight_N = weight_N * (confidence_N >= threshold(confidence_N, recipe.keep_fraction, largest=True))
    p_NC = log_p_NC.exp()
    if recipe.hard:
        p_NC = torch.zeros_like(p_NC).scatter(1, log_p_NC[:, :-1].argmax(dim=1, keepdim=True), 1.0)
    return Targets(p_NC=p_NC, weight_N=weight_N / weight_N.sum())


def pool_weights(recipe: Recipe, teacher_GC: Tensor, member_GC: Tensor, answer_G: Tensor) -> tuple[float, float] | None:
    """The weights of a recipe's pool: as given, or those of the least cross entropy with the answers of G gold records.

        minimise  mean_G -log p(answer) + FIT_PRIOR * |weights - 1/2|^2   over weights of 0 or more

    Their sum is free: above 1 the pool is sharper than its members. (Weighted log-linear pools: Genest & Zidek 1986.)
    """
    if not recipe.fits_pool:
        return recipe.pool
    root_2 = torch.full((2,), 0.5**0.5, dtype=torch.float64, requires_grad=True)  # weights are its squares
    optimizer = torch.optim.LBFGS([root_2], max_iter=200, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        weight_2 = root_2.square()
        log_p_GC = (weight_2[0] * teacher_GC + weight_2[1] * member_GC).log_softmax(dim=1)
        loss = -log_p_GC.gather(1, answer_G[:, None]).mean() + FIT_PRIOR * (weight_2 - 0.5).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    first, second = root_2.detach().square().tolist()
    return first, second
