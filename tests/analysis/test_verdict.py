"""Each rule of the verdict by figures made for it, its thresholds from both sides, and the commands that it prints."""

from __future__ import annotations

import dataclasses
import shlex
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from pipeline.analysis.curve_ends import FALL_ERRORS, FALL_FRACTION, FALL_NATS, LAST_FRACTION
from pipeline.analysis.evidence import shortened
from pipeline.analysis.findings import ASSUMED_SEED_SD
from pipeline.analysis.values import ArmFigures, Example, Interval, StudyFigures, Verdict
from pipeline.analysis.verdict import RULES, verdict
from pipeline.config.commands import StudyConfig
from pipeline.config.compose import study_arguments
from pipeline.config.options import options
from pipeline.config.schema import TrainConfig
from pipeline.study.plan import grid_settings
from support.commands import ROOT
from support.study_values import arm, curves, imitation, interval, slice_of, study

TEACHER = arm("teacher", 0.8, seeds=(1,))
GOLD_ONLY = arm("gold_only", 0.8)
LOW, EVEN, UP = interval(-0.03), interval(0.0), interval(0.03)


def combined(over_gold: Interval = EVEN, over_teacher: Interval = EVEN, score: float = 0.8, **rest: Any) -> ArmFigures:
    against = {"gold_only": over_gold, "teacher": over_teacher} | rest.pop("against", {})
    return arm("combined", score, against=against, **rest)


OWN = "python scripts/study.py study=mine"


def rule_of(found: Verdict) -> str:
    """The name of the rule that applied, by its words in the last line of evidence."""
    return next(rule.name for rule in RULES if found.evidence[-1].endswith(f": {rule.when}"))


def copied_class(teacher: float = 0.02, copied: float = 0.9, score: float = 0.1, records: int = 100) -> StudyFigures:
    """Combined as good as gold_only and better than the teacher, but for one class."""
    part = slice_of("Arts", score, teacher=teacher, copied=copied, records=records)
    gold = slice_of("Arts", 0.7, teacher=teacher, copied=0.1, records=records)
    student = combined(EVEN, UP, imitation=imitation(0.5, excess=interval(0.2)), slices=(part,))
    return study(TEACHER, arm("gold_only", 0.8, slices=(gold,)), student)


def guessing(share: int = 200, over_gold: Interval = EVEN, with_gold: bool = True) -> StudyFigures:
    """A teacher with 20 % right, where the most frequent answer is right for `share` of 1,000 records."""
    part = slice_of("Arts", 0.2, teacher=0.2, copied=0.1, records=share)
    teacher, gold = arm("teacher", 0.2, seeds=(1,), slices=(part,)), [GOLD_ONLY] if with_gold else []
    return study(teacher, *gold, combined(over_gold, interval(0.6)))


def too_high(excess: Interval | None = UP, over_gold: Interval = LOW, lower: Interval = EVEN) -> StudyFigures:
    student = combined(over_gold, against={"lower kd": lower}, imitation=imitation(0.5, excess=excess))
    return study(TEACHER, GOLD_ONLY, student)


def too_low(over_weak: Interval = LOW, higher: Interval = EVEN) -> StudyFigures:
    above = arm("combined", 0.8, label="kd 3", kd_weight=3.0, is_main=False, against={"lower kd": higher})
    weak = arm("weak_only", 0.83)
    return study(TEACHER, GOLD_ONLY, weak, combined(UP, EVEN, against={"weak_only": over_weak}), above)


def plateau(over_teacher: Interval = EVEN, copied: float = 0.8, kl: float = 0.02) -> StudyFigures:
    student = combined(EVEN, over_teacher, imitation=imitation(copied, excess=interval(0.3)))
    return study(TEACHER, GOLD_ONLY, student, training=(curves("combined", kd_at_T1=[2.0] * 5 + [kl] * 20),))


def healthy(over_gold: Interval = UP, over_teacher: Interval = UP, weak: Interval = EVEN, **rest: Any) -> StudyFigures:
    student = combined(over_gold, over_teacher, against={"weak_only": weak, **rest}, imitation=imitation(0.3))
    shuffled = arm("control", 0.8, label="shuffled", control="shuffled")
    return study(TEACHER, GOLD_ONLY, arm("weak_only", 0.83), student, *([shuffled] if rest else []))


