"""What a study is going to do, before it does: its jobs with all their options, checked, and the printed plan."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

from pipeline.config.commands import StudyConfig
from pipeline.config.overrides import compose_job
from pipeline.config.schema import CaptureConfig, LauncherConfig, ModelConfig, TextConfig, TrainConfig
from pipeline.config.study import Study, more_tests_of
from pipeline.config.validate import check_capture, check_files
from pipeline.config.validate_train import check_train
from pipeline.core.progress import readable, readable_duration
from pipeline.core.types import InputError
from pipeline.declare.shown import show_texts
from pipeline.models.tokenizer import check_tokenizers, open_tokenizer, tokenizer_hash
from pipeline.study import cost
from pipeline.study.plan import MEMBERS, POOLED, Job, fold_jobs, teacher_job
from pipeline.training.nodes import this_node

ADAPTIVE = "loss.kd.adaptive_weight.teacher_predictions"
LATER = ("cache", "scoring.teacher_predictions", "scoring.teacher_dev_predictions", ADAPTIVE)
"""Inputs that the study makes itself: not there yet while it is planned."""


class Composer:
    """The options of jobs; those that differ in the seed alone are composed once, which takes Hydra a moment."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self._compose = functools.lru_cache(maxsize=None)(self._composed)

    def train(self, job: Job) -> TrainConfig:
        """Of a run, before its teacher and cache are known."""
        return dataclasses.replace(self._compose(job.experiment, job.overrides), seed=job.seed)

    def capture(self, *overrides: str) -> CaptureConfig:
        """Of the capture; the teacher's folder is one of its overrides."""
        config = compose_job("capture", overrides, study=self.study)
        assert isinstance(config, CaptureConfig)
        return config

    def reads_cache(self, job: Job) -> bool:
        """Whether a run trains on the captured corpus."""
        config = self.train(job)
        return config.steps != 0 and config.gold_fraction < 1

    def _composed(self, experiment: str, overrides: tuple[str, ...]) -> TrainConfig:
        later = [f"{name}=null" for name in LATER]
        config = compose_job("train", [f"experiment={experiment}", *overrides, *later], study=self.study)
        assert isinstance(config, TrainConfig)
        return config


# ------------------------------------------------------------------------------------------- checks


def texts_of(study: Study) -> dict[str, TextConfig]:
    """The texts that a study has, by name."""
    names = ("teacher_labels", "corpus", "gold", "dev", "test", "ceiling")
    texts: dict[str, Any] = {name: getattr(study.file, name) for name in names}
    return {name: text for name, text in texts.items() if text is not None} | more_tests_of(study)


def check_jobs(composer: Composer, jobs: Sequence[Job]) -> None:
    """Refuse contradictory options of any run, and of the capture, before the first one starts."""
    file = composer.study.file
    capture = composer.capture("teacher.path=.")
    check_capture(capture)
    check_files(dataclasses.replace(capture, teacher=file.teacher))
    teacher, student = (open_tokenizer(model)[1] for model in (file.teacher, file.student))
    check_tokenizers(teacher, student, names=(file.teacher.path, file.student.path))
    if any(job.experiment in MEMBERS.values() for job in jobs) and tokenizer_hash(teacher) != tokenizer_hash(student):
        raise InputError(
            f"pooled: expected teacher {file.teacher.path} and student {file.student.path} to have the same tokenizer, "
            "added tokens included, because a pool joins them, found a difference; give one of them the other's files"
        )
    for job in dict.fromkeys(dataclasses.replace(job, seed=1) for job in [teacher_job(composer.study), *jobs]):
        config = composer.train(job)
        check_nodes(config.launcher)
        check_files(config)
        adaptive = config.loss.kd.adaptive_weight
        kd = dataclasses.replace(config.loss.kd, adaptive_weight=dataclasses.replace(adaptive, teacher_predictions="."))
        loss = dataclasses.replace(config.loss, kd=kd)
        check_train(dataclasses.replace(config, loss=loss, cache="." if composer.reads_cache(job) else None))


def check_nodes(launcher: LauncherConfig) -> None:
    """Refuse a study, or a search, by one command a node: only runs are trained so."""
    if this_node(launcher, os.environ) is not None:
        raise InputError(
            f"launcher.num_nodes={launcher.num_nodes}: expected one command for all nodes, as in a job of SLURM, found "
            "one on each; train by scripts/train.py on each node, or give launcher.num_nodes=1"
        )


def jobs_at_once(composer: Composer, jobs: Sequence[Job]) -> int:
    """How many students work at a time; InputError where those that train have different numbers."""
    configs = [composer.train(job) for job in jobs]
    found = sorted({config.launcher.jobs for config in [one for one in configs if one.steps != 0] or configs})
    if len(found) > 1:
        raise InputError(f"launcher.jobs: expected one number for all students, found {found}; give one")
    return found[0]


