"""A search: options of one experiment, chosen by its score on dev. Optuna proposes, our runs answer and resume."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from pipeline.capture import driver as capture
from pipeline.config.commands import SearchConfig
from pipeline.config.compose import open_study, quoted
from pipeline.config.overrides import compose_job
from pipeline.config.schema import ExportedStep, IfBusy, TrainConfig
from pipeline.config.study import Study
from pipeline.core.files import content_hash
from pipeline.core.progress import start_logging
from pipeline.core.stopping import Stopped
from pipeline.core.types import Busy, InputError, RunFailed
from pipeline.data.text_files import open_text
from pipeline.data.tokenize import text_hash
from pipeline.declare.leaks import check_texts
from pipeline.study.driver import run_teacher
from pipeline.study.forecast import Composer, check_jobs, jobs_at_once, texts_of
from pipeline.study.plan import MEMBERS, POOLED, Job, check_plan
from pipeline.study.space import Axis, Values, middle, overrides_of, read_space
from pipeline.study.students import quiet, with_inputs
from pipeline.training import driver as training

if TYPE_CHECKING:
    import optuna

CHOICE_SECONDS = 60.0  # far longer than a process takes to choose the values of a setting


def run(config: SearchConfig) -> None:
    """Try settings until there are as many as asked for, then print them, best first; the same command continues."""
    try:
        _run(config)
    except Stopped as stopped:  # a run that finished all the same is not the end of its search
        raise Stopped(str(stopped), is_finished=False) from stopped


def _run(config: SearchConfig) -> None:
    start_logging()
    study = open_study(config.study, config.study_dir)
    composer = Composer(study)
    space = read_space(config.search, composer.capture("teacher.path=.").temperatures)
    check_search(config, study, composer, space)
    if config.dry_run:
        print(f"a search over {', '.join(space)}; both ends of each are valid")
        return
    search = open_search(config, study, space)
    teacher, cache = run_teacher(study, if_busy=IfBusy.wait), None  # several commands may begin together
    if composer.reads_cache(job_of(config, middle(space), config.seeds[0])):
        cache = str(capture.run(composer.capture(f"teacher.path={quoted([teacher.model])[1:-1]}")))
    start_logging(quiet=True)
    for number, values in trials(search, space, config):
        print(f"==> trial {number + 1} of {config.trials}: {' '.join(overrides_of(values))}", flush=True)
        jobs = [with_inputs(composer, job_of(config, values, seed), teacher, cache) for seed in config.seeds]
        print(f"    {answer(search, number, study, jobs)}", flush=True)
    print(f"\n{summary(search, study, config)}")


# ------------------------------------------------------------------------------------------ checks


def job_of(config: SearchConfig, values: Values, seed: int) -> Job:
    """The run of a setting and a seed."""
    return Job(experiment=config.experiment, seed=seed, overrides=(*config.overrides, *overrides_of(values)))


def check_search(config: SearchConfig, study: Study, composer: Composer, space: Mapping[str, Axis]) -> None:
    """Refuse a search that would decide on test, and options that no run of it could have."""
    if study.file.dev is None:
        raise InputError(
            f"{study.path}: expected dev, a held-out text by whose score a search decides, found none; add it, because "
            "test is no test any more once it decides"
        )
    if config.experiment in (*MEMBERS.values(), POOLED):
        raise InputError(
            f"experiment: expected one that reads the teacher's capture, found {config.experiment}, whose pool "
            f"scripts/study.py makes; choose the options of combined, which {POOLED} takes from the study's file"
        )
    if config.trials < 1:
        raise InputError(f"trials: expected at least 1, found {config.trials}; correct it")
    for module, package in (("optuna", "optuna"), ("sklearn", "scikit-learn")):
        if importlib.util.find_spec(module) is None:
            raise InputError(
                f"search: expected the package {package}, found none; install it with scripts/setup search"
            )
    check_plan(config.seeds, config.overrides)
    first = middle(space)
    settings = [first | {name: value} for name, axis in space.items() for value in axis.values or axis.ends]
    jobs = [job_of(config, values, config.seeds[0]) for values in settings]
    if jobs_at_once(composer, jobs) > 1:
        raise InputError("launcher.jobs: expected 1, found more; several commands at once share a search")
    check_jobs(composer, jobs)
    check_texts(texts_of(study), allowed=study.file.allow_shared_records)


# ------------------------------------------------------------------------------------------ Optuna


def open_search(config: SearchConfig, study: Study, space: Mapping[str, Axis]) -> optuna.Study:
    """The search as far as it has come, in a journal beside the study's runs: JSON lines that several may append to.

    Another space, other fixed options or seeds, another file of the study or text of dev are another search in it:
    their scores cannot be compared.
    """
    import optuna
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    place = folder_of(study)
    place.mkdir(parents=True, exist_ok=True)
    axes = {name: dataclasses.asdict(axis) for name, axis in space.items()}
    assert study.file.dev is not None
    dev = text_hash(open_text(study.file.dev, "dev"))
    identity = [config.experiment, config.overrides, config.seeds, config.seed, axes, study.content, dev]
    return optuna.create_study(
        storage=optuna.storages.JournalStorage(JournalFileBackend(str(place / "trials.journal"))),
        study_name=content_hash(identity)[:12],
        direction="maximize",
        load_if_exists=True,
    )


def folder_of(study: Study) -> Path:
    """Where a search keeps its journal and its runs, apart from the runs that the study's report compares."""
    return Path(study.file.runs_dir) / "search"


