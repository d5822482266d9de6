"""The conditions of the verdict's rules, and their thresholds, each with its reason.

A difference is significantly above 0 where its 95 % interval lies above 0. What was not measured fulfils no condition,
except where the rule names that case.
"""

from __future__ import annotations

from pipeline.analysis.findings import Findings
from pipeline.analysis.values import Interval

MARGIN = 0.02
"""2 points, or 0.02 nats: about two standard errors of a paired difference on 1,000 records with three seeds. A smaller
estimate whose interval covers 0 counts as no difference."""
GUESS_MARGIN = 0.05
"""A teacher that is nearer to always giving the most frequent answer knows next to nothing."""
PLATEAU_IMITATION = 0.6
"""Errors coincide without a teacher, too, because some records are hard for all; more than 60 % of them is copying."""
NEAR_TEACHER = 0.1
"""Nats: at a KL of 0.1 the total variation is at most sqrt(0.1 / 2) = 0.22 (Pinsker)."""
MOSTLY = 0.5
"""More than half."""
GOLD_LEARNT = 0.05
"""Nats: the targets have a probability of 95 %, so that the term's gradient has almost vanished."""
GOLD_LEFT = 0.5
"""Of the first gold loss: half of what there was to learn is left."""
OVERFIT_RISE = 0.1
"""10 % of the nll: evaluations of one run on one dev text differ by less."""


def above(value: Interval | None) -> bool:
    """The interval is known and lies above 0."""
    return value is not None and value.low is not None and value.low > 0


def below(value: Interval | None) -> bool:
    """The interval is known and lies below 0."""
    return value is not None and value.high is not None and value.high < 0


def no_better(value: Interval | None, margin: float) -> bool:
    """Measured, not significantly above 0, and less than the margin above 0."""
    return value is not None and value.low is not None and value.low <= 0 and value.value < margin


def teacher_guesses(found: Findings) -> bool:
    """The teacher is at chance, and nothing was gained."""
    gains_nothing = found.over_gold is not None and not above(found.over_gold)
    return no_better(found.teacher_over_guess, GUESS_MARGIN) and gains_nothing


def copies_a_class(found: Findings) -> bool:
    """A whole class of the teacher's errors was copied."""
    return above(found.excess) and bool(found.damaged)


def copies_errors(found: Findings) -> bool:
    """More errors are copied than without a teacher, and the score suffers."""
    return above(found.excess) and is_worse(found)


def is_worse(found: Findings) -> bool:
    """Significantly below gold_only, or below the next lower KD weight."""
    return below(found.over_gold) or below(found.over_lower)


def overfits_gold(found: Findings) -> bool:
    """Gold is memorised, dev becomes worse, and gold added nothing to the teacher."""
    learnt = found.gold_loss is not None and found.gold_loss <= GOLD_LEARNT
    rises = found.dev_nll_rise is not None and found.dev_nll_rise >= OVERFIT_RISE
    return learnt and rises and found.over_weak is not None and not above(found.over_weak)


def needs_more_teacher(found: Findings) -> bool:
    """More weight on the teacher, or the teacher alone, is better."""
    return below(found.over_weak) or above(found.higher_over)


def imitates(found: Findings) -> bool:
    """The student equals its teacher: equal scores, and as far as measured equal errors and distributions."""
    copies = [found.imitation.value >= PLATEAU_IMITATION] if found.imitation else []
    near = [found.divergence <= NEAR_TEACHER] if found.divergence is not None else []
    over = found.over_teacher
    is_at_teacher = over is not None and no_better(over, MARGIN) and over.value > -MARGIN
    return is_at_teacher and bool(copies + near) and all(copies + near)


def is_healthy(found: Findings) -> bool:
    """Above gold_only and above the teacher, and neither control nor chance explains it."""
    gains = above(found.over_gold) and above(found.over_teacher) and not below(found.over_weak)
    refuted = no_better(found.over_shuffled, MARGIN) or no_better(found.teacher_over_guess, GUESS_MARGIN)
    return gains and not refuted and found.combined is not None and found.combined.arm.is_main


def is_undertrained(found: Findings) -> bool:
    """The errors are not the teacher's, where that was measured, and a loss has not reached its end."""
    own_errors = found.teacher_share_of_errors is None or found.teacher_share_of_errors < MOSTLY
    falls = bool(found.gold_loss_falls) or bool(found.divergence_falls)
    high = found.study.main.metric != "-nll" and (found.gold_loss_left or 0.0) > GOLD_LEFT
    return found.combined is not None and own_errors and (falls or high)


def teacher_adds_nothing(found: Findings) -> bool:
    """A shuffled teacher does as well, or the untrained student is as good as the teacher."""
    zero = no_better(found.teacher_over_zero_shot, MARGIN) and found.over_gold is not None
    return no_better(found.over_shuffled, MARGIN) or (zero and not above(found.over_gold))


def labels_exhausted(found: Findings) -> bool:
    """Supervised fine-tuning alone has learnt all its labels; there is no combined student yet."""
    learnt = found.gold_only_loss is not None and found.gold_only_loss <= GOLD_LEARNT
    return found.combined is None and (learnt or (found.gold_only_rise or 0.0) >= OVERFIT_RISE)


def lacks_roles(found: Findings) -> bool:
    """Without these three nothing can be concluded."""
    return found.combined is None or found.gold_only is None or found.teacher is None


def has_one_seed(found: Findings) -> bool:
    """The noise between seeds is unknown."""
    return any(arm is not None and len(arm.arm.seeds) == 1 for arm in (found.combined, found.gold_only))
