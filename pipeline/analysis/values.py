"""What a study found, as frozen values: computed here, judged by `verdict`, shown by the package `report`.

Letters of array shapes in this package: R runs (seeds) of an arm, M held-out records, C choices of a record.
All scores, rates and differences are fractions (0 to 1), except where the metric is `-nll` (nats a target).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """An estimate with its 95 % interval."""

    value: float
    low: float | None = None
    """None where no interval can be computed."""
    high: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One setting of one experiment, with all its seeds: what a row of the report is."""

    role: str
    """teacher, zero_shot, gold_only, weak_only, combined, ceiling, control."""
    label: str
    """Short and unique in a study: `combined`, `combined kd 0.3`."""
    name: str
    """The experiment's name."""
    seeds: tuple[int, ...]
    lm_weight: float
    kd_weight: float
    gold_fraction: float
    num_gold: int | None = None
    """Records of its gold set; None where it reads none."""
    control: str = "none"
    """What the teacher was replaced by: none, smoothed, shuffled."""
    differing: Mapping[str, Any] = field(default_factory=dict)
    """Options, by dotted name, in which the arms of this role differ, with the value of this one."""
    is_main: bool = True
    """Whether conclusions on this role rest on this arm: one for each role."""
    is_pool: bool = False
    """Whether it learnt from a pool of several captures, not from the teacher's own."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ArmPredictions:
    """Predictions of all runs of an arm on one held-out text; records are in the same order for all arms."""

    arm: Arm
    credit_RM: np.ndarray
    """Of each record: 1 right, 0 wrong, 1/m where the answer is one of m tied choices; or minus the sum of nll."""
    weight_M: np.ndarray
    """Score of a run = sum_M credit / sum_M weight: 1 a record, or its number of targets where the metric is -nll."""
    predicted_RM: np.ndarray | None = None
    """Index of the predicted choice; None without choices."""
    probability_RMC: np.ndarray | None = None
    """Probabilities of the choices, softmax over the choices of a record; padded with 0."""
    num_tied_RM: np.ndarray | None = None
    """Number of equally likely best choices."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HeldOut:
    """What is known of the records of a held-out text, in the order of the predictions."""

    name: str
    answer_M: np.ndarray | None = None
    """Index of the right choice."""
    class_M: np.ndarray | None = None
    """Text of the right choice, for the breakdown by class."""
    length_M: np.ndarray | None = None
    """Characters of the prompt."""
    is_out_of_domain: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The paired difference of an arm to another one on the same records."""

    against: str
    """Role of the other arm."""
    difference: Interval
    won: float
    """Records that this arm has right and the other wrong, mean over seeds."""
    lost: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Bin:
    """Records of similar confidence."""

    confidence: float
    """Mean probability of the predicted choice."""
    accuracy: float
    num_records: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Whether probabilities can be believed, against the truth or against the teacher's choice."""

    ece: float
    """Expected calibration error with bins of equal mass: sum over bins of their share of |accuracy - confidence|."""
    brier: float
    """Mean over records of sum_C (p_C - 1[C is the answer])^2."""
    overconfidence: float
    """Mean confidence minus accuracy: above 0 where the model believes too much."""
    bins: tuple[Bin, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Imitation:
    """Cells of teacher right/wrong x student right/wrong, as rates; means over seeds."""

    num_teacher_wrong: int
    num_teacher_right: int
    imitation: Interval
    """P(student = teacher | teacher wrong)."""
    correction: Interval
    """P(student right | teacher wrong)."""
    damage: Interval
    """P(student wrong | teacher right)."""
    excess: Interval | None
    """Imitation minus that of gold_only on the same records; None without gold_only, or for it."""
    agreement: Interval
    """P(student = teacher)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """The score on a part of the records."""

    by: str
    """class, length, teacher confidence."""
    value: str
    num_records: int
    score: Interval
    teacher_score: float | None
    imitation: float | None
    """P(student = teacher | teacher wrong) on this part."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmFigures:
    """Everything measured about one arm on one held-out text."""

    arm: Arm
    score: Interval
    nll: float | None = None
    num_ties: float = 0.0
    """Records with tied choices, mean over seeds."""
    comparisons: tuple[Comparison, ...] = ()
    """To the main arms of teacher, zero_shot, gold_only, weak_only; of an arm of role combined also to the experiment
    `combined`, to the next lower KD weight (`lower kd`), and to controls."""
    pgr: Interval | None = None
    """(score - weak) / (ceiling - weak), never clamped."""
    pgr_refused: str | None = None
    """Why there is no PGR: no ceiling, or a gap below two standard errors."""
    calibration: Calibration | None = None
    teacher_calibration: Calibration | None = None
    """The student's probabilities against the teacher's choice."""
    imitation: Imitation | None = None
    slices: tuple[Slice, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TextFigures:
    """All arms on one held-out text."""

    name: str
    metric: str
    """accuracy, exact_match or -nll."""
    num_records: int
    is_out_of_domain: bool
    arms: tuple[ArmFigures, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """What the steps of an arm's runs looked like; curves are means over the seeds."""

    label: str
    steps: tuple[int, ...]
    curves: Mapping[str, tuple[float | None, ...]]
    """By key of metrics.jsonl, one value a step: lm, kd, grad_cosine, dev_accuracy, dev_nll, dev_imitation, ..."""
    seconds: float
    """Mean over seeds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelSaving:
    """How many gold labels the teacher was worth, read off a curve of gold-only runs."""

    sizes: tuple[int, ...]
    scores: tuple[Interval, ...]
    num_gold: int
    """Gold records of the combined arm."""
    equivalent: Interval | None
    """Gold records with which gold-only reaches the combined score; None where the curve does not reach it."""
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One held-out record with the answers of several models, as text."""

    kind: str
    """copied: the teacher's error repeated; corrected: the teacher's error mended; damaged: right in the teacher."""
    prompt: str
    truth: str
    answers: Mapping[str, str]
    """By role."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A heuristic judgement with its evidence and what to do next."""

    code: str
    """KD_TOO_HIGH, KD_TOO_LOW, IMITATION_PLATEAU, BAD_TEACHER, UNDERTRAINED, GOLD_OVERFIT, HEALTHY, INCONCLUSIVE."""
    headline: str
    """One sentence."""
    cause: str
    action: str
    evidence: tuple[str, ...]
    command: str
    """The one command to run next, as it can be pasted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyFigures:
    """A whole study."""

    name: str
    main: TextFigures
    """The first test text, on which the verdict rests."""
    more: tuple[TextFigures, ...] = ()
    """Further test texts."""
    training: tuple[Training, ...] = ()
    label_saving: LabelSaving | None = None
    examples: tuple[Example, ...] = ()
    cache: Mapping[str, Any] = field(default_factory=dict)
    """Of the teacher's cache: num_sequences, num_targets, bytes, k, retained_mass (mean), histogram."""
    counts: Mapping[str, Any] = field(default_factory=dict)
    """Numbers on the diagram: records of corpus and gold, gold_fraction, weights, temperature, steps, parameters."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """commands, versions, hashes, hardware, seconds."""
    command: str = "python scripts/study.py"
    """How this study is run, with its `study=`: the beginning of the command of a verdict."""
