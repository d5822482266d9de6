"""`scripts/study.py preview`: from a study and its teacher's cache to a ranking of recipes."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pipeline.cache.manifest import committed_shards, load_manifest, manifest_path
from pipeline.config.commands import PreviewConfig
from pipeline.config.compose import open_study
from pipeline.config.overrides import compose_job
from pipeline.config.schema import ModelConfig
from pipeline.config.study import Study
from pipeline.config.validate import at_least, positive
from pipeline.core.files import check_writable, is_hub_name, is_url, matching_paths, write_json
from pipeline.core.folds import fold_of
from pipeline.core.object_store import Location, one_location
from pipeline.core.progress import Progress, log, readable_duration, start_logging
from pipeline.core.types import InputError, Manifest, TokenSequence
from pipeline.data.text_files import open_text
from pipeline.data.tokenize import text_hash
from pipeline.declare.leaks import check_texts
from pipeline.models.model_files import weights_hash
from pipeline.models.paths import model_folder
from pipeline.models.tokenizer import check_same_tokenizer, open_tokenizer, vocabulary_size
from pipeline.preview.features import Features, Reading, open_features
from pipeline.preview.linear import Lesson, Reduction, choose_l2, fit_reduction
from pipeline.preview.ranking import Ranked, advice, as_plain, disproof, rank, table
from pipeline.preview.recipes import RECIPES
from pipeline.preview.texts import (
    Corpus,
    HeldOut,
    choose_outcomes,
    columns_of,
    gold_only_on_dev,
    outcome_log_probs,
    read_corpus,
    read_dev,
    read_gold,
    sequence_of_records,
)
from pipeline.preview.trials import Exam, Options, Scored, Source, run_trials

FEWEST_GOLD = 8  # records
LARGEST_GRADIENT = 1e-3  # at the end of training: of a function of a few nats


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Material:
    """All that a preview reads, before any model runs."""

    teacher: ModelConfig
    cache: Location
    manifest: Manifest
    corpus: Corpus
    gold: list[TokenSequence]
    dev: HeldOut | None
    outcome_ids: torch.Tensor
    tokenizer: Any


def run(config: PreviewConfig) -> list[Ranked]:
    """Rank the recipes of a study; prints them, and writes preview.json into its runs_dir."""
    start_logging()
    started, study = time.monotonic(), open_study(config.study, config.study_dir)
    check_preview(config, study)
    material = read_material(config, study)
    features = features_of(config, study, material)
    corpus, gold, dev, reduction = sources(config, material, features)
    log.info("choosing the l2 of linear students by their cross entropy with the teacher")
    l2, tried = choose_l2(lesson_of(corpus), folds=config.folds)
    ranked = rank(RECIPES, trials(config, corpus, gold, dev, l2))
    fields = fields_of(study, material.cache, folds=config.folds)
    what = "dev" if dev is not None else f"gold, by cross-validation on its {len(gold.folds_N)} records: wide intervals"
    seconds = time.monotonic() - started
    print(f"Preview of study {study.name}: linear students of {len(corpus.folds_N)} records, scored on {what}\n")
    print("\n".join([*table(ranked), "", *advice(ranked, fields), *disproof(ranked, gold_only_on_dev(study))]))
    print(f"\n{readable_duration(seconds)}; all numbers: {Path(study.file.runs_dir) / 'preview.json'}")
    write_json(
        Path(study.file.runs_dir) / "preview.json",
        {
            "study": study.name,
            "cache": str(material.cache),
            "features": str(features.folder),
            "layers": list(features.layers),
            "scored_on": "dev" if dev is not None else "gold",
            "num_records": {"corpus": len(corpus.folds_N), "gold": len(gold.folds_N)},
            "outcomes": [material.tokenizer.decode([token]) for token in material.outcome_ids.tolist()],
            "components": reduction.axes_FP.shape[1],
            "l2": l2,
            "teacher_cross_entropy_by_l2": tried,
            "resamples": config.resamples,
            "folds": config.folds,
            "seconds": seconds,
            "recipes": [as_plain(one, fields) for one in ranked],
        },
    )
    return ranked


def check_preview(config: PreviewConfig, study: Study) -> None:
    """Refuse contradictory options, and a study without gold, before anything is read."""
    if config.overrides:
        raise InputError(
            f"{config.overrides[0]}: expected an option of the preview, found one of training; a recipe's options are "
            "its own (scripts/study.py preview --help lists those of the preview)"
        )
    at_least(1, resamples=config.resamples, components=config.components, batch_sequences=config.batch_sequences)
    at_least(2, folds=config.folds)
    at_least(50, max_records=config.max_records)
    positive(log_every_seconds=config.log_every_seconds)
    if not config.depths or not all(0 < depth <= 1 for depth in config.depths):
        raise InputError(f"depths: expected fractions above 0 and up to 1, found {config.depths}; as depths=0.5,1")
    if not study.content.get("gold"):
        raise InputError(f"{study.path}: expected gold, which recipes learn from, found none; add it")
    texts = {name: getattr(study.file, name) for name in ("teacher_labels", "corpus", "gold", "dev")}
    check_texts(
        {name: text for name, text in texts.items() if text is not None}, allowed=study.file.allow_shared_records
    )
    check_writable(Path(study.file.runs_dir), "runs_dir")


# ------------------------------------------------------------------------------------------- inputs


def find_cache(config: PreviewConfig, study: Study) -> tuple[ModelConfig, Location]:
    """The study's teacher and its capture of the corpus; InputError with the command that makes what is missing."""
    teacher: ModelConfig = compose_job("capture", [], study=study).teacher
    is_glob = not Path(teacher.path).is_dir() and not is_hub_name(teacher.path)
    folders = matching_paths(teacher.path) if is_glob else [model_folder(teacher.path, revision=teacher.revision)]
    capture = study.command.replace("study.py", "capture.py")
    if not folders:
        train = f"{study.command.replace('study.py', 'train.py')} experiment=teacher"
        raise InputError(
            f"{teacher.path}: expected the study's teacher, found none; train it and capture the corpus: {train} && "
            f"{capture}"
        )
    if config.cache is None and is_url(study.file.caches_dir):
        raise InputError("cache: expected the address of the cache, because caches_dir is a URL, found null; give it")
    pattern = config.cache or f"{study.file.caches_dir}/{study.name}-*"
    caches = [one_location(pattern, "cache")] if config.cache else matching_paths(pattern)
    corpus = text_hash(open_text(study.file.corpus, "corpus"))
    hashes = {weights_hash(folder): folder for folder in folders}
    found = []
    for cache in caches:
        made_of = load_manifest(cache).made_of if manifest_path(cache).exists() else {}
        folder = hashes.get(made_of.get("teacher_weights", ""))
        is_whole = "only_fold" not in made_of and made_of.get("teacher_num_layers") == teacher.num_layers
        if folder is not None and made_of["corpus"] == corpus and is_whole:
            found.append((dataclasses.replace(teacher, path=str(folder)), cache))
    if len(found) == 1:
        return found[0]
    several = f"found {', '.join(str(cache) for _, cache in found)}; give cache=FOLDER"
    missing = f"found none that fits in {pattern}; make it: {capture}"
    raise InputError(
        f"cache: expected one capture of the study's corpus by its teacher, {several if found else missing}"
    )