def falling(end: float) -> list[float | None]:
    """From 2 nats along a line."""
    return [2.0 + (end - 2.0) * step / 50 for step in range(51)]


def early(loss: list[float | None] | None = None, copied: float = 0.2) -> StudyFigures:
    student = combined(EVEN, interval(-0.1), score=0.7, imitation=imitation(copied))
    return study(TEACHER, GOLD_ONLY, student, training=(curves("combined", lm=loss or falling(0.8)),))


def overfit(gold: float = 0.01, dev: float = 0.6, over_weak: Interval = EVEN) -> StudyFigures:
    student = combined(UP, UP, against={"weak_only": over_weak})
    training = curves("combined", lm=[1.0] * 10 + [gold] * 20, dev_nll=[None] * 9 + [0.6, 0.5, dev])
    padded = {key: values + (None,) * (30 - len(values)) for key, values in training.curves.items()}
    return study(
        TEACHER, GOLD_ONLY, arm("weak_only", 0.83), student, training=(dataclasses.replace(training, curves=padded),)
    )


def nothing_in_it(shuffled: Interval = EVEN) -> StudyFigures:
    student = combined(UP, UP, against={"shuffled": shuffled})
    return study(TEACHER, GOLD_ONLY, student, arm("control", 0.83, label="shuffled", control="shuffled"))


def no_better_than_zero_shot(over_zero: Interval = EVEN) -> StudyFigures:
    teacher = arm("teacher", 0.8, seeds=(1,), against={"zero_shot": over_zero})
    return study(teacher, GOLD_ONLY, combined(EVEN, interval(0.05)), arm("zero_shot", 0.8))


def supervised_alone(loss: float = 0.01) -> StudyFigures:
    return study(TEACHER, GOLD_ONLY, training=(curves("gold_only", lm=[1.0] * 10 + [loss] * 20),))


def one_seed(seeds: tuple[int, ...] = (1,)) -> StudyFigures:
    return study(TEACHER, arm("gold_only", 0.8, seeds=seeds), combined(EVEN, interval(0.05), seeds=seeds))


BUILT = {  # by rule: the study built for it
    "a teacher at chance": guessing(),
    "a copied class": copied_class(),
    "copied errors": too_high(),
    "memorised gold": overfit(),
    "more teacher is better": too_low(),
    "equal to the teacher": plateau(),
    "better than labels and teacher": healthy(),
    "training ended early": early(),
    "no knowledge in the teacher": nothing_in_it(),
    "harm without copying": too_high(excess=EVEN, over_gold=LOW),
    "labels exhausted, no combined student yet": supervised_alone(),
    "runs are missing": study(TEACHER, combined()),
    "one seed": one_seed(),
    "small differences": one_seed((1, 2, 3)),
}


def test_the_table_has_every_code_and_unique_names() -> None:
    assert {rule.code for rule in RULES} == {
        "KD_TOO_HIGH",
        "KD_TOO_LOW",
        "IMITATION_PLATEAU",
        "BAD_TEACHER",
        "UNDERTRAINED",
        "GOLD_OVERFIT",
        "HEALTHY",
        "INCONCLUSIVE",
    }
    assert [rule.name for rule in RULES] == list(BUILT)


@pytest.mark.parametrize("name", BUILT)
def test_each_rule_is_reached_by_the_study_built_for_it(name: str) -> None:
    found = verdict(BUILT[name])
    assert (rule_of(found), found.code) == (name, next(rule.code for rule in RULES if rule.name == name))
    assert "{" not in found.headline
    assert found.cause
    assert found.action


