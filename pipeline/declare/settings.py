"""Settings for the training runs of a new study: a starting point from the sizes of texts and models alone.

The learning rates and the demo's batch are those measured with SmolLM2-135M (docs/decisions.md); for other sizes they
follow common practice: the larger the model, the smaller the rate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

LEARNING_RATES = (  # (parameters below, peak learning rate of AdamW) for training all weights
    (5e6, 1e-3),
    (6e7, 3e-4),
    (3e8, 1e-4),
    (1e9, 5e-5),
    (4e9, 2e-5),
    (math.inf, 1e-5),
)
MAX_GOLD_PASSES = 8  # over gold in the combined run: more memorise it
MIN_STEPS, MIN_GOLD_STEPS = 100, 30  # of a run that reads the corpus; of one that reads gold alone
MIN_EPOCHS, MAX_EPOCHS = 2, 10
LARGE_CORPUS = 50_000  # sequences from which one pass is enough
SMALL_CORPUS = 400  # sequences below which a batch is halved, for more updates
MICRO_BATCH_TOKENS = 2048  # of a forward with its gradients: a few GB for the smallest models
DEV_LOOKS = 4  # evaluations on dev during a run


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What the settings follow from."""

    corpus: int
    """Sequences."""
    gold: int
    teacher_labels: int | None
    """None: the teacher is ready-made."""
    ceiling: int | None
    """None: there is no ceiling."""
    window: int
    student_parameters: int
    teacher_parameters: int
    has_dev: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Options of the training runs."""

    global_batch: int
    micro_batch: int
    learning_rate: float
    epochs: int
    """Of weak_only, combined and the ceiling, over the corpus."""
    gold_fraction: float
    gold_passes: float
    """Over gold, in the combined run."""
    steps: dict[str, int]
    """About how many updates each experiment makes; of gold_only exactly."""
    teacher_learning_rate: float
    teacher_epochs: int | None
    evaluate_every_steps: int | None
    """None: no dev."""
    gold_only_evaluate_every_steps: int | None
    """The same for gold_only, which makes fewer updates."""


def choose_settings(sizes: Sizes) -> Settings:
    """Settings of all runs from the sizes of texts and models.

    Gold is at most r / (1 + r) of the batches, with r = 8 * gold / (epochs * corpus), so that the combined run reads it
    eight times at most; gold_only reads it as often, and makes 30 updates at least.
    """
    global_batch = 8 if sizes.corpus < SMALL_CORPUS else 16
    epochs = epochs_for(sizes.corpus, global_batch, MIN_STEPS, least=1 if sizes.corpus >= LARGE_CORPUS else MIN_EPOCHS)
    fraction = gold_fraction(gold=sizes.gold, corpus=epochs * sizes.corpus)
    steps = max(1, round(epochs * sizes.corpus / (global_batch * (1 - fraction))))
    passes = fraction * global_batch * steps / sizes.gold
    teacher_epochs = None
    if sizes.teacher_labels is not None:
        teacher_epochs = epochs_for(sizes.teacher_labels, global_batch, 3 * MIN_STEPS, least=3)
    gold_only_steps = max(MIN_GOLD_STEPS, round(passes * sizes.gold / global_batch))
    return Settings(
        global_batch=global_batch,
        micro_batch=min(global_batch, 2 ** int(math.log2(max(1, MICRO_BATCH_TOKENS // sizes.window)))),
        learning_rate=learning_rate(sizes.student_parameters),
        epochs=epochs,
        gold_fraction=fraction,
        gold_passes=passes,
        steps=_steps(sizes, global_batch, epochs, teacher_epochs) | {"combined": steps, "gold_only": gold_only_steps},
        teacher_learning_rate=learning_rate(sizes.teacher_parameters),
        teacher_epochs=teacher_epochs,
        evaluate_every_steps=_steps_between_looks(steps) if sizes.has_dev else None,
        gold_only_evaluate_every_steps=_steps_between_looks(gold_only_steps) if sizes.has_dev else None,
    )


def _steps_between_looks(steps: int) -> int:
    return max(5, steps // DEV_LOOKS)


def _steps(sizes: Sizes, global_batch: int, epochs: int, teacher_epochs: int | None) -> dict[str, int]:
    """The updates of the runs whose length is given in passes over one text."""
    sequences = {"weak_only": epochs * sizes.corpus}
    if sizes.ceiling is not None:
        sequences["ceiling"] = epochs * sizes.ceiling
    if sizes.teacher_labels is not None and teacher_epochs is not None:
        sequences["teacher"] = teacher_epochs * sizes.teacher_labels
    return {name: math.ceil(count / global_batch) for name, count in sequences.items()}


def learning_rate(num_parameters: int) -> float:
    """The peak learning rate of a model by its size."""
    return next(rate for below, rate in LEARNING_RATES if num_parameters < below)


def epochs_for(num_sequences: int, global_batch: int, num_steps: int, *, least: int) -> int:
    """The passes over a text that make `num_steps` updates, from `least` to 10."""
    return min(max(least, math.ceil(num_steps * global_batch / num_sequences)), MAX_EPOCHS)


def gold_fraction(*, gold: int, corpus: int) -> float:
    """The fraction of sequences that are gold: the largest 1/64, 2/64, ... 32/64 with which gold is read 8 times.

    `corpus` counts its sequences over all epochs. Never under 1/64: the smallest gold set is read more often.
    """
    ratio = MAX_GOLD_PASSES * gold / corpus
    return min(max(1, math.floor(64 * ratio / (1 + ratio))), 32) / 64
