"""The pool of a study: of the teacher and of one student a fold, which speaks where it has not learnt.

The student of fold j learns from the teacher on all other folds, and is captured on fold j: together these captures
cover the corpus, and count as one member of the pool.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path

from pipeline.cache.manifest import load_manifest
from pipeline.capture import driver as capture
from pipeline.config.commands import PoolConfig, RunsConfig, StudyConfig, StudyPoolConfig
from pipeline.config.layers import option_text
from pipeline.config.options import load_config
from pipeline.config.overrides import compose_job
from pipeline.config.schema import (
    CaptureConfig,
    GateBy,
    Kind,
    ModelConfig,
    PoolKind,
    PoolStudents,
    Targets,
    TrainConfig,
    WeightBy,
)
from pipeline.config.study import Study
from pipeline.config.validate import at_least, check_capture
from pipeline.core.files import RunPaths, content_hash, is_url
from pipeline.core.object_store import one_location
from pipeline.core.progress import start_logging
from pipeline.core.types import InputError, RunFailed
from pipeline.data.record_counts import count_records
from pipeline.data.text_files import open_text
from pipeline.objective.divergences import NEEDS_EXACT_TAIL
from pipeline.pooling import convert as pooling
from pipeline.pooling.gold import MIN_RECORDS
from pipeline.report.runs import read_config
from pipeline.study.forecast import Composer
from pipeline.study.plan import CROSS_FIT, POOLED, Job, default_experiments, experiments, fold_jobs
from pipeline.study.students import Teacher, command, quiet, run_jobs, text_value, with_inputs
from pipeline.training import driver as training

ONE_SHARD = 1_000_000_000  # records: more than any gold set has
DEFAULT_FOLDS = StudyConfig(study="").folds


def check_pool(config: RunsConfig, composer: Composer, jobs: Sequence[Job]) -> None:
    """Refuse, before anything is trained, a pool that could not be made, or that a student could not read."""
    study = composer.study
    if not fold_jobs(config, study):
        stops = isinstance(config, StudyConfig) and config.stop_after_pool
        has_rounds = isinstance(config, StudyConfig) and config.rounds != 1
        if config.folds != DEFAULT_FOLDS or config.pool != StudyPoolConfig() or stops or has_rounds:
            raise InputError(
                f"folds, pool, rounds, stop_after_pool: expected {POOLED} among the experiments, found "
                f"{experiments(config, study)}, which read no pool; add it, as experiments=[combined,{POOLED}]"
            )
        return
    if study.file.corpus.targets is Targets.choices:
        raise InputError(
            f"{POOLED}: expected a corpus without targets=choices, because one record's choices lie in several "
            "folds, found choices; use targets=next, or pool captures of several teachers (scripts/pool.py)"
        )
    if isinstance(config, StudyConfig):
        _check_rounds(config, study)
    if config.folds < 2:
        raise InputError(f"folds: expected 2 or more, because each student leaves one out, found {config.folds}")
    if is_url(study.file.caches_dir):
        raise InputError(
            f"caches_dir: expected a folder, because the captures of a pool are found by a glob, found "
            f"{study.file.caches_dir}; give the study a folder"
        )
    members = ["the teacher", "the folds"]
    pool = pool_config(config, study, members=members)
    try:
        pooling.check_pool(dataclasses.replace(pool, fit_on=members if config.pool.fit else []))
    except InputError as error:
        raise InputError(f"pool.{error}") from error
    capture_config = composer.capture("teacher.path=.")
    check_capture(dataclasses.replace(capture_config, only_fold=f"0/{config.folds}"))
    if capture_config.kind is not Kind.topk:
        raise InputError(
            f"capture.kind: expected topk for a pool, found {capture_config.kind.name}: tokens that were not drawn "
            "have no probability there; leave it out"
        )
    for job in dict.fromkeys(dataclasses.replace(job, seed=1) for job in jobs if job.experiment == POOLED):
        _check_reads_pool(composer.train(job), config.pool, capture_config.temperatures)
    if config.pool.fit:
        _check_gold(study)


def _check_rounds(config: StudyConfig, study: Study) -> None:
    """Refuse rounds that nothing could end, or whose scores are not known here."""
    at_least(1, rounds=config.rounds)
    if config.rounds == 1:
        return
    learns_from_pool = config.pool.students is PoolStudents.combined
    needs = {
        "a study with dev, whose score ends them": study.file.dev is not None,
        "hydra_launcher=null, which tells no scores": config.hydra_launcher is None,
        "stop_after_pool=false": not config.stop_after_pool,
        "pool.students=combined, because what learns gold alone learns from no pool": learns_from_pool,
    }
    missing = [what for what, is_met in needs.items() if not is_met]
    if missing:
        raise InputError(f"rounds={config.rounds}: expected {'; '.join(missing)}, found not so; give rounds=1")


def _check_gold(study: Study) -> None:
    """Refuse a gold set on which weights would be refused once all members are there."""
    is_exact, num_records = count_records(open_text(study.file.gold, "gold"))
    if is_exact and num_records < MIN_RECORDS:
        raise InputError(
            f"pool.fit: expected {MIN_RECORDS} or more records of gold, found {num_records:g}; give pool.weights"
        )


def _check_reads_pool(run: TrainConfig, pool: StudyPoolConfig, captured: Sequence[float]) -> None:
    """Refuse options that a pool cannot serve; training would only find out when the pool is there."""
    if pool.temperature > 1 and pool.temperature not in captured:
        raise InputError(
            f"pool.temperature: expected at most 1, or one that is captured, found {pool.temperature} and "
            f"{list(captured)}; write capture: {{temperatures: [1, {pool.temperature:g}]}} in the study's file"
        )
    has_one = pool.kind is PoolKind.linear or pool.fit  # the temperature of a fitted one is not known before
    known = [1.0] if has_one else [T for T in captured if T == 1 or T * pool.temperature in captured]
    kd = run.loss.kd
    if kd.temperature not in known:
        raise InputError(
            f"loss.kd.temperature: expected one that the pool has, found {kd.temperature}, where it has {known}; write "
            f"experiments: {{{POOLED}: {{loss.kd.temperature: 1}}}} in the study's file"
        )
    needs_tail = kd.divergence.name if kd.weight > 0 and kd.divergence.name in NEEDS_EXACT_TAIL else None
    is_by_entropy = kd.gate.max_entropy is not None or (kd.gate.by is GateBy.entropy and kd.gate.keep_fraction < 1)
    is_by_entropy |= kd.position_weight.by is WeightBy.entropy
    needs_entropy = "loss.kd.gate or position_weight, by entropy" if is_by_entropy else None
    needs_order = "curriculum_parts" if run.curriculum_parts > 1 else None
    found = needs_tail or needs_entropy or needs_order
    if found is not None:
        raise InputError(
            f"{POOLED}: expected options that read neither an exact tail nor an entropy, which a pool lacks, found "
            f"{found}; set it otherwise for this experiment in the study's file"
        )


def pool_words(config: RunsConfig, study: Study) -> list[str]:
    """The options of a study's command that ask for its pool again, beside its other experiments."""
    if not fold_jobs(config, study):
        return []
    names = list(dict.fromkeys([*default_experiments(study), *experiments(config, study)]))
    folds = [f"folds={config.folds}"] * (config.folds != DEFAULT_FOLDS)
    if isinstance(config, StudyConfig) and config.rounds != 1:
        folds.append(f"rounds={config.rounds}")
    of_pool = [f"pool.{name}={value}" for name, value in own_options(config.pool).items()]
    return [f"experiments=[{','.join(names)}]", *folds, *of_pool]