@pytest.mark.parametrize(
    ("beyond", "name"),
    [
        (guessing(share=140), "a teacher at chance"),  # 20 % right is 6 points above, and significantly so
        (guessing(over_gold=UP), "a teacher at chance"),
        (guessing(with_gold=False), "a teacher at chance"),
        (copied_class(teacher=0.6), "a copied class"),
        (copied_class(copied=0.4), "a copied class"),
        (copied_class(score=0.55), "a copied class"),  # 15 points below gold_only
        (copied_class(records=19), "a copied class"),
        (too_high(excess=EVEN), "copied errors"),
        (too_high(over_gold=EVEN), "copied errors"),
        (overfit(gold=0.06), "memorised gold"),
        (overfit(dev=0.54), "memorised gold"),
        (overfit(over_weak=UP), "memorised gold"),
        (too_low(over_weak=EVEN), "more teacher is better"),
        (plateau(over_teacher=UP), "equal to the teacher"),
        (plateau(over_teacher=interval(0.021, 0.05)), "equal to the teacher"),
        (plateau(over_teacher=interval(-0.021)), "equal to the teacher"),
        (plateau(copied=0.5), "equal to the teacher"),
        (plateau(kl=0.15), "equal to the teacher"),
        (healthy(over_gold=EVEN), "better than labels and teacher"),
        (healthy(over_teacher=EVEN), "better than labels and teacher"),
        (healthy(weak=LOW), "better than labels and teacher"),
        (healthy(shuffled=EVEN), "better than labels and teacher"),
        (early([2.0] + [0.5] * 50), "training ended early"),
        (early(copied=0.9), "training ended early"),
        (nothing_in_it(UP), "no knowledge in the teacher"),
        (no_better_than_zero_shot(UP), "no knowledge in the teacher"),
        (too_high(excess=EVEN, over_gold=EVEN), "harm without copying"),
        (supervised_alone(loss=0.06), "labels exhausted, no combined student yet"),
    ],
)
def test_each_threshold_is_a_border(beyond: StudyFigures, name: str) -> None:
    """The study of a rule, moved over one threshold, is no longer judged by it."""
    assert rule_of(verdict(beyond)) != name


def test_the_other_ways_into_a_rule() -> None:
    assert verdict(too_high(over_gold=EVEN, lower=LOW)).code == "KD_TOO_HIGH"
    assert verdict(too_low(over_weak=EVEN, higher=UP)).code == "KD_TOO_LOW"
    assert verdict(early([2.0] + [1.2] * 50)).code == "UNDERTRAINED"  # 60 % of the first loss is left
    assert verdict(no_better_than_zero_shot()).code == "BAD_TEACHER"
    assert verdict(healthy(shuffled=UP)).code == "HEALTHY"


def test_plain_text_is_judged_without_choices() -> None:
    """Metric -nll: no imitation, no calibration; differences in nats."""
    arms = [TEACHER, GOLD_ONLY, combined(UP, UP)]
    found = verdict(study(*arms, metric="-nll"))
    assert found.code == "HEALTHY"
    assert "combined - gold_only: +0.030 nats [+0.020, +0.040]" in found.evidence
    assert "imitation (teacher wrong, student equal): not measured" in found.evidence


def test_a_kd_weight_of_zero_is_not_judged_but_the_smallest_other_one() -> None:
    none = arm("combined", 0.83, label="kd 0", kd_weight=0.0, against={"gold_only": UP, "teacher": UP})
    some = {"kd_weight": 0.3, "label": "kd 0.3", "is_main": False}
    lower = {"lower kd": LOW}
    assert verdict(study(TEACHER, GOLD_ONLY, none)).code == "HEALTHY"  # nothing else to judge
    found = verdict(study(TEACHER, GOLD_ONLY, none, combined(UP, UP, **some)))
    assert found.code == "INCONCLUSIVE"  # above both, but dev prefers to go without it
    copies = combined(EVEN, UP, against=lower, imitation=imitation(0.5, excess=UP), **some)
    of_main = Example(kind="copied", prompt="Tundra", truth="Geography", answers={"teacher": "Biology"})
    found = verdict(study(TEACHER, GOLD_ONLY, none, copies, examples=(of_main,)))
    assert "KD weight 0.3 is too high" in found.headline
    assert "judged: kd 0.3" in found.evidence
    assert not any("Tundra" in line for line in found.evidence)  # an answer of the other arm
    assert not any(line.startswith("judged:") for line in verdict(too_high()).evidence)


