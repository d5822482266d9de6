"""Resamples and ranking on made data: what is learnt is not scored, and the recipe that must win does."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from pipeline.preview.ranking import advice, as_plain, rank, table
from pipeline.preview.recipes import RECIPES, Recipe
from pipeline.preview.trials import Exam, Options, Scored, Source, resample, run_trials, splits_of

OPTIONS = Options(l2=0.02, folds=3, seed=0)
PLAIN, GATED, GOLD = (
    Recipe(name="plain", commands=("x",)),
    Recipe(name="gated", commands=("{TRAIN} keep",), keep_fraction=0.5),
    Recipe(name="gold", commands=("g",), gold_weight=3.0),
)


def source(count: int, *, seed: int) -> tuple[Source, torch.Tensor]:
    """Records of three classes that features tell apart, with a teacher that is right and sure; and the classes."""
    generator = torch.Generator().manual_seed(seed)
    answer_N = torch.randint(3, (count,), generator=generator)
    features_NP = torch.nn.functional.one_hot(answer_N, 8).double()
    features_NP += 0.7 * torch.randn(count, 8, generator=generator, dtype=torch.float64)
    p_NC = torch.full((count, 4), 0.02, dtype=torch.float64)
    p_NC[torch.arange(count), answer_N] = 0.94
    folds_N = torch.randint(3, (count,), generator=generator)
    return Source(features_NP=features_NP, teacher_NC=p_NC.log(), folds_N=folds_N, answer_N=answer_N), answer_N


def exam_of(made: Source) -> Exam:
    assert made.answer_N is not None
    is_choice_DC = torch.ones(len(made.answer_N), 4, dtype=torch.bool)
    is_choice_DC[:, -1] = False
    return Exam(features_DP=made.features_NP, answer_D=made.answer_N, is_choice_DC=is_choice_DC)


def test_the_recipe_that_must_win_wins() -> None:
    """A teacher that calls the second class the first: students of it have to learn the second class from gold."""
    corpus, answer_N = source(400, seed=0)
    wrong_C = torch.tensor([0.6, 0.36, 0.02, 0.02], dtype=torch.float64).log()
    corpus = dataclasses.replace(corpus, teacher_NC=torch.where((answer_N == 1)[:, None], wrong_C, corpus.teacher_NC))
    gold, dev = source(60, seed=1)[0], exam_of(source(300, seed=2)[0])
    trials = [run_trials([PLAIN, GATED, GOLD], corpus, gold, dev, OPTIONS, number) for number in range(3)]
    ranked = rank([PLAIN, GATED, GOLD], trials)
    assert ranked[0].recipe is GOLD
    by_name = {one.recipe.name: one for one in ranked}
    gain = by_name["gold"].difference
    assert gain is not None
    assert gain.low is not None
    assert gain.low > 0.05
    assert all(one.gradient < 1e-5 for one in ranked)


def test_without_dev_no_record_is_scored_by_what_has_learnt_it() -> None:
    """Other answers of a part of gold change no score of the other parts' students on it but by the answers alone."""
    corpus, gold = source(80, seed=0)[0], source(23, seed=1)[0]
    for number in range(2):
        splits = splits_of(gold, None, OPTIONS, number)
        assert sorted(torch.cat([split.rows for split in splits]).tolist()) == list(range(23))
        for split in splits:
            assert sorted([*split.rows.tolist(), *split.learnt.tolist()]) == list(range(23))
            assert torch.equal(split.exam.features_DP, gold.features_NP[split.rows])
    (scored,) = run_trials([GOLD], corpus, gold, None, OPTIONS, 0)
    rows = splits_of(gold, None, OPTIONS, 0)[1].rows
    assert gold.answer_N is not None
    changed = dataclasses.replace(gold, answer_N=gold.answer_N.index_fill(0, rows, 2))
    (after,) = run_trials([GOLD], corpus, changed, None, OPTIONS, 0)
    is_same = changed.answer_N == gold.answer_N
    is_same &= torch.ones(23, dtype=torch.bool).index_fill(0, rows, False)
    in_part = torch.zeros(23, dtype=torch.bool).index_fill(0, rows, True) & (gold.answer_N == 2)
    assert in_part.any()
    torch.testing.assert_close(after.nll_D[in_part], scored.nll_D[in_part])  # learnt by nobody who scored it
    assert (after.nll_D[is_same] != scored.nll_D[is_same]).all()


