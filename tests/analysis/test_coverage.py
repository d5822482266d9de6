"""95 % intervals contain the truth in 95 % of simulated studies: scores, differences, PGR, excess imitation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from pipeline.analysis.bootstrap import Rate, Ratio, difference, interval_of, rates
from pipeline.analysis.gap import performance_gap_recovered
from pipeline.analysis.imitation import cells, choice_shares, ratios
from pipeline.analysis.values import Interval
from support.simulated_study import STUDENTS, TrueStudy, simulate, study_of

SETTINGS = [(seeds, num_records) for seeds in (3, 5) for num_records in (500, 1500)]
NUM_STUDIES, BATCH = 1000, 50
ROLES = ("teacher", "gold_only", "combined", "ceiling")


def noisy_study(seeds: int, num_records: int, seed_noise: float) -> TrueStudy:
    trained = [replace(arm, seed_noise=seed_noise) for arm in STUDENTS if arm.role in ROLES]
    return study_of(trained, seeds=seeds, num_records=num_records)


def simulated_rates(study: TrueStudy, first_seed: int) -> Iterator[dict[str, Rate]]:
    """Scores and imitation of a batch of simulated studies: one dictionary each, by role and by `copied ROLE`."""
    wanted: list[Ratio] = []
    score_RM: list[np.ndarray] = []
    for seed in range(first_seed, first_seed + BATCH):
        arms = {arm.arm.role: arm for arm in simulate(study, seed)[0]}
        teacher_M, teacher_MC = arms["teacher"].credit_RM[0], choice_shares(arms["teacher"], study.num_choices)[0]
        copied = [cells(arms[role], teacher_MC, teacher_M) for role in ("gold_only", "combined")]
        wanted.append(ratios([f"{seed} gold_only", f"{seed} combined"], copied, teacher_M)[0])
        score_RM += [arms[role].credit_RM for role in ROLES]
    arm_labels = [f"{seed} {role}" for seed in range(first_seed, first_seed + BATCH) for role in ROLES]
    scores, *copied_rates = rates(
        [Ratio(arm_labels=arm_labels, values_RM=score_RM, weight_M=np.ones(study.num_records)), *wanted]
    )
    for i, (gold_only, combined) in enumerate(copied_rates):
        own = scores[i * len(ROLES) : (i + 1) * len(ROLES)]
        yield {**dict(zip(ROLES, own, strict=True)), "copied gold_only": gold_only, "copied combined": combined}


def figures(rate: dict[str, Rate]) -> dict[str, Interval]:
    return {
        "score": interval_of(rate["combined"]),
        "difference": difference(rate["combined"], rate["gold_only"]),
        "pgr": performance_gap_recovered(rate["combined"], rate["teacher"], rate["ceiling"]),
        "excess": difference(rate["copied combined"], rate["copied gold_only"]),
    }


def truth(study: TrueStudy) -> dict[str, float]:
    combined, gold_only = study.arm("combined"), study.arm("gold_only")
    return {
        "score": combined.accuracy,
        "difference": combined.accuracy - gold_only.accuracy,
        "pgr": study.true_pgr("combined"),
        "excess": combined.imitation - gold_only.imitation,
    }


@pytest.mark.slow(minutes=1)
@pytest.mark.parametrize("seed_noise", [0.0, 0.01])
def test_intervals_cover_the_truth(seed_noise: float) -> None:
    """Over 1,000 studies, a quarter each of 3 or 5 seeds and 500 or 1,500 records, with and without a seed noise of one
    point, within the binomial error: 2.73 standard errors, as there are eight comparisons (Bonferroni, 5 % in all)."""
    hits, first_seed = Counter[str](), round(1e8 * seed_noise)  # no two studies share random numbers
    for seeds, num_records in SETTINGS:
        study = noisy_study(seeds, num_records, seed_noise)
        expected = truth(study)
        for _ in range(NUM_STUDIES // len(SETTINGS) // BATCH):
            for rate in simulated_rates(study, first_seed):
                for name, found in figures(rate).items():
                    assert found.low is not None
                    assert found.high is not None
                    hits[name] += found.low <= expected[name] <= found.high
            first_seed += BATCH
    tolerance = 2.73 * (0.95 * 0.05 / NUM_STUDIES) ** 0.5
    coverage = {name: count / NUM_STUDIES for name, count in hits.items()}
    assert coverage == pytest.approx(dict.fromkeys(coverage, 0.95), abs=tolerance)