def test_evidence_names_the_class_and_shows_its_examples() -> None:
    other = Example(kind="copied", prompt="Tundra", truth="Geography", answers={"teacher": "Biology"})
    own = Example(
        kind="copied", prompt="Ode\n" + "x" * 99, truth=" Arts", answers={"teacher": "Biology", "combined": "Biology"}
    )
    mended = Example(kind="corrected", prompt="Sonata", truth="Arts", answers={})
    found = verdict(dataclasses.replace(copied_class(), examples=(other, mended, own)))
    assert found.headline == "The student copies the teacher's systematic error on Arts: KD weight 1 is too high."
    assert found.evidence[0] == (
        "class Arts: teacher 2 % right, gold_only 70 %, combined 10 %; it repeats 90 % of the teacher's errors there"
    )
    assert found.evidence[1] == f'copied: "Ode {"x" * 53}..." is Arts; teacher: Biology, combined: Biology'
    assert found.evidence[2].startswith('copied: "Tundra"')
    assert len(shortened(own.prompt)) == 60
    assert not any("Sonata" in line for line in found.evidence)


def test_braces_in_a_class_are_text() -> None:
    part = slice_of("{x}", 0.1, teacher=0.0, copied=0.9)
    gold = arm("gold_only", 0.8, slices=(slice_of("{x}", 0.7, teacher=0.0, copied=0.1),))
    student = combined(imitation=imitation(0.5, excess=UP), slices=(part,))
    assert "error on {x}" in verdict(study(TEACHER, gold, student)).headline


# ------------------------------------------------------------------------------------------ commands


def parsed(command: str) -> dict[str, Any]:
    """The options of a printed command as a shell, the study and Hydra read them; the study has to know each.

    Of a grid, here always of one option: its name in full, and its values.
    """
    words = shlex.split(command)
    assert words[:2] == ["python", "scripts/study.py"]
    parser = OverridesParser.create()
    values = {one.key_or_group: one.value() for one in parser.parse_overrides(study_arguments(words[2:]))}
    names = [word.partition("=")[0] for word in words[2:]]
    assert len(names) == len(set(names)), "an option is given twice"
    grid = [setting for (setting,) in grid_settings([str(axis) for axis in values.get("grid", [])])]
    of_students = parser.parse_overrides([*map(str, values.get("overrides", [])), *grid])
    train = {name for name, _, _ in options(TrainConfig)}
    assert {one.key_or_group for one in of_students} <= train
    assert values.keys() <= {name for name, _, _ in options(StudyConfig)}
    values["seeds"] = [int(seed) for seed in values.get("seeds", [])]
    return {**values, "grid": [parser.parse_override(setting).value() for setting in grid], "of": grid}


@pytest.mark.parametrize("name", BUILT)
def test_every_command_is_one_that_the_study_takes(name: str) -> None:
    assert parsed(verdict(dataclasses.replace(BUILT[name], command=OWN)).command)["study"] == "mine"
    with_seeds = dataclasses.replace(BUILT[name], command=f"{OWN} 'seeds=[1,2,3]' grid=kd_weight:1")
    assert parsed(verdict(with_seeds).command)["seeds"][:3] == [1, 2, 3]


@pytest.mark.parametrize(("lm_weight", "kd_weight"), [(1.0, 1.0), (0.3, 1.0), (0.3, 10.0), (0.0, 1.0), (1.0, 0.1)])
def test_a_kd_weight_too_high_leads_to_lower_ones(lm_weight: float, kd_weight: float) -> None:
    """All below the present one, and one of them below the LM weight, where labels outweigh a wrong teacher."""
    student = combined(LOW, imitation=imitation(0.5, excess=UP), lm_weight=lm_weight, kd_weight=kd_weight)
    values = parsed(verdict(study(TEACHER, GOLD_ONLY, student)).command)
    assert values["seeds"] == [1, 2, 3]
    assert all(setting.startswith("loss.kd.weight=") for setting in values["of"])
    assert len(set(values["grid"])) == 3
    assert max(values["grid"]) < kd_weight / 2
    assert lm_weight == 0 or min(values["grid"]) < lm_weight / 2


def test_a_kd_weight_too_low_leads_to_higher_ones() -> None:
    assert "grid=kd_weight:3,9" in verdict(too_low()).command
    assert "grid=kd_weight:3,9" in verdict(too_low(over_weak=EVEN, higher=UP)).command  # the better one was 3


def test_seeds_are_added_until_there_are_five_and_then_a_control() -> None:
    assert verdict(one_seed()).command.endswith("seeds=1,2,3")
    assert verdict(one_seed((7, 8))).command.endswith("seeds=7,8,1")
    assert verdict(one_seed((1, 2, 3))).command.endswith("seeds=1,2,3,4,5")
    assert verdict(one_seed((1, 2, 3, 4, 5))).command.endswith("seeds=1,2,3,4,5 'controls=[shuffled]'")