# ---------------------------------------------------------------------------------------------- steps


def make_pool(
    config: StudyConfig, composer: Composer, teacher: Teacher, cache: str, *, source: str, number: int
) -> str:
    """The pool's folder: what is missing of its students and captures is made first; RunFailed without one of them.

    `cache`: the teacher's capture; `source`: the cache that the students of the folds learn from: in the first round
    the same, then the pool of the round before; `number`: of the round.
    """
    study = composer.study
    folders = fold_students(config, composer, teacher, source)
    base = composer.capture(f"teacher.path={text_value(teacher.model)}")
    identity = [load_manifest(one_location(source, "cache")).fingerprint, *(folder.name for folder in folders)]
    name = f"{study.name}-{content_hash(identity)[:8]}"
    captures = fold_captures(study, base, folders, name=f"{CROSS_FIT}-{name}")
    pool = pool_config(config, study, members=[cache, captures], number=number)
    if config.pool.fit:
        pool = dataclasses.replace(pool, fit_on=gold_captures(study, base, folders, name=name))
    options = [f"name={pool.name}", f"members=[{','.join(pool.members)}]"]
    options += [f"round={number}"] * (number > 1)
    options += [f"fit_on=[{','.join(pool.fit_on)}]"] * config.pool.fit
    of_study = ("students", "fit")
    options += [f"{name}={value}" for name, value in own_options(config.pool).items() if name not in of_study]
    print(f"\n==> pool  ({command('pool', study, [shlex.quote(option) for option in options])})")
    made = str(pooling.run(pool))
    start_logging(quiet=True)
    return made


