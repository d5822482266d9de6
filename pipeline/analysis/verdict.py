"""The verdict on a study: one table of rules, read from the top; the first one that applies decides.

It is a heuristic. HEALTHY takes two significant differences, over gold_only and over the teacher, each found in 2.5 %
of the studies without one: so a useless teacher is rarely called so. Literature: docs/verdicts.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pipeline.analysis import conditions, evidence, next_command
from pipeline.analysis.conditions import (
    GOLD_LEARNT,
    GOLD_LEFT,
    GUESS_MARGIN,
    MARGIN,
    MOSTLY,
    NEAR_TEACHER,
    OVERFIT_RISE,
    PLATEAU_IMITATION,
)
from pipeline.analysis.findings import CLASS_COPIED, CLASS_GAP, CLASS_RECORDS, CLASS_TEACHER_SCORE, Findings, findings
from pipeline.analysis.values import StudyFigures, Verdict

HEURISTIC = "a heuristic"
"""What a verdict is called wherever it is shown."""
SMALL = f"{100 * MARGIN:g} points ({MARGIN:g} nats)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A row of the table."""

    code: str
    name: str
    """Unique; a code may have several rules, each with a cause of its own."""
    when: str
    """The condition in words, with its thresholds."""
    applies: Callable[[Findings], bool]
    headline: str
    """With {kd_weight}, {classes} and {missing} in it, where it names them."""
    cause: str
    action: str
    shows: tuple[str, ...]
    """The lines of evidence, by their names in `evidence.lines`."""
    command: Callable[[Findings], str]