def test_longer_training_counts_in_epochs_where_they_are_known() -> None:
    assert "grid=epochs:4,8" in verdict(dataclasses.replace(early(), counts={"epochs": 2})).command
    assert "'experiments=[combined]' epochs=null steps=102" in verdict(early()).command


CHOSEN = {  # of an arm that a grid made, beside inputs and what no grid can set
    "loss.kd.weight": 0.3,
    "loss.kd.gate.drop_wrong": True,
    "loss.kd.gate.max_entropy": None,
    "loss.lm.on": ["gold"],
    "gold": 500,
    "cache": "0123abcd",
}


def chosen(figures: StudyFigures, **options: Any) -> dict[str, Any]:
    """The options of the command that is printed where the judged arm is one of a grid."""
    own = f"{OWN} grid='kd_weight:0.1,0.3,1'"
    arms = tuple(
        dataclasses.replace(
            one, arm=dataclasses.replace(one.arm, **({"kd_weight": 0.3, "differing": CHOSEN} | options))
        )
        if one.arm.role == "combined"
        else one
        for one in figures.main.arms
    )
    main = dataclasses.replace(figures.main, arms=arms)
    command = verdict(dataclasses.replace(figures, main=main, command=own)).command
    values = words(command)
    assert values["study"] == "mine"
    return values


def words(command: str) -> dict[str, Any]:
    pairs = [word.partition("=") for word in shlex.split(command)[2:]]
    assert len({name for name, _, _ in pairs}) == len(pairs)
    return {name: value for name, _, value in pairs}


SETTINGS = "loss.kd.weight:0.3;loss.kd.gate.drop_wrong:true"


def test_a_grid_and_more_seeds_repeat_the_settings_of_the_judged_arm() -> None:
    epochs = dataclasses.replace(early(), counts={"epochs": 2})
    assert chosen(epochs)["grid"] == f"epochs:4,8;{SETTINGS}"
    assert chosen(one_seed()) == {"study": "mine", "seeds": "1,2,3", "grid": SETTINGS}
    assert chosen(plateau())["grid"] == f"loss.kd.gate.keep_fraction:0.5,0.8;{SETTINGS}"
    lower = chosen(too_high())["grid"]
    assert lower == "kd_weight:0.01,0.03,0.1;loss.kd.gate.drop_wrong:true"  # the weight is what the grid varies
    assert (
        "'grid=kd_weight:0.01,0.03,0.1;loss.kd.gate.drop_wrong:true'"
        in verdict(dataclasses.replace(too_high_of_grid(), command=OWN)).command
    )
    (setting, *_) = grid_settings(study_grid(lower))
    assert setting == ("loss.kd.weight=0.01", "loss.kd.gate.drop_wrong=true")


def too_high_of_grid() -> StudyFigures:
    student = combined(LOW, imitation=imitation(0.5, excess=UP), kd_weight=0.3, differing=CHOSEN)
    return study(TEACHER, GOLD_ONLY, student)


def study_grid(value: str) -> list[str]:
    """The axes as the study reads them."""
    (argument,) = study_arguments([f"grid={value}"])
    return [str(axis) for axis in OverridesParser.create().parse_override(argument).value()]


def test_a_control_and_more_steps_have_the_settings_of_the_judged_arm_too() -> None:
    """As options of combined alone, because a grid does not reach controls; its own grid is not repeated for them."""
    own = {"study": "mine", "experiments": "[combined]", "loss.kd.weight": "0.3", "loss.kd.gate.drop_wrong": "true"}
    five = chosen(one_seed((1, 2, 3, 4, 5)))
    assert five == own | {"controls": "[shuffled]", "seeds": "1,2,3,4,5"}
    assert chosen(early()) == own | {"seeds": "1,2,3", "epochs": "null", "steps": "102"}
    assert (
        "'experiments=[combined]' 'controls=[shuffled]'"
        in verdict(
            dataclasses.replace(
                study(TEACHER, GOLD_ONLY, combined(EVEN, seeds=(1, 2, 3, 4, 5), differing=CHOSEN)), command=OWN
            )
        ).command
    )


