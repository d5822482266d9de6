"""A study: what belongs together, declared once in `conf/study/NAME.yaml`, and what every command takes from it.

The file is turned into layers of options, one for each command and one for each role. Hydra composes them between the
defaults of a command and the options of an experiment, so that everything on the command line still wins.
"""

from __future__ import annotations

import dataclasses
import difflib
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from pipeline.config.options import option, options
from pipeline.config.schema import CaptureConfig, ModelConfig, StudentConfig, TextConfig, TrainConfig
from pipeline.core.types import InputError

TEXTS = ("teacher_labels", "corpus", "gold", "dev", "test", "ceiling")
STUDENTS = ("zero_shot", "few_shot", "gold_only", "weak_only", "combined", "pooled", "shuffled", "smoothed", "ceiling")
"""Experiments that train or score the strong model."""
EXPERIMENTS = ("teacher", "teacher_as_is", "cross_fit", "cross_fit_gold", *STUDENTS)
SET_ELSEWHERE = {
    "gold_fraction": "each experiment has its own; write it in experiments.combined",
    "name": "each experiment has its own; leave it out",
    "role": "each experiment has its own; leave it out",
    "seed": "a study has several; use seeds= of scripts/study.py",
}
"""Options that every run sets after `train` of a study's file: there they would have no effect."""
SECTIONS = ("teacher", "student", "text", *TEXTS, "more_tests", "capture", "train", "experiments")
"""The options of a study's file that hold further options."""


