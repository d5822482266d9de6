"""Runs -> arms: which runs are seeds of one setting, which arm conclusions rest on, how arms are called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.config.options import identity_options
from pipeline.config.schema import Control, KdConfig, LossConfig, OptimizerConfig, StudentConfig, TrainConfig
from pipeline.core.types import InputError
from pipeline.report.arms import ArmRuns, group_arms
from pipeline.report.runs import StudyRun, _flat, effective_options

GOLD_SIZES = {"g": 500, "small": 100, "large": 2000}


def make_run(
    role: str,
    *,
    seed: int = 1,
    kd: float = 1.0,
    rate: float = 1e-4,
    dev: float | None = None,
    test: float = 0.5,
    gold: str | None = "g",
    student: str = "w",
    control: str = "none",
    name: str | None = None,
    few_shot: int = 0,
    pool: dict[str, Any] | None = None,
) -> StudyRun:
    config = TrainConfig(
        name=name or role,
        seed=seed,
        student=StudentConfig(path="m"),
        gold_fraction=0.5,
        steps=3,
        loss=LossConfig(kd=KdConfig(weight=kd, control=Control[control])),
        optimizer=OptimizerConfig(learning_rate=rate),
    )
    inputs = {"student": student} | ({} if gold is None else {"gold": gold})
    inputs |= {"cache": repr(pool or "c")} if role in ("combined", "weak_only", "control") else {}
    options = effective_options(_flat(identity_options(config)) | {"scoring.few_shot": few_shot}, inputs)
    options = {key: value for key, value in options.items() if key not in ("name", "seed")}
    result: dict[str, Any] = {"test": {"accuracy": test}} | ({} if dev is None else {"dev": {"accuracy": dev}})
    folder = f"{role}-{seed}-{kd}-{rate}-{gold}-{few_shot}-{student}-{control}-{config.name}"
    return StudyRun(
        folder=Path(folder),
        role=role,
        name=config.name,
        seed=seed,
        config={},
        identity={},
        result=result,
        options=options,
        inputs=inputs,
        pool=pool,
        settings=repr(
            (role, config.name if role == "other" else "", sorted(options.items(), key=str), sorted(inputs.items()))
        ),
    )


def by_label(runs: list[StudyRun]) -> dict[str, ArmRuns]:
    return {of_arm.arm.label: of_arm for of_arm in group_arms(runs, GOLD_SIZES)}


def main_label(runs: list[StudyRun], role: str) -> str:
    (label,) = [a.arm.label for a in group_arms(runs, GOLD_SIZES) if a.arm.role == role and a.arm.is_main]
    return label


def test_seeds_of_a_setting_are_an_arm_in_the_order_of_roles() -> None:
    runs = [make_run("combined", seed=seed) for seed in (3, 1, 2)] + [make_run("ceiling"), make_run("teacher")]
    arms = group_arms(runs, GOLD_SIZES)
    assert [(a.arm.role, a.arm.label, a.arm.seeds) for a in arms] == [
        ("teacher", "teacher", (1,)),
        ("combined", "combined", (1, 2, 3)),
        ("ceiling", "ceiling", (1,)),
    ]
    assert [run.seed for run in arms[1].runs] == [1, 2, 3]
    assert [a.arm.kd_weight for a in arms] == [0.0, 1.0, 0.0]  # what nothing reads is no weight
    assert arms[1].arm.num_gold == 500


def test_equivalent_runs_count_once(caplog: pytest.LogCaptureFixture) -> None:
    """gold_only, trained once for each KD weight of a sweep, is one arm with one run a seed."""
    runs = [make_run("gold_only", seed=seed, kd=kd) for seed in (1, 2) for kd in (0.1, 1.0)]
    with caplog.at_level("INFO", logger="pipeline"):
        (of_arm,) = group_arms(runs, GOLD_SIZES)
    assert of_arm.arm.seeds == (1, 2)
    assert len(of_arm.runs) == 2
    assert caplog.text.count("they count as one") == 2


def test_dev_chooses_the_main_arm_of_combined_and_test_never_does() -> None:
    runs = [
        make_run("combined", kd=0.1, dev=0.70, test=0.9),
        make_run("combined", kd=0.3, dev=0.72, test=0.6),
        make_run("combined", kd=0.3, seed=2, dev=0.78, test=0.6),
        make_run("combined", kd=1.0, dev=0.74, test=0.8),
    ]
    assert main_label(runs, "combined") == "combined kd 0.3"  # mean 0.75
    without_dev = [make_run(run.role, kd=run.options["loss.kd.weight"], seed=run.seed, test=0.9) for run in runs]
    assert main_label(without_dev, "combined") == "combined kd 0.3"  # two seeds
    assert main_label([run for run in without_dev if run.seed == 1], "combined") == "combined kd 0.1"  # the first


def test_the_floor_has_the_gold_set_of_combined() -> None:
    runs = [make_run("gold_only", gold=gold, dev=dev) for gold, dev in (("small", 0.5), ("g", 0.6), ("large", 0.9))]
    assert main_label([*runs, make_run("combined", dev=0.7)], "gold_only") == "gold_only gold 500"
    assert main_label(runs, "gold_only") == "gold_only gold 2000"  # nothing to match: the largest
    assert [a.arm.num_gold for a in group_arms(runs, GOLD_SIZES)] == [500, 2000, 100]


def test_the_untrained_student_is_that_of_combined_without_examples() -> None:
    runs = [
        make_run("zero_shot", gold=None, few_shot=8, name="few_shot"),
        make_run("zero_shot", gold=None),
        make_run("zero_shot", gold=None, student="another"),
        make_run("combined"),
    ]
    arms = by_label(runs)
    main = main_label(runs, "zero_shot")
    assert arms[main].runs[0].options["scoring.few_shot"] == 0
    assert arms[main].runs[0].inputs["student"] == "w"
    assert len(arms) == 4


def test_a_control_is_the_shuffled_one_nearest_to_combined() -> None:
    runs = [
        make_run("combined", kd=0.3, dev=0.9),
        make_run("control", kd=0.3, control="smoothed"),
        make_run("control", kd=1.0, control="shuffled"),
        make_run("control", kd=0.3, control="shuffled"),
    ]
    assert main_label(runs, "control") == "shuffled kd 0.3"
    assert {a.arm.control for a in group_arms(runs, GOLD_SIZES)} == {"none", "smoothed", "shuffled"}


def test_several_settings_that_define_the_gap_are_refused() -> None:
    runs = [make_run("teacher"), make_run("teacher", rate=1e-5)]
    with pytest.raises(InputError, match="expected one setting of teacher to measure the gap by, found 2"):
        group_arms(runs, GOLD_SIZES)
    assert len(group_arms([make_run("teacher"), make_run("teacher", seed=2, kd=0.3)], GOLD_SIZES)) == 1


def test_of_two_ceilings_the_one_with_the_settings_of_combined_counts() -> None:
    """Options of a study reach all its students: trained again with another rate, it has two of each."""
    ceilings = [make_run("ceiling", rate=1e-4, dev=0.95), make_run("ceiling", rate=5e-5, dev=0.9)]
    students = [make_run("combined", rate=1e-4, dev=0.8), make_run("combined", rate=5e-5, dev=0.85)]
    assert main_label([*ceilings, *students], "ceiling") == "ceiling lr 5e-05"
    assert main_label([*ceilings, students[0]], "ceiling") == "ceiling lr 0.0001"
    assert main_label(ceilings, "ceiling") == "ceiling lr 0.0001"  # nothing to match: the best on dev


def test_labels_name_what_differs_and_are_unique() -> None:
    runs = [make_run("combined", kd=kd, rate=rate) for kd in (0.3, 1.0) for rate in (1e-5, 1e-4)]
    runs += [make_run("other", name=name) for name in ("mine", "yours")] + [make_run("teacher")]
    arms = by_label(runs)
    assert len(arms) == 7
    without = by_label([make_run("combined", kd=kd) for kd in (0.0, 1.0)])
    assert set(without) == {"combined kd 0", "combined kd 1"}  # not each option that weight 0 leaves unread
    assert "combined kd 0.3 lr 1e-05" in arms
    assert dict(arms["combined kd 0.3 lr 1e-05"].arm.differing) == {
        "loss.kd.weight": 0.3,
        "optimizer.learning_rate": 1e-5,
    }
    assert {"mine", "yours", "teacher"} <= arms.keys()
    assert arms["teacher"].arm.differing == {}
    assert not arms["mine"].arm.is_main


def pool_of(temperature: float = 1.0, *, weights: tuple[float, ...] = (0.5, 0.5), members: str = "b") -> dict[str, Any]:
    """What a pool's manifest says that it is made of."""
    return {
        "schema_version": 1,
        "pool": "logarithmic",
        "members": ["c", [members]],
        "weights": list(weights),
        "temperature": temperature,
        "tokenizer": "t",
    }