def test_a_length_in_steps_excludes_epochs() -> None:
    """Of a grid of both, only one decides."""
    grid = chosen(too_high(), differing={"steps": 100, "epochs": None})["grid"]
    assert grid.endswith(";steps:100;epochs:null")
    epochs = dataclasses.replace(early(), counts={"epochs": 2})
    assert chosen(epochs, differing={"steps": 100, "epochs": None})["grid"] == "epochs:4,8"


def test_missing_runs_are_made_by_the_study_as_it_is() -> None:
    assert chosen(study(TEACHER, combined()))["grid"] == "kd_weight:0.1,0.3,1"


def test_options_of_a_pool_go_where_no_pool_is_asked_for() -> None:
    """The study refuses them there; a command that still trains pooled keeps them."""
    own = f"{OWN} 'experiments=[combined,pooled]' folds=3 pool.temperature=0.5 'controls=[smoothed]'"
    kept = words(verdict(dataclasses.replace(too_high(), command=own)).command)
    assert (kept["folds"], kept["pool.temperature"]) == ("3", "0.5")
    five = study(TEACHER, GOLD_ONLY, combined(EVEN, seeds=(1, 2, 3, 4, 5), differing=CHOSEN))
    alone = words(verdict(dataclasses.replace(five, command=own)).command)
    assert alone["experiments"] == "[combined]"
    assert not alone.keys() & {"folds", "pool.temperature"}


def test_a_judged_pool_is_repeated_as_the_pool_that_it_is() -> None:
    """A grid, and more seeds, are then of pooled alone, with the options that tell it from other pools."""
    differing = {"pool.weights": "0.3/0.7", "pool.temperature": 0.5, "pool.members": "0123abcd"}
    options = {"is_pool": True, "differing": differing, "imitation": imitation(0.5, excess=UP)}
    figures = study(TEACHER, GOLD_ONLY, combined(LOW, **options))
    found = words(verdict(dataclasses.replace(figures, command=f"{OWN} 'experiments=[gold_only,pooled]'")).command)
    of_pool = {"experiments": "[pooled]", "pool.weights": "[0.3,0.7]", "pool.temperature": "0.5"}
    assert found == {"study": "mine", "seeds": "1,2,3", **of_pool, "grid": "kd_weight:0.03,0.1,0.3"}
    seeds = study(TEACHER, GOLD_ONLY, combined(EVEN, seeds=(1,), is_pool=True))
    assert words(verdict(dataclasses.replace(seeds, command=OWN)).command)["experiments"] == "[pooled]"


def test_options_of_the_study_are_kept_and_replaced() -> None:
    own = "python scripts/study.py study=mine file.window=64 'seeds=[1, 2, 3]' grid=kd_weight:1,3 seeds=1,2,3"
    command = verdict(dataclasses.replace(too_high(), command=own)).command
    assert (
        command
        == "python scripts/study.py study=mine file.window=64 'seeds=[1, 2, 3]' seeds=1,2,3 grid=kd_weight:0.03,0.1,0.3"
    )


# --------------------------------------------------------------------------------------------- docs


def test_the_page_for_users_has_every_rule_with_its_thresholds() -> None:
    """In the order of the table, and word for word: an edited threshold or text has to be edited there too."""
    page = " ".join((ROOT / "docs" / "verdicts.md").read_text().split())
    sections = page.split("## The rules")[1].split(" ### ")[1:]
    assert len(sections) == len(RULES)
    for number, (rule, section) in enumerate(zip(RULES, sections, strict=True), 1):
        assert section.startswith(f"{number}. {rule.code}: {rule.name} ")
        for words in (rule.when, rule.cause, rule.action):
            assert words in section, rule.name


def test_the_page_for_users_has_the_thresholds_of_what_the_rules_read() -> None:
    page = " ".join((ROOT / "docs" / "verdicts.md").read_text().split())
    assert f"A standard deviation of {100 * ASSUMED_SEED_SD:g} point ({ASSUMED_SEED_SD:g} nats)" in page
    assert (
        f"falls by {100 * FALL_FRACTION:g} % of its mean, by {FALL_NATS:g} nats and by {FALL_ERRORS:g} standard errors"
        in page
    )
    assert LAST_FRACTION == 1 / 5
    assert "The end of a curve is its last fifth." in page
