"""What each command and each experiment takes from a study: layers of options for Hydra to compose."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omegaconf import OmegaConf

from pipeline.config.commands import ROOTS
from pipeline.config.schema import ModelConfig, StudentConfig
from pipeline.config.study import EXPERIMENTS, STUDENTS, Study, flat


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
        "command": study.command,
        "runs_dir": file.runs_dir,
        "student": _complete(StudentConfig, content["student"]),
        "window": file.window,
        "dev": content.get("dev"),
        "test": test,
    }
    if file.more_tests:
        train |= {"more_tests": content["more_tests"], "out_of_domain": file.out_of_domain}
    leases = {name: content.get("capture", {}).get(name) for name in ("plans_dir", "lease_seconds")}
    leases = {name: value for name, value in leases.items() if value is not None}
    own = {"study": study.given, "command": study.command, "study_dir": study.config_dir}
    capture = {"name": study.name, "caches_dir": file.caches_dir, "teacher": teacher, "corpus": content["corpus"]}
    return {
        "train": _nested(train | _without_length(content.get("train", {}))),
        "capture": _nested(capture | {"window": file.window} | content.get("capture", {})),
        "evaluate": {} if test is None else {"text": test},
        "audit": {"cache": f"{file.caches_dir}/{study.name}-*", "teacher": teacher},
        "report": {
            "study": study.name,
            "command": study.command,
            "runs": [f"{file.runs_dir}/*"],
            "out": study.report_dir,
        },
        "status": {"runs": [f"{file.runs_dir}/*"], "caches": [f"{file.caches_dir}/*"], **leases},
        "import": {"caches_dir": file.caches_dir},
        "pool": {"caches_dir": file.caches_dir},
        **dict.fromkeys(("study", "submit", "search", "preview"), own),
    }


def experiment_layers(study: Study | None) -> dict[str, dict[str, Any]]:
    """The options of scripts/train.py that each experiment takes from a study; empty without one."""
    if study is None:
        return {name: {} for name in EXPERIMENTS}
    content, runs_dir, cache = study.content, study.file.runs_dir, f"{study.file.caches_dir}/{study.name}-*"
    # `student` is the model that a run trains or scores: without this the teacher would take the student's adapter
    teacher = _complete(ModelConfig, content["teacher"]) | {"adapter": None}
    reads: dict[str, dict[str, Any]] = {
        "teacher": {"student": teacher, "gold": content.get("teacher_labels")},
        "teacher_as_is": {"student": teacher},
        "zero_shot": {},
        "few_shot": {"scoring.few_shot_from": content.get("gold")},
        "gold_only": {"gold": content.get("gold")},
        "weak_only": {"cache": cache},
        "combined": {"gold": content.get("gold"), "cache": cache},
        "cross_fit": {},  # of combined, below which it is
        "cross_fit_gold": {},  # of gold_only
        "pooled": {"cache": f"{study.file.caches_dir}/pooled-{study.name}-*"},
        "ceiling": {"gold": content.get("ceiling")},
    }
    reads |= dict.fromkeys(("shuffled", "smoothed"), reads["combined"])
    splits = {"test": "scoring.teacher_predictions", "dev": "scoring.teacher_dev_predictions"}
    scored = {
        option_name: f"{runs_dir}/teacher-*/predictions-{split}.parquet"
        for split, option_name in splits.items()
        if content.get(split) is not None
    }
    own = content.get("experiments", {})
    own = dict.fromkeys(("shuffled", "smoothed"), own.get("combined", {})) | own
    layers = {
        name: {key: value for key, value in reads[name].items() if value is not None}
        | (scored if name in STUDENTS else {})
        | _one_length(_length(content.get("train", {}), name))
        | _one_length(own.get(name, {}))
        for name in EXPERIMENTS
    }
    # another experiment's settings hold, but for those that they have of their own
    for name, other in (("cross_fit", "combined"), ("cross_fit_gold", "gold_only"), ("pooled", "combined")):
        layers[name] |= _one_length(own.get(other, {})) | _one_length(own.get(name, {}))
    for name in ("cross_fit", "cross_fit_gold"):
        layers[name] |= _dev_of_unscored(content.get("train", {}) | layers[name], content.get("dev"))
    return {name: _nested(layer) for name, layer in layers.items()}


def _dev_of_unscored(settings: Mapping[str, Any], dev: Mapping[str, Any] | None) -> dict[str, Any]:
    """For a run that nothing scores: the study's dev where it decides about the training, else no looks at it."""
    given = flat(settings)
    adapts = given.get("loss.kd.adaptive_weight.every_steps")
    if given.get("export.what") == "best" or given.get("early_stopping.patience") or adapts:
        return {"dev": dev}
    return {"evaluate_every_steps": 0}


def _length(train: Mapping[str, Any], experiment: str) -> dict[str, Any]:
    """The length of every training run of a study, which goes before that of an experiment's file."""
    is_trained = experiment not in ("teacher_as_is", "zero_shot", "few_shot")
    return {name: train[name] for name in ("steps", "epochs") if is_trained and name in train}


def _without_length(train: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in train.items() if name not in ("steps", "epochs")}


def without_groups(layer: dict[str, Any], groups: set[str]) -> dict[str, Any]:
    """A layer without what a group says that was chosen on the command line: loss, deepspeed, adapter."""
    kept = {name: value for name, value in layer.items() if name not in groups}
    if "adapter" in groups and "student" in kept:
        kept["student"] = {name: value for name, value in kept["student"].items() if name != "adapter"}
    return kept


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
    replaced = {other[name]: None for name in other if given.get(name) is not None and other[name] not in given}
    return replaced | dict(given)


def option_text(value: Any) -> str:
    """A value as Hydra's command line reads it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{name}:{option_text(item)}" for name, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(option_text(item) for item in value) + "]"
    return str(value) if isinstance(value, (int, float)) else "'" + value.replace("'", "\\'") + "'"
