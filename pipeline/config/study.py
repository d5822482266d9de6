"""A study: what belongs together, declared once in `conf/study/NAME.yaml`, and what every command takes from it.

The file is turned into layers of options, one for each command and one for each role. Hydra composes them between the
defaults of a command and the options of an experiment, so that everything on the command line still wins.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline.config import schema
from pipeline.config.options import option, options
from pipeline.config.schema import CaptureConfig, ModelConfig, StudentConfig, TextConfig, TrainConfig
from pipeline.core.types import InputError

TEXTS = ("teacher_labels", "corpus", "gold", "dev", "test", "ceiling")
STUDENTS = ("zero_shot", "few_shot", "gold_only", "weak_only", "combined", "shuffled", "smoothed", "ceiling")
"""Experiments that train or score the strong model; the others are of the teacher."""


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


@dataclass
class StudyConfig:
    """Options of scripts/study.py."""

    study: str = option(MISSING, "name of the study: a file in conf/study, or in the folder study of --config-dir")
    seeds: list[int] = option(lambda: [1], "seeds of every student, as seeds=1,2,3")
    experiments: list[str] | None = option(
        None, "experiments to run; null: zero_shot, gold_only, weak_only, combined, and ceiling if the study has one"
    )
    grid: list[str] = option(list, "settings of combined to compare, as grid=kd_weight:0,0.3,1,3")
    controls: list[schema.Control] = option(list, "combined runs with a teacher without knowledge: shuffled, smoothed")
    few_shot: int = option(0, "also score the untrained student with this many gold records before each question")
    label_curve: list[int] = option(
        list, "sizes of gold sets cut from the ceiling's text, trained on alone: how many labels the teacher is worth"
    )
    overrides: list[str] = option(list, "options of scripts/train.py for every student; give them directly")
    launcher: str | None = option(None, "Hydra launcher of the students, such as submitit_slurm; null: one by one here")
    probe_seconds: float = option(20.0, "seconds to measure the speed of this machine for the estimate; 0: no estimate")
    dry_run: bool = option(False, "print the plan and its cost, and run nothing")


ROOTS: dict[str, type] = {**schema.ROOTS, "study": StudyConfig}


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """A study as read from its file."""

    name: str
    path: Path
    content: dict[str, Any]
    """As it stands in the file: the options of `StudyFile` that it gives."""
    file: StudyFile
    """The same, typed and complete."""

    @property
    def trains_teacher(self) -> bool:
        """Whether the teacher is trained here; else it is ready-made."""
        return self.file.teacher_labels is not None

    @property
    def report_dir(self) -> str:
        """Where its report is written."""
        return self.file.report_dir or f"{self.file.runs_dir}/report"


def read_study(path: Path) -> Study:
    """Read and check a study's file; InputError where an option does not exist or a value is of another kind."""
    try:
        content = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise InputError(f"{path}: expected YAML, found {error}; correct the file") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected options as name: value, found {type(content).__name__}")
    base = content.get("text", {})
    texts = {name: {**base, **content[name]} for name in TEXTS if content.get(name) is not None}
    texts |= {"more_tests": {name: {**base, **text} for name, text in content.get("more_tests", {}).items()}}
    try:
        typed = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(StudyFile), content, texts))
        for text in texts["more_tests"].values():
            OmegaConf.merge(OmegaConf.structured(TextConfig), text)
    except OmegaConfBaseException as error:
        near = difflib.get_close_matches(str(error.key), [item.name for item in dataclasses.fields(StudyFile)], n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise InputError(f"{path}: {str(error).splitlines()[0]} ({error.full_key}){hint}") from error
    assert isinstance(typed, StudyFile)
    for where, given, root in _free_options(content):
        _check_names(path, where, given, root)
    return Study(name=path.stem, path=path, content=content | texts, file=typed)


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


# ------------------------------------------------------------------------------------------- layers


def command_layers(study: Study | None) -> dict[str, dict[str, Any]]:
    """The options that each command takes from a study, by the command's name; empty without one."""
    if study is None:
        return {root: {} for root in ROOTS}
    content, file = study.content, study.file
    teacher = _complete(ModelConfig, content["teacher"])
    if study.trains_teacher:
        kept = {name: teacher[name] for name in ("dtype", "attention", "trust_remote_code")}
        teacher = _complete(ModelConfig, kept | {"path": f"{file.runs_dir}/teacher-*/model"})
    test = content.get("test")
    train = {
        "study": study.name,
        "runs_dir": file.runs_dir,
        "student": _complete(StudentConfig, content["student"]),
        "window": file.window,
        "dev": content.get("dev"),
        "test": test,
    }
    if file.more_tests:
        train |= {"more_tests": content["more_tests"], "out_of_domain": file.out_of_domain}
    capture = {"name": study.name, "caches_dir": file.caches_dir, "teacher": teacher, "corpus": content["corpus"]}
    return {
        "train": _nested(train | _one_length(content.get("train", {}))),
        "capture": _nested(capture | {"window": file.window} | content.get("capture", {})),
        "evaluate": {} if test is None else {"text": test},
        "audit": {"cache": f"{file.caches_dir}/{study.name}-*", "teacher": teacher},
        "report": {"study": study.name, "runs": [f"{file.runs_dir}/*"], "out": study.report_dir},
        "import": {"caches_dir": file.caches_dir},
        "study": {"study": study.name},
    }


def experiment_layers(study: Study | None) -> dict[str, dict[str, Any]]:
    """The options of scripts/train.py that each experiment takes from a study; empty without one."""
    names = ("teacher", "teacher_as_is", *STUDENTS)
    if study is None:
        return {name: {} for name in names}
    content, runs_dir, cache = study.content, study.file.runs_dir, f"{study.file.caches_dir}/{study.name}-*"
    teacher = _complete(ModelConfig, content["teacher"])
    reads = {
        "teacher": {"student": teacher, "gold": content.get("teacher_labels")},
        "teacher_as_is": {"student": teacher},
        "zero_shot": {},
        "few_shot": {"scoring.few_shot_from": content.get("gold")},
        "gold_only": {"gold": content.get("gold")},
        "weak_only": {"cache": cache},
        "combined": {"gold": content.get("gold"), "cache": cache},
        "ceiling": {"gold": content.get("ceiling")},
    }
    reads |= {control: reads["combined"] for control in ("shuffled", "smoothed")}
    scored = {
        "scoring.teacher_predictions": f"{runs_dir}/teacher-*/predictions-test.parquet",
    }
    own = content.get("experiments", {})
    own = {control: own.get("combined", {}) for control in ("shuffled", "smoothed")} | own
    return {
        name: _nested(
            {key: value for key, value in reads[name].items() if value is not None}
            | (scored if name in STUDENTS else {})
            | _one_length(own.get(name, {}))
        )
        for name in names
    }


def without_groups(layer: dict[str, Any], groups: set[str]) -> dict[str, Any]:
    """A layer without what a group says that was chosen on the command line: loss, deepspeed, adapter."""
    kept = {name: value for name, value in layer.items() if name not in groups}
    if "adapter" in groups and "student" in kept:
        kept["student"] = {name: value for name, value in kept["student"].items() if name != "adapter"}
    return kept


def flat(given: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options by their dotted names; a dictionary without keys is a value."""
    found: dict[str, Any] = {}
    for name, value in given.items():
        is_nested = isinstance(value, Mapping) and value
        found |= flat(value, f"{prefix}{name}.") if is_nested else {prefix + name: value}
    return found


def _nested(given: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse: dotted names as nested dictionaries; the later of two wins."""
    found: dict[str, Any] = {}
    for name, value in flat(given).items():
        *parents, last = name.split(".")
        place = found
        for parent in parents:
            if not isinstance(place.get(parent), dict):
                place[parent] = {}
            place = place[parent]
        place[last] = value
    return found


def _complete(schema_of: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """All options of a model: those not given are as by default, whatever another layer says."""
    defaults = OmegaConf.to_container(OmegaConf.structured(schema_of), enum_to_str=True)
    assert isinstance(defaults, dict)
    return {str(name): value for name, value in defaults.items()} | dict(given)


def _one_length(given: Mapping[str, Any]) -> dict[str, Any]:
    """Of `steps` and `epochs` the one that is given replaces the other one of an experiment."""
    other = {"steps": "epochs", "epochs": "steps"}
    return {other[name]: None for name in other if given.get(name) is not None and other[name] not in given} | dict(given)