def test_a_recipe_without_gold_has_one_student_for_all_parts() -> None:
    corpus, gold = source(80, seed=0)[0], source(23, seed=1)[0]
    plain, _ = run_trials([PLAIN, GOLD], corpus, gold, None, OPTIONS, 0)
    (on_dev,) = run_trials([PLAIN], corpus, gold, exam_of(gold), OPTIONS, 0)
    torch.testing.assert_close(plain.nll_D, on_dev.nll_D)


def test_every_recipe_runs_and_is_the_same_again() -> None:
    corpus, gold, dev = source(60, seed=0)[0], source(20, seed=1)[0], exam_of(source(30, seed=2)[0])
    first, again = (run_trials(RECIPES, corpus, gold, dev, OPTIONS, 1) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one.nll_D, other.nll_D)
    assert [scored.pool is not None for scored in first] == [recipe.is_pooled for recipe in RECIPES]
    other = run_trials(RECIPES[:1], corpus, gold, dev, OPTIONS, 2)[0]
    assert not torch.equal(first[0].nll_D, other.nll_D)


def test_a_tie_counts_in_part_and_only_choices_count() -> None:
    gold, _ = source(3, seed=0)
    flat = dataclasses.replace(gold, teacher_NC=torch.full((3, 4), 0.25).double().log(), folds_N=torch.arange(3))
    exam = exam_of(gold)
    exam = dataclasses.replace(exam, is_choice_DC=exam.is_choice_DC.index_fill(1, torch.tensor([2]), False))
    exam = dataclasses.replace(exam, answer_D=torch.tensor([0, 1, 0]))
    (scored,) = run_trials([PLAIN], flat, gold, exam, OPTIONS, 0)
    assert scored.correct_D.tolist() == [0.5, 0.5, 0.5]  # all outcomes are equally likely, two are choices
    assert scored.nll_D.tolist() == pytest.approx([np.log(4)] * 3)


def test_resamples() -> None:
    rows = resample(60, seeds=[0, 1, 2])
    assert rows.tolist() == sorted(set(rows.tolist()))
    assert len(rows) == 50
    assert not torch.equal(rows, resample(60, seeds=[0, 2, 2]))


# ------------------------------------------------------------------------------------------- ranking


def scored(correct: list[float], *, pool: tuple[float, float] | None = None) -> Scored:
    values = torch.tensor(correct, dtype=torch.float64)
    return Scored(correct_D=values, nll_D=1 - values, gradient=0.0, pool=pool)


def test_differences_are_paired() -> None:
    """Records differ widely and so do resamples, but the recipes hardly: the interval is that of the difference."""
    rng = np.random.default_rng(0)
    base = rng.integers(0, 2, (4, 400)).astype(float)
    gain = np.where(rng.random((4, 400)) < 0.05, 1 - base, 0)
    trials = [[scored(row.tolist()), scored((row + more).tolist())] for row, more in zip(base, gain, strict=True)]
    first, second = rank([PLAIN, GATED], trials)
    assert (first.recipe, second.recipe) == (GATED, PLAIN)
    assert second.difference is None
    difference = first.difference
    assert difference is not None
    assert difference.low is not None
    assert difference.high is not None
    assert difference.value == pytest.approx(gain.mean())
    error = (gain.mean(axis=0).var() / 400 + gain.mean(axis=1).var(ddof=1) / 4) ** 0.5
    assert 0.7 < (difference.high - difference.low) / (2 * 1.96 * error) < 1.5
    assert first.by_resample == pytest.approx((base + gain).mean(axis=1).tolist())


def test_the_best_is_named_with_its_command() -> None:
    trials = [[scored([1.0, 0.0, 0.0, 1.0]), scored([1.0, 1.0, 0.0, 1.0])]] * 2
    ranked = rank([PLAIN, GATED], trials)
    assert [line.split()[1] for line in table(ranked)[1:]] == ["gated", "plain"]
    fields = {"TRAIN": "python scripts/train.py study=mine"}
    lines = advice(ranked, fields)
    best = lines.index("The best: gated. Train it:")
    assert lines[best + 2] == "    python scripts/train.py study=mine keep"
    assert any("contains 0: the ranking does not settle" in line for line in lines)
    assert as_plain(ranked[0], fields)["accuracy"] == 0.75