RULES: tuple[Rule, ...] = (
    Rule(
        code="BAD_TEACHER",
        name="a teacher at chance",
        when="the teacher is not significantly above always giving the most frequent answer and less than "
        f"{100 * GUESS_MARGIN:g} points above it, and combined is not significantly above gold_only",
        applies=conditions.teacher_guesses,
        headline="The teacher does no better than always giving the most frequent answer.",
        cause="There is nothing in the teacher's labels to learn: it was not trained on this task, its prompts "
        "differ from those it was trained on, or the cache is of another text.",
        action="Score the teacher by hand on a few records, then train it on more labels or take another one; look "
        "at its distributions with scripts/audit.py before capturing the corpus again.",
        shows=("teacher - most frequent answer", "teacher - zero_shot", "combined - gold_only"),
        command=next_command.check_teacher,
    ),
    Rule(
        code="KD_TOO_HIGH",
        name="a copied class",
        when=f"excess imitation over gold_only is significantly above 0, and in a class of {CLASS_RECORDS} records "
        f"or more that the teacher gets wrong (score under {100 * CLASS_TEACHER_SCORE:g} %) combined repeats "
        f"{100 * CLASS_COPIED:g} % or more of the teacher's errors and is {100 * CLASS_GAP:g} points or more below "
        "gold_only, with intervals apart",
        applies=conditions.copies_a_class,
        headline="The student copies the teacher's systematic error on {classes}: KD weight {kd_weight} is too high.",
        cause="The student mimics the teacher's style and repeats its factual errors: the corpus has many more "
        "records than the gold set, all of them with the same wrong answer, and the distillation term outweighs the "
        "few labels that contradict it. Its minimum is the teacher itself, errors included.",
        action="Lower the KD weight, at best below the LM weight, or let it fall to 0 in training (loss=fading); "
        "or pool the teacher with students of gold alone (experiments=pooled pool.students=gold_only pool.fit=true); "
        "add gold of the classes named here. A gate on confidence does not help where the teacher is confident in its "
        "error.",
        shows=("classes", "examples", "excess imitation over gold_only", "combined - gold_only", "combined - teacher"),
        command=next_command.lower_kd_weight,
    ),
    Rule(
        code="KD_TOO_HIGH",
        name="copied errors",
        when="excess imitation over gold_only is significantly above 0, and combined is significantly below "
        "gold_only or below the next lower KD weight",
        applies=conditions.copies_errors,
        headline="The student copies the teacher's errors and loses by it: KD weight {kd_weight} is too high.",
        cause="The student mimics the teacher's style and repeats its factual errors, which it would not make on "
        "the labels alone: the minimum of the distillation term is the teacher itself, errors included, and at this "
        "weight it outweighs the labels.",
        action="Lower the KD weight, let it fall to 0 in training (loss=fading), or leave out the positions where "
        "the teacher is unsure (loss.kd.gate.keep_fraction), or pool the teacher with students of gold alone "
        "(experiments=pooled pool.students=gold_only pool.fit=true); add gold.",
        shows=("combined - gold_only", "combined - lower KD weight", "excess imitation over gold_only", "examples"),
        command=next_command.lower_kd_weight,
    ),
    Rule(
        code="GOLD_OVERFIT",
        name="memorised gold",
        when=f"the gold loss ends at {GOLD_LEARNT:g} nats or less, the nll on dev ends {100 * OVERFIT_RISE:g} % or "
        "more above its minimum, and combined is not significantly above weak_only",
        applies=conditions.overfits_gold,
        headline="The gold set is memorised and no longer adds anything to the teacher.",
        cause="The few gold records were read too often. Their loss is near 0, so that further passes only raise "
        "the confidence in them, and dev becomes worse: a plateau of supervised fine-tuning.",
        action="Fewer passes over gold (gold_fraction, gold_epochs), a lower LM weight, export.what=best with "
        "evaluations on dev; more gold where it can be had.",
        shows=("gold loss", "dev nll", "combined - weak_only", "combined - gold_only"),
        command=next_command.less_gold,
    ),
    Rule(
        code="KD_TOO_LOW",
        name="more teacher is better",
        when="combined is significantly below weak_only, or the next higher KD weight is significantly above combined",
        applies=conditions.needs_more_teacher,
        headline="The teacher knows more than this student learns from it: KD weight {kd_weight} is too low.",
        cause="The labels, few and read often, outweigh the teacher's distributions over the large corpus.",
        action="Raise the KD weight or lower the LM weight; a smaller gold_fraction has the same direction.",
        shows=("combined - weak_only", "higher KD weight - combined", "combined - gold_only"),
        command=next_command.higher_kd_weight,
    ),
    Rule(
        code="IMITATION_PLATEAU",
        name="equal to the teacher",
        when=f"combined is not significantly above the teacher and within {SMALL} of it, imitation is "
        f"{100 * PLATEAU_IMITATION:g} % or more, and the KL to the teacher ends at {NEAR_TEACHER:g} nats or less (of "
        "the two at least one is measured, and none contradicts)",
        applies=conditions.imitates,
        headline="The student equals its teacher: it scores as high and makes the same errors.",
        cause="The divergence from the teacher is near 0. Nothing is left to learn from it: the student mimics its "
        "style and repeats its factual errors, and what the student itself knows better has been trained away.",
        action="Soft targets from a better source (a stronger teacher, or a pool of several); leave out the "
        "positions where the teacher is unsure (loss.kd.gate.keep_fraction); a term that trusts the student's own "
        "confident predictions (loss=confidence); more gold.",
        shows=("combined - teacher", "imitation", "divergence", "combined - gold_only", "examples"),
        command=next_command.confident_positions,
    ),
    Rule(
        code="HEALTHY",
        name="better than labels and teacher",
        when="combined is significantly above gold_only and above the teacher, and, as far as measured, not "
        f"significantly below weak_only; neither a shuffled teacher (within {SMALL}) nor chance explains it",
        applies=conditions.is_healthy,
        headline="The weak teacher helped: combined is above gold only, and above its teacher.",
        cause="Labels and distributions complement each other: the student takes over what the teacher knows and "
        "corrects part of its errors.",
        action="Keep these settings. Make sure of them with more seeds, a shuffled teacher, and other KD weights.",
        shows=(
            "combined - gold_only",
            "combined - teacher",
            "combined - weak_only",
            "combined - shuffled teacher",
            "imitation",
        ),
        command=next_command.check_gain,
    ),
    Rule(
        code="UNDERTRAINED",
        name="training ended early",
        when=f"less than {100 * MOSTLY:g} % of the errors are the teacher's (or this was not measured), and the gold "
        "loss or the KL to the teacher still falls over the last fifth of training, or more than "
        f"{100 * GOLD_LEFT:g} % of the first gold loss is left",
        applies=conditions.is_undertrained,
        headline="Training ended before the student had learnt from labels and teacher.",
        cause="As far as measured, the errors are the student's own, and a loss has not reached its end.",
        action="Train longer, or with a higher learning rate, and look at the curves again.",
        shows=("share of errors", "gold loss", "divergence", "combined - gold_only", "combined - teacher"),
        command=next_command.train_longer,
    ),
    Rule(
        code="BAD_TEACHER",
        name="no knowledge in the teacher",
        when=f"combined is not significantly above the shuffled teacher and less than {SMALL} above it; or the "
        f"teacher is not significantly above zero_shot and less than {SMALL} above it, and combined is not "
        "significantly above gold_only",
        applies=conditions.teacher_adds_nothing,
        headline="The teacher adds nothing that the student does not have.",
        cause="A teacher whose outputs were assigned to other records does as well, or the student knew as much "
        "before any training: what was gained, if anything, is smoothing and not knowledge.",
        action="Train the teacher on more labels, take another one, or spend the effort on gold.",
        shows=("combined - shuffled teacher", "teacher - zero_shot", "combined - gold_only", "combined - teacher"),
        command=next_command.check_teacher,
    ),
    Rule(
        code="KD_TOO_HIGH",
        name="harm without copying",
        when="combined is significantly below gold_only or below the next lower KD weight, and no rule above applies",
        applies=conditions.is_worse,
        headline="The teacher does harm: KD weight {kd_weight} is too high.",
        cause="The distillation term draws the student away from the labels. That it copies the teacher's errors is "
        "not shown: imitation was not measured, or the teacher's errors are too irregular to be learnt.",
        action="Lower the KD weight, let it fall to 0 in training (loss=fading), or gate it on the teacher's "
        "confidence.",
        shows=("combined - gold_only", "combined - lower KD weight", "excess imitation over gold_only", "divergence"),
        command=next_command.lower_kd_weight,
    ),
    Rule(
        code="INCONCLUSIVE",
        name="labels exhausted, no combined student yet",
        when=f"there is no combined student, and the loss of gold_only ends at {GOLD_LEARNT:g} nats or less or its "
        f"nll on dev ends {100 * OVERFIT_RISE:g} % or more above its minimum",
        applies=conditions.labels_exhausted,
        headline="Supervised fine-tuning has reached its plateau; a combined student has not been trained.",
        cause="The labels are exhausted: every one of them is learnt, their gradient has vanished, and more passes "
        "raise confidence and not the score.",
        action="New information: a teacher's distributions over unlabeled text (this study's combined student), or "
        "more gold.",
        shows=("gold_only loss", "gold_only dev nll"),
        command=next_command.missing_runs,
    ),
    Rule(
        code="INCONCLUSIVE",
        name="runs are missing",
        when="there is no score of combined, gold_only or the teacher",
        applies=conditions.lacks_roles,
        headline="Nothing can be concluded without {missing}.",
        cause="Whether the teacher helped is the difference to gold_only and to the teacher on the same records.",
        action="Run what is missing.",
        shows=("combined - gold_only", "combined - teacher", "combined - weak_only"),
        command=next_command.missing_runs,
    ),
    Rule(
        code="INCONCLUSIVE",
        name="one seed",
        when="combined or gold_only has one seed, and no rule above applies",
        applies=conditions.has_one_seed,
        headline="One seed does not decide: the differences are within what another seed may change.",
        cause="The noise between seeds is unknown with one, and the differences are small against the noise of the "
        "records.",
        action="Three seeds of every student.",
        shows=("combined - gold_only", "combined - teacher", "combined - weak_only", "imitation"),
        command=next_command.more_seeds,
    ),
    Rule(
        code="INCONCLUSIVE",
        name="small differences",
        when="no rule above applies",
        applies=lambda found: True,
        headline="The intervals do not decide whether the teacher helped.",
        cause="The effect is small against the noise of records and seeds, or there is none.",
        action="More seeds up to five, then more test records or another KD weight.",
        shows=("combined - gold_only", "combined - teacher", "combined - weak_only", "imitation", "divergence"),
        command=next_command.more_seeds,
    ),
)


def verdict(figures: StudyFigures) -> Verdict:
    """The verdict of the first rule that applies, with its numbers."""
    found = findings(figures)
    rule = next(rule for rule in RULES if rule.applies(found))
    lines = evidence.lines(found)
    missing = [role for role in ("combined", "gold_only", "teacher") if getattr(found, role) is None]
    words = {
        "kd_weight": f"{found.combined.arm.kd_weight:g}" if found.combined else "",
        "classes": ", ".join(part.value.strip() for part in found.damaged),
        "missing": ", ".join(missing),
    }
    shown = [line for name in (*rule.shows, "judged", "seeds") for line in lines[name]]
    return Verdict(
        code=rule.code,
        headline=rule.headline.format_map(words),
        cause=rule.cause,
        action=rule.action,
        evidence=(*shown, f"the rule, {HEURISTIC}: {rule.when}"),
        command=rule.command(found),
    )