def read_material(config: PreviewConfig, study: Study) -> Material:
    """Texts and the teacher's distributions; InputError where a preview cannot read them."""
    teacher, cache = find_cache(config, study)
    manifest = load_manifest(cache)
    committed_shards(cache, manifest)
    folder, tokenizer = open_tokenizer(study.file.student)
    check_same_tokenizer(manifest, tokenizer, cache=str(cache), student=study.file.student.path)
    corpus, window = read_corpus(config, cache), study.file.window
    gold = read_gold(study.file.gold, tokenizer, window=window)
    num_gold = sum(len(sequence.record_ids) for sequence in gold)
    if num_gold < FEWEST_GOLD:
        raise InputError(f"gold: expected at least {FEWEST_GOLD} records, found {num_gold}; give more")
    file = study.file
    dev = None if file.dev is None else read_dev(file.dev, tokenizer, folder=folder, window=window)
    required = [token for sequence in gold for token in sequence.target_ids_N.tolist()]
    required += [] if dev is None else [token for choices in dev.choice_ids for token in choices]
    return Material(
        teacher=teacher,
        cache=cache,
        manifest=manifest,
        corpus=corpus,
        gold=gold,
        dev=dev,
        outcome_ids=choose_outcomes(corpus.top, required, vocabulary_size=manifest.vocabulary_size),
        tokenizer=tokenizer,
    )