@dataclass
class StudyFile:
    """What `conf/study/NAME.yaml` may hold; options of texts and models are those of every command."""

    teacher: ModelConfig = option(ModelConfig, "the weak model: to be trained on teacher_labels, or ready-made")
    student: StudentConfig = option(StudentConfig, "the strong model, before training")
    window: int = option(512, "longest sequence, in tokens, in both stages")
    runs_dir: str = option("runs", "folder of this study's runs")
    caches_dir: str = option("caches", "folder of this study's caches")
    report_dir: str | None = option(None, "folder of the report; null: `report` in runs_dir")
    text: dict[str, Any] = option(dict, "options of all texts below, as {targets: completion, end_token: false}")
    teacher_labels: TextConfig | None = option(None, "labeled text that trains the teacher; null: it is ready-made")
    corpus: TextConfig = option(TextConfig, "unlabeled text that the teacher labels")
    gold: TextConfig = option(TextConfig, "the small trusted text")
    dev: TextConfig | None = option(None, "held-out text for decisions; null: none")
    test: TextConfig | None = option(None, "held-out text for the reported scores")
    more_tests: dict[str, Any] = option(dict, "further test texts by name, as {news: {files: [news.jsonl]}}")
    out_of_domain: list[str] = option(list, "those of more_tests whose domain is not that of the corpus")
    ceiling: TextConfig | None = option(None, "true labels of the corpus, or as many of its kind; null: no ceiling")
    allow_shared_records: bool = option(False, "accept records that two of these texts have in common")
    capture: dict[str, Any] = option(dict, "further options of scripts/capture.py, as {k: 32}")
    train: dict[str, Any] = option(dict, "further options of every training run, as {global_batch: 16}")
    experiments: dict[str, Any] = option(dict, "options of one role alone, as {combined: {gold_fraction: 0.1}}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """A study as read from its file."""

    name: str
    path: Path
    given: str
    """As it was named on the command line."""
    config_dir: str | None
    """The folder of --config-dir."""
    content: dict[str, Any]
    """As it stands in the file: the options of `StudyFile` that it gives."""
    file: StudyFile
    """The same, typed and complete."""

    @property
    def trains_teacher(self) -> bool:
        """Whether the teacher is trained here; else it is ready-made."""
        return self.file.teacher_labels is not None

    @property
    def command(self) -> str:
        """How it is run: the beginning of each command that a report recommends."""
        return script_command("study", study=self.given, config_dir=self.config_dir)

    @property
    def report_dir(self) -> str:
        """Where its report is written."""
        return self.file.report_dir or f"{self.file.runs_dir}/report"


def script_command(script: str, *, study: str, config_dir: str | None) -> str:
    """How a script is run with a study, for a shell in this folder: the script beside the one that runs now."""
    called = Path(sys.argv[0])
    folder = called.parent if called.absolute().parent.name == "scripts" else Path("scripts")
    place = "" if config_dir is None else f" --config-dir {shlex.quote(config_dir)}"
    return f"python {shlex.quote(str(folder / f'{script}.py'))} study={shlex.quote(study)}{place}"


def read_study(path: Path, *, given: str | None = None, config_dir: str | None = None) -> Study:
    """Read and check a study's file; InputError where an option does not exist or a value is of another kind."""
    try:
        content = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise InputError(f"{path}: expected YAML, found {error}; correct the file") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected options as name: value, found {type(content).__name__}")
    content = _without_empty(path, content)
    _check_free_options(path, content)
    base = content.get("text", {})
    texts = {name: {**base, **content[name]} for name in TEXTS if name in content}
    texts |= {"more_tests": {name: {**base, **text} for name, text in content.get("more_tests", {}).items()}}
    try:
        typed = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(StudyFile), content, texts))
        declared = {"more_tests": dict.fromkeys(texts["more_tests"], TextConfig)}
        OmegaConf.to_object(OmegaConf.merge(declared, {"more_tests": texts["more_tests"]}))
    except MissingMandatoryValue as error:
        raise InputError(f"{path}: expected a value for {error.full_key}, found none; add it") from error
    except OmegaConfBaseException as error:
        near = difflib.get_close_matches(str(error.key), [item.name for item in dataclasses.fields(StudyFile)], n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise InputError(f"{path}: {str(error).splitlines()[0]} ({error.full_key}){hint}") from error
    assert isinstance(typed, StudyFile)
    return Study(
        name=path.stem,
        path=path,
        given=path.stem if given is None else given,
        config_dir=config_dir,
        content=content | texts,
        file=typed,
    )


def _without_empty(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """The file without options that have no value, as `train:`; InputError where options are no dictionary."""
    kept = {name: value for name, value in content.items() if value is not None}
    for name in SECTIONS:
        if name in kept:
            _check_is_section(path, name, kept[name])
    for name in ("more_tests", "experiments"):
        if name in kept:
            kept[name] = {inner: {} if value is None else value for inner, value in kept[name].items()}
            for inner, value in kept[name].items():
                _check_is_section(path, f"{name}.{inner}", value)
    return kept


def _check_is_section(path: Path, name: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise InputError(f"{path}: {name}: expected options as name: value, found {value!r}; write them so")


def _check_free_options(path: Path, content: Mapping[str, Any]) -> None:
    for name in flat(content.get("train", {})):
        if name in SET_ELSEWHERE:
            raise InputError(f"{path}: train: expected options of every run, found {name}: {SET_ELSEWHERE[name]}")
    for name in content.get("more_tests", {}):
        if not isinstance(name, str) or "." in name or name in TEXTS:
            raise InputError(
                f"{path}: more_tests: expected names as text, without '.' and other than {', '.join(TEXTS)}, found "
                f"{name!r}; choose another"
            )
    for name in content.get("experiments", {}):
        if name not in EXPERIMENTS:
            near = difflib.get_close_matches(str(name), EXPERIMENTS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(EXPERIMENTS)}"
            raise InputError(f"{path}: experiments: expected the name of an experiment, found {name!r}; {hint}")
    for where, found, root in _free_options(content):
        _check_names(path, where, found, root)


def _free_options(content: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any], type]]:
    found: list[tuple[str, Mapping[str, Any], type]] = [("train", content.get("train", {}), TrainConfig)]
    found.append(("capture", content.get("capture", {}), CaptureConfig))
    found += [(f"experiments.{name}", given, TrainConfig) for name, given in content.get("experiments", {}).items()]
    return found


def _check_names(path: Path, where: str, given: Mapping[str, Any], root: type) -> None:
    known = {name for name, _, _ in options(root)}
    free = tuple(f"{name}." for name, default, _ in options(root) if default == {})
    for name in flat(given):
        if name not in known and not name.startswith(free):
            near = difflib.get_close_matches(name, sorted(known), n=2)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise InputError(f"{path}: {where}: expected the name of an option, found {name!r}{hint}")


def flat(given: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options by their dotted names; a dictionary without keys is a value."""
    found: dict[str, Any] = {}
    for name, value in given.items():
        is_nested = isinstance(value, Mapping) and value
        found |= flat(value, f"{prefix}{name}.") if is_nested else {f"{prefix}{name}": value}
    return found


def more_tests_of(study: Study) -> dict[str, TextConfig]:
    """The further test texts of a study by name, typed, with the options that all its texts share."""
    found: dict[str, Any] = {
        name: OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(TextConfig), text))
        for name, text in (study.content.get("more_tests") or {}).items()
    }
    return found


# -------------------------------------------------------------------------------------------------------------- init


@dataclass
class InitConfig:
    """Options of `scripts/study.py init`; texts are files, folders or globs, several with commas between them."""

    name: str = option(MISSING, "name of the study, and of its file")
    teacher: str = option(MISSING, "the weak model: a folder in Hugging Face layout, or a hub name")
    student: str = option(MISSING, "the strong model, before training: a folder or a hub name")
    corpus: str = option(MISSING, "unlabeled records, which the teacher labels")
    gold: str | None = option(None, "the small trusted text: labeled records that train the student")
    test: str | None = option(None, "labeled records, held out for the reported scores")
    dev: str | None = option(None, "labeled records, held out for decisions; null: none")
    labeled: str | None = option(None, "in place of gold, dev and test: labeled records to be cut into the three")
    teacher_labels: str | None = option(None, "labeled records that train the teacher; null: it is ready-made")
    ceiling: str | None = option(None, "the corpus with its true labels, or as many of its kind; null: no ceiling")
    teacher_num_layers: int | None = option(None, "keep only this many first layers of the teacher; null: all")
    prompt_column: str | None = option(None, "column of the prompt; null: found by its name")
    completion_column: str | None = option(None, "column of the label or completion; null: found by its name")
    window: int | None = option(None, "longest sequence, in tokens; null: found from the records")
    gold_records: int | None = option(None, "labeled: this many records of it become gold; null: 35 %")
    seed: int = option(0, "labeled: seed of the cut")
    allow_shared_records: bool = option(False, "accept records that two of the texts have in common")
    folder: str | None = option(
        None, "folder of the study's file, called study; null: conf/study where it exists, else study"
    )
