"""Every recipe on every resample of the data: linear students trained, and scored on held-out records."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.core.seeds import seed_from_values
from pipeline.preview.linear import Lesson, LinearStudent, cross_fitted, fit
from pipeline.preview.recipes import POOL_GOLD, Recipe, Targets, pool_weights, targets_of

KEPT_FRACTION = 5 / 6  # of the records, in a resample
GOLD_PARTS = 4  # without dev, gold is scored in so many parts, each by students that learnt the others


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Source:
    """Records to learn from: N of them, with reduced features."""

    features_NP: Tensor
    teacher_NC: Tensor
    """float64, nats: the teacher's log-probabilities."""
    folds_N: Tensor
    """int64: the fold of each record's sequence."""
    answer_N: Tensor | None = None
    """int64: of gold, the outcome that is true."""

    def select(self, rows: Tensor) -> Source:
        """Some of the records."""
        answer_N = None if self.answer_N is None else self.answer_N[rows]
        return Source(
            features_NP=self.features_NP[rows],
            teacher_NC=self.teacher_NC[rows],
            folds_N=self.folds_N[rows],
            answer_N=answer_N,
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Exam:
    """D held-out records with their answers."""

    features_DP: Tensor
    answer_D: Tensor
    """int64: the outcome that is true."""
    is_choice_DC: Tensor
    """bool: the outcomes that are choices of the record; never the last one."""

    def select(self, rows: Tensor) -> Exam:
        """Some of the records."""
        return Exam(
            features_DP=self.features_DP[rows], answer_D=self.answer_D[rows], is_choice_DC=self.is_choice_DC[rows]
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scored:
    """A recipe on one resample."""

    correct_D: Tensor
    """float64: 1 where the likeliest choice is the answer, shared where several are equally likely; else 0."""
    nll_D: Tensor
    """float64, nats: of the answer, among all outcomes."""
    gradient: float
    """The largest `LinearStudent.gradient` of its students."""
    pool: tuple[float, float] | None
    """The weights of its pool."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Split:
    """Gold records to learn, and what is scored then."""

    learnt: Tensor
    exam: Exam
    rows: Tensor
    """int64: the records of the exam, as rows of dev or of gold."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How students are trained."""

    l2: float
    folds: int
    seed: int


def run_trials(
    recipes: Sequence[Recipe], corpus: Source, gold: Source, dev: Exam | None, options: Options, number: int
) -> list[Scored]:
    """The score of each recipe, in order, on the resample of a number; without `dev` on gold, by cross-validation."""
    corpus = corpus.select(resample(len(corpus.folds_N), seeds=[options.seed, number, 0]))
    splits = splits_of(gold, dev, options, number)
    scored = list[list[Scored]]()
    without_gold: dict[str, LinearStudent] = {}
    for split in splits:
        own = gold.select(split.learnt)
        member_NC, of_gold_GC = members(corpus, own, options)
        scored.append([])
        for recipe in recipes:
            pool = pool_weights(recipe, own.teacher_NC, of_gold_GC, _answers(own))
            student = without_gold.get(recipe.name)
            if student is None:
                targets = targets_of(recipe, corpus.teacher_NC, member_NC, pool)
                start = without_gold.get(recipes[0].name)  # the optimum of another recipe lies near its own
                student = learn(recipe, corpus, targets, own, l2=options.l2, start=start)
                if not recipe.reads_gold:
                    without_gold[recipe.name] = student
            scored[-1].append(score(student, split.exam, pool))
    return [_joined([of_split[place] for of_split in scored], splits) for place in range(len(recipes))]


def members(corpus: Source, gold: Source, options: Options) -> tuple[Tensor, Tensor]:
    """float64 [N, C] and [G, C], nats: cross-fitted students, which learn gold too, at corpus and gold."""
    known_GC = _one_hot(gold)
    lessons = [
        Lesson(features_NP=corpus.features_NP, targets_NC=corpus.teacher_NC.exp(), folds_N=corpus.folds_N),
        Lesson(features_NP=gold.features_NP, targets_NC=known_GC, folds_N=gold.folds_N, weight=POOL_GOLD),
    ]
    member_NC, of_gold_GC = cross_fitted(lessons, folds=options.folds, l2=options.l2)
    return member_NC, of_gold_GC


def learn(
    recipe: Recipe, corpus: Source, targets: Targets, gold: Source, *, l2: float, start: LinearStudent | None
) -> LinearStudent:
    """The student of a recipe: mean cross entropy over the corpus, and `gold_weight` times that over gold."""
    if recipe.gold_weight == 0:
        return fit(corpus.features_NP, targets.p_NC, targets.weight_N, l2=l2, start=start)
    known_GC = _one_hot(gold)
    weight_G = torch.full((len(known_GC),), recipe.gold_weight / len(known_GC), dtype=torch.float64)
    return fit(
        torch.cat([corpus.features_NP, gold.features_NP]),
        torch.cat([targets.p_NC, known_GC]),
        torch.cat([targets.weight_N, weight_G]),
        l2=l2,
        start=start,
    )


def score(student: LinearStudent, exam: Exam, pool: tuple[float, float] | None) -> Scored:
    """Accuracy and negative log-likelihood of each held-out record."""
    log_q_DC = student.log_probs(exam.features_DP)
    among_DC = log_q_DC.masked_fill(~exam.is_choice_DC, -torch.inf)
    is_best_DC = among_DC == among_DC.amax(dim=1, keepdim=True)
    answer_D1 = exam.answer_D[:, None]
    return Scored(
        correct_D=is_best_DC.gather(1, answer_D1)[:, 0].double() / is_best_DC.sum(dim=1),
        nll_D=-log_q_DC.gather(1, answer_D1)[:, 0],
        gradient=student.gradient,
        pool=pool,
    )


# ------------------------------------------------------------------------------------------- resamples


def resample(count: int, *, seeds: Sequence[int]) -> Tensor:
    """int64, ascending: a random part of `count` rows without replacement; a function of the seeds."""
    generator = torch.Generator().manual_seed(seed_from_values(*seeds))
    kept = max(round(KEPT_FRACTION * count), 1)
    return torch.randperm(count, generator=generator)[:kept].sort().values


def splits_of(gold: Source, dev: Exam | None, options: Options, number: int) -> list[Split]:
    """Dev, after a part of gold; without dev each of a few parts of gold, after the others."""
    count = len(gold.folds_N)
    if dev is not None:
        learnt = resample(count, seeds=[options.seed, number, 1])
        return [Split(learnt=learnt, exam=dev, rows=torch.arange(len(dev.answer_D)))]
    is_choice_DC = torch.ones(gold.teacher_NC.shape, dtype=torch.bool)
    is_choice_DC[:, -1] = False
    exam = Exam(features_DP=gold.features_NP, answer_D=_answers(gold), is_choice_DC=is_choice_DC)
    generator = torch.Generator().manual_seed(seed_from_values(options.seed, number, 1))
    splits = []
    for rows in torch.randperm(count, generator=generator).tensor_split(GOLD_PARTS):
        is_learnt_G = torch.ones(count, dtype=torch.bool).index_fill(0, rows, False)
        splits.append(Split(learnt=is_learnt_G.nonzero()[:, 0], exam=exam.select(rows), rows=rows))
    return splits


def _joined(scored: Sequence[Scored], splits: Sequence[Split]) -> Scored:
    """The scores of all splits in the order of the records."""
    place = torch.cat([split.rows for split in splits]).argsort()
    return Scored(
        correct_D=torch.cat([one.correct_D for one in scored])[place],
        nll_D=torch.cat([one.nll_D for one in scored])[place],
        gradient=max(one.gradient for one in scored),
        pool=mean_pool([one.pool for one in scored if one.pool is not None]),
    )


def mean_pool(pools: Sequence[tuple[float, float]]) -> tuple[float, float] | None:
    """The mean of pool weights; None of none."""
    if not pools:
        return None
    first, second = (sum(weights) / len(pools) for weights in zip(*pools, strict=True))
    return first, second


def _answers(gold: Source) -> Tensor:
    assert gold.answer_N is not None
    return gold.answer_N


def _one_hot(gold: Source) -> Tensor:
    return torch.nn.functional.one_hot(_answers(gold), gold.teacher_NC.shape[1]).double()