def features_of(config: PreviewConfig, study: Study, material: Material) -> Features:
    """Hidden states of the untrained student, from the sidecar or computed."""
    reading = Reading(
        student=study.file.student,
        teacher=material.teacher,
        depths=tuple(config.depths),
        vocabulary_size=vocabulary_size(material.tokenizer),
        batch_sequences=config.batch_sequences,
        log_every_seconds=config.log_every_seconds,
    )
    texts = {"corpus": material.corpus.sequences, "gold": material.gold}
    if material.dev is not None:
        texts["dev"] = material.dev.sequences
    place = study.file.runs_dir if is_url(study.file.caches_dir) else study.file.caches_dir
    return open_features(
        reading, texts, material.outcome_ids, cache_fingerprint=material.manifest.fingerprint, place=Path(place)
    )


def sources(
    config: PreviewConfig, material: Material, features: Features
) -> tuple[Source, Source, Exam | None, Reduction]:
    """What linear students learn from, and what they are scored on, with features reduced as the corpus asks."""
    reduction = fit_reduction(features.states["corpus"], components=config.components)
    ids, gold = material.outcome_ids, material.gold
    corpus = Source(
        features_NP=reduction(features.states["corpus"]),
        teacher_NC=outcome_log_probs(material.corpus.top, ids),
        folds_N=folds_of(material.corpus.sequences, config.folds),
    )
    answers = torch.cat([sequence.target_ids_N for sequence in gold])
    of_gold = Source(
        features_NP=reduction(features.states["gold"]),
        teacher_NC=features.teacher_gold_GC.double(),
        folds_N=folds_of(gold, config.folds),
        answer_N=columns_of(answers.tolist(), ids),
    )
    if max(corpus.folds_N.bincount(minlength=config.folds)) == len(corpus.folds_N):
        raise InputError(f"folds={config.folds}: expected records in two of them or more, found all in one; add text")
    return corpus, of_gold, None if material.dev is None else exam_of(material.dev, reduction, features, ids), reduction


def lesson_of(corpus: Source) -> Lesson:
    """The corpus with the teacher's distributions: what weak_only learns."""
    return Lesson(features_NP=corpus.features_NP, targets_NC=corpus.teacher_NC.exp(), folds_N=corpus.folds_N)


def exam_of(dev: HeldOut, reduction: Reduction, features: Features, outcome_ids: torch.Tensor) -> Exam:
    """Dev with its choices as outcomes."""
    is_choice_DC = torch.zeros(len(dev.answers), len(outcome_ids) + 1, dtype=torch.bool)
    for row, choices in enumerate(dev.choice_ids):
        is_choice_DC[row, columns_of(choices, outcome_ids)] = True
    answers = [choices[answer] for choices, answer in zip(dev.choice_ids, dev.answers, strict=True)]
    return Exam(
        features_DP=reduction(features.states["dev"]),
        answer_D=columns_of(answers, outcome_ids),
        is_choice_DC=is_choice_DC,
    )


def folds_of(sequences: Any, folds: int) -> torch.Tensor:
    """int64 [N]: the fold of each record's sequence."""
    return torch.tensor([fold_of(key, folds) for key in sequence_of_records(sequences)])


# ------------------------------------------------------------------------------------------- trials


def trials(config: PreviewConfig, corpus: Source, gold: Source, dev: Exam | None, l2: float) -> list[list[Scored]]:
    """The scores of all recipes on each resample."""
    options = Options(l2=l2, folds=config.folds, seed=config.seed)
    total = config.resamples * len(RECIPES)
    progress = Progress("recipes", total=total, unit=" students", log_every_seconds=config.log_every_seconds)
    found: list[list[Scored]] = []
    for number in range(config.resamples):
        found.append(run_trials(RECIPES, corpus, gold, dev, options, number))
        progress.advance(len(RECIPES))
    progress.close()
    largest = max(scored.gradient for of_resample in found for scored in of_resample)
    if largest > LARGEST_GRADIENT:
        log.warning("a linear student ended %g from its optimum (largest entry of the gradient)", largest)
    return found


def fields_of(study: Study, cache: Location, *, folds: int) -> Mapping[str, str]:
    """What the commands of recipes name: the scripts with their study, the cache and the folder of caches."""
    place = study.file.caches_dir
    return {
        "TRAIN": study.command.replace("study.py", "train.py"),
        "POOL": study.command.replace("study.py", "pool.py"),
        "STUDY": study.command,
        "FOLDS": str(folds),
        "CACHE": str(cache),
        "CACHES": place,
    }