def with_curve_length(composer: Composer, job: Job) -> Job:
    """A gold_only run of the label curve with as many passes as the ceiling, and no fewer steps than gold_only.

    With the steps of the small gold set a large one would not be read once.
    """
    if not any(override.startswith("gold.take=") for override in job.overrides):
        return job
    config, ceiling = composer.train(job), composer.train(Job(experiment="ceiling", seed=1, overrides=()))
    sequences = sequences_of(config, math.nan)
    own, passes = cost.num_steps(config, sequences), ceiling.epochs or 1
    steps = max(own, math.ceil(passes * sequences / cost.batch(config)))
    return dataclasses.replace(job, overrides=(*job.overrides, "epochs=null", f"steps={steps}"))


# --------------------------------------------------------------------------------------------- plan


def print_plan(config: StudyConfig, composer: Composer, jobs: Sequence[Job]) -> None:
    """The runs, what the models read, and what all of it costs."""
    study = composer.study
    print(f"Study {study.name} ({study.path})\n")
    shown = {name: text for name, text in texts_of(study).items() if name in ("corpus", "gold")}
    for line in show_texts(shown, study):
        print(line)
    costs = list(all_costs(config, composer, jobs))
    print(f"{'run':<36} {'runs':>4} {'steps':>7} {'tokens':>12} {'time':>8}")
    for label, group in costs:
        whole = cost.total(group)
        time = "" if whole.seconds is None else readable_duration(whole.seconds)
        print(f"{label:<36} {len(group):>4} {group[0].steps or '':>7} {whole.tokens:>12,} {time:>8}")
    whole = cost.total([one for _, group in costs for one in group])
    hours = "" if whole.seconds is None else f", about {readable_duration(whole.seconds)} on this machine"
    print(f"\nIn all about {whole.steps:,} steps, {whole.tokens:,} tokens, {readable(whole.bytes)} of weights{hours};")
    print("what exists already is not made again.")


def all_costs(config: StudyConfig, composer: Composer, jobs: Sequence[Job]) -> Iterator[tuple[str, list[cost.Cost]]]:
    """Of the teacher, of the capture, and of each setting of the student with all its seeds."""
    study, file = composer.study, composer.study.file
    teacher = composer.train(teacher_job(study))
    speed = {
        "teacher": _speed(config, file.teacher, teacher, trains=study.trains_teacher),
        "student": _speed(config, file.student, teacher, trains=True),
    }
    corpus = cost.num_sequences(file.corpus, "corpus", file.student, file.window)
    yield "teacher", [cost.run_cost(teacher, sequences_of(teacher, corpus), speed["teacher"])]
    if any(map(composer.reads_cache, jobs)):
        yield "capture", [cost.capture_cost(composer.capture("teacher.path=."), corpus, speed["teacher"])]
    for label, group in costs_of_pool(composer, fold_jobs(config, study), corpus, speed["student"]):
        yield label, group * config.rounds
    groups: dict[str, list[cost.Cost]] = {}
    for job in jobs:
        one = composer.train(job)
        label = job.label.removesuffix(f" seed {job.seed}")
        of_job = [cost.run_cost(one, sequences_of(one, corpus), speed["student"])]
        groups.setdefault(label, []).extend(of_job * (config.rounds if job.experiment == POOLED else 1))
    yield from groups.items()


def costs_of_pool(
    composer: Composer, folds: Sequence[Job], corpus: float, speed: float | None
) -> Iterator[tuple[str, list[cost.Cost]]]:
    """Of the students of all folds, of their captures, and of the pool; nothing where there is none.

    `speed`: seconds a token of training, of which the forward that a capture is takes a third.
    """
    if not folds:
        return
    one, capture = composer.train(folds[0]), composer.capture("teacher.path=.")
    share, forward = 1 / len(folds), None if speed is None else speed / cost.TRAINING_FORWARDS
    yield folds[0].experiment, [cost.run_cost(one, sequences_of(one, corpus * (1 - share)), speed)] * len(folds)
    yield f"capture by {folds[0].experiment}", [cost.capture_cost(capture, corpus * share, forward)] * len(folds)
    yield "pool", [cost.pool_cost(capture, corpus, timed=speed is not None)]


def _speed(config: StudyConfig, model: ModelConfig, run: TrainConfig, *, trains: bool) -> float | None:
    limit = config.probe_seconds / 2
    if limit == 0:
        return None
    sequences = min(run.micro_batch, cost.batch(run))
    return cost.seconds_per_token(model, window=run.window, sequences=sequences, limit_seconds=limit, trains=trains)


def sequences_of(config: TrainConfig, corpus: float) -> float:
    """Windows of an epoch: of gold where that is all it reads, else of the corpus and the gold mixed in."""
    if config.gold_fraction < 1 or config.gold is None:
        return corpus / (1 - config.gold_fraction) if config.gold_fraction < 1 else 0.0
    return cost.num_sequences(config.gold, "gold", config.student, config.window)