def fold_students(config: StudyConfig, composer: Composer, teacher: Teacher, cache: str) -> list[Path]:
    """The run of each fold's student, in the order of the folds."""
    jobs = fold_jobs(config, composer.study)
    inputs = [with_inputs(composer, job, teacher, cache) for job in jobs]
    print(f"\n==> {jobs[0].experiment}: a student for each of {config.folds} folds, which learns from the others")
    made, failed = run_jobs(config, composer, jobs, inputs)
    if failed:
        raise RunFailed(f"{'; '.join(failed)} failed")
    if config.hydra_launcher is not None:
        configs = [compose_job("train", job.arguments, study=composer.study) for job in inputs]
        made = [training.prepare(quiet(one)).paths.folder for one in configs]
    by_fold = {read_config(folder / "config.yaml")["leave_out"]: folder for folder in made}
    return [by_fold[f"{fold}/{config.folds}"] for fold in range(config.folds)]


def fold_captures(study: Study, base: CaptureConfig, folders: Sequence[Path], *, name: str) -> str:
    """Capture each fold by the student that left it out, with the options of `base`; a glob that matches them all.

    `base`: a capture by the teacher, of the corpus or of any other text.
    """
    for fold, folder in enumerate(folders):
        model, only_fold = captured_model(folder), f"{fold}/{len(folders)}"
        options = [f"name={name}", f"teacher.path={text_value(model.path)}", f"only_fold={only_fold}"]
        print(f"\n==> capture of fold {only_fold}  ({command('capture', study, options)})")
        capture.run(dataclasses.replace(base, teacher=model, only_fold=only_fold, name=name, cache=None))
        start_logging(quiet=True)
    return f"{base.caches_dir}/{name}-*"


def gold_captures(study: Study, base: CaptureConfig, folders: Sequence[Path], *, name: str) -> list[str]:
    """Captures of the gold set by both members, on which weights are fitted: none has learnt what it is asked there.

    The fold of a sequence follows from its key, so these have to be the sequences of training, each with the key by
    which its student left it out: gold keeps its own options of text, and is packed in one shard. `base`: the teacher's
    capture of the corpus.
    """
    gold = dataclasses.replace(
        base, corpus=study.file.gold, records_per_shard=ONE_SHARD, name=f"gold-{name}", cache=None
    )
    print(f"\n==> capture of gold by the teacher: weights of the pool are fitted on it  (name={gold.name})")
    of_teacher = str(capture.run(gold))
    start_logging(quiet=True)
    return [of_teacher, fold_captures(study, gold, folders, name=f"{CROSS_FIT}-gold-{name}")]


def captured_model(folder: Path) -> ModelConfig:
    """A run's exported model as the teacher of a capture, loaded as the student was."""
    student = load_config(RunPaths(folder=folder).config, TrainConfig).student
    kept = {name: getattr(student, name) for name in ("dtype", "attention", "trust_remote_code")}
    return ModelConfig(path=str(RunPaths(folder=folder).model), **kept)


def pool_config(config: RunsConfig, study: Study, *, members: list[str], number: int = 1) -> PoolConfig:
    """The options of the study's pool of a round; the name of the first is what train.py takes for `pooled`."""
    pool = config.pool
    return PoolConfig(
        name=f"{POOLED}{number if number > 1 else ''}-{study.name}",
        round=number,
        caches_dir=study.file.caches_dir,
        members=members,
        weights=pool.weights,
        kind=pool.kind,
        temperature=pool.temperature,
    )


def own_options(pool: StudyPoolConfig) -> dict[str, str]:
    """The options of a pool that are not as by default, by name, as the command line takes them."""
    found, default = dataclasses.asdict(pool), dataclasses.asdict(StudyPoolConfig())
    changed = {name: value for name, value in found.items() if value != default[name]}
    return {name: getattr(value, "name", None) or option_text(value) for name, value in changed.items()}