def test_pools_are_arms_whose_labels_say_in_which_setting_they_differ() -> None:
    combined = [make_run("combined", seed=seed) for seed in (1, 2)]
    one = [make_run("combined", name="pooled", pool=pool_of(), seed=seed) for seed in (1, 2)]
    found = by_label([*combined, *one])
    assert list(found) == ["combined", "pooled"]  # no hash of a cache: the name says enough
    assert [(of.arm.is_pool, of.arm.is_main, of.arm.seeds) for of in found.values()] == [
        (False, True, (1, 2)),
        (True, False, (1, 2)),
    ]
    sharp = make_run("combined", name="pooled", pool=pool_of(0.5))
    assert list(by_label([*combined, *one, sharp])) == ["combined", "pooled temperature 1", "pooled temperature 0.5"]
    heavy = make_run("combined", name="pooled", pool=pool_of(weights=(0.25, 0.75)))
    assert "pooled weights 0.25/0.75" in by_label([*combined, *one, heavy])
    others = by_label([*one, make_run("combined", name="pooled", pool=pool_of(members="z"))])
    assert all(label.startswith("pooled members ") for label in others)
    second = make_run("combined", name="pooled", pool=pool_of(members="z") | {"round": 2})
    assert list(by_label([*one, second])) == ["pooled round 1", "pooled round 2"]
    assert list(by_label(one)) == ["pooled"]
    assert list(by_label([*combined, make_run("combined", pool=pool_of())])) == ["combined", "combined pooled"]


def test_conclusions_rest_on_the_teachers_own_capture_where_there_is_one() -> None:
    pooled = make_run("combined", name="pooled", pool=pool_of(), dev=0.9)
    assert main_label([make_run("combined", dev=0.6), pooled], "combined") == "combined"
    assert main_label([pooled], "combined") == "pooled"