def trials(search: optuna.Study, space: Mapping[str, Axis], config: SearchConfig) -> Iterator[tuple[int, Values]]:
    """The settings to try, each with its number: those that a process began and did not end, then new ones.

    A setting that another process is trying is begun here too: its run is locked, so that this one passes it over. At
    the end it is asked for once more: that process may have been killed.
    """
    yield from begun_trials(search, space)
    while len(search.get_trials(deepcopy=False)) < config.trials:
        trial = search.ask()
        search.sampler = sampler_of(config.seed, trial.number)
        yield trial.number, {name: chosen(trial, name, axis) for name, axis in space.items()}
    yield from begun_trials(search, space)


def begun_trials(search: optuna.Study, space: Mapping[str, Axis]) -> Iterator[tuple[int, Values]]:
    """The settings without an answer."""
    from optuna.trial import TrialState

    for begun in search.get_trials(states=[TrialState.RUNNING]):
        age = datetime.now() - (begun.datetime_start or datetime.now())
        if begun.params.keys() == space.keys():
            yield begun.number, begun.params
        elif age.total_seconds() > CHOICE_SECONDS:  # its process was killed before it had chosen all values
            search.tell(begun.number, state=TrialState.FAIL, skip_if_finished=True)


def sampler_of(seed: int, number: int) -> optuna.samplers.BaseSampler:
    """Optuna's default sampler, seeded for one trial: a search that was killed proposes what it would have proposed."""
    import optuna

    return optuna.samplers.TPESampler(seed=int(content_hash([seed, number])[:8], 16))


def chosen(trial: optuna.Trial, name: str, axis: Axis) -> Any:
    """The sampler's value for one option; a range with whole ends has whole numbers."""
    if axis.values:
        return trial.suggest_categorical(name, axis.values)
    if isinstance(axis.low, int) and isinstance(axis.high, int):
        return trial.suggest_int(name, axis.low, axis.high, log=axis.log)
    return trial.suggest_float(name, axis.low, axis.high, log=axis.log)


# -------------------------------------------------------------------------------------------- runs


def answer(search: optuna.Study, number: int, study: Study, jobs: Sequence[Job]) -> str:
    """Make the runs of a setting and leave the mean of their scores in the journal; returns what became of them.

    A setting whose run fails, as a learning rate may make it do, counts as tried. Another process may have answered.
    """
    from optuna.trial import TrialState

    try:
        score = fmean([score_of(study, job) for job in jobs])
    except Busy:
        return "another process is trying it"
    except RunFailed as error:
        search.tell(number, state=TrialState.FAIL, skip_if_finished=True)
        return f"failed: {error}"
    search.tell(number, score, skip_if_finished=True)
    return f"score on dev {score:.4f}"


def score_of(study: Study, job: Job) -> float:
    """Bring one run to its score on dev."""
    config = of_search(compose_job("train", job.arguments, study=study), study)
    score = training.run_prepared(training.prepare(quiet(config)))
    if score is None:
        raise RunFailed(f"{job.label}: expected a score on dev, found none; look at its log.txt")
    return score


def of_search(config: TrainConfig, study: Study) -> TrainConfig:
    """A run that is scored on dev alone and keeps no weights: the study makes the best one again."""
    launcher = dataclasses.replace(config.launcher, if_busy=IfBusy.skip)
    what = ExportedStep.none if config.export.what is ExportedStep.last else config.export.what
    return dataclasses.replace(
        config,
        runs_dir=str(folder_of(study)),
        test=None,
        more_tests={},
        out_of_domain=[],
        scoring=dataclasses.replace(config.scoring, teacher_predictions=None),
        launcher=launcher,
        export=dataclasses.replace(config.export, what=what),
    )


# ----------------------------------------------------------------------------------------- summary


def summary(search: optuna.Study, study: Study, config: SearchConfig) -> str:
    """All settings, best first; how much each option mattered; and how the best enters the study."""
    from optuna.trial import TrialState

    done = sorted(search.get_trials(states=[TrialState.COMPLETE]), key=lambda trial: -(trial.value or 0.0))
    if not done:
        return "no setting has a score yet; other processes are at work on this search"
    lines = [f"{len(done)} of {config.trials} settings have a score on dev:", "", "score    trial  setting"]
    lines += [f"{one.value:.4f}  {one.number + 1:>5}  {' '.join(overrides_of(one.params))}" for one in done]
    lines += ["", importance(search, len(done))]
    best = ", ".join(override.replace("=", ": ", 1) for override in overrides_of(done[0].params))
    lines += [f"The best, for `experiments` in {study.path}:", f"  {config.experiment}: {{{best}}}"]
    lines.append(f"Then test it, with new seeds: {study.command} seeds=11,12,13")
    return "\n".join(lines)


def importance(search: optuna.Study, num_done: int) -> str:
    """The share of the scores' variance that each option explains (functional ANOVA, Hutter et al. 2014)."""
    import optuna

    scores = {trial.value for trial in search.get_trials() if trial.value is not None}
    if num_done < 4 or len(scores) < 2:
        return "Which option matters most shows after four settings with different scores."
    found = optuna.importance.get_param_importances(
        search, evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0)
    )
    shown = ", ".join(f"{name} {share:.0%}" for name, share in found.items())
    return f"Share of the differences explained by: {shown}" + " (a guess from few settings)" * (num_done < 20)
