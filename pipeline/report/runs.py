"""Run folders -> frozen values: options, identity, scores and role of each finished run.

Two runs have the same settings where everything that decides the trained weights is equal, the seed apart. Options that
nothing reads in a run do not count: without a teacher's cache, for example, the KD weight decides nothing.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.config.options import RENAMED_OPTIONS, RENAMED_VALUES, identity_options
from pipeline.config.schema import Role, TrainConfig
from pipeline.core.files import RunPaths, content_hash, matching_paths
from pipeline.core.progress import log
from pipeline.core.types import InputError
from pipeline.report.pools import kept_pool, pool_of

OTHER = "other"
"""The role of a run that has none: it stands in the table and in no conclusion."""
MEMBER = Role.member.name
"""The role of a run that another one learns from, as a part of its pool: no arm of a report."""
NOT_OF_TRAINING = ("test", "teacher_predictions")  # parts of identity.json that change only what is measured
YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # forty times as fast as a typed configuration


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StudyRun:
    """One finished run."""

    folder: Path
    role: str
    """A role of `config.schema.Role`, or `OTHER`."""
    name: str
    """The experiment's name."""
    seed: int
    config: Mapping[str, Any]
    """config.yaml as plain data: every option."""
    identity: Mapping[str, Any]
    """identity.json: options and inputs by content."""
    result: Mapping[str, Any]
    """result.json: the scores."""
    options: Mapping[str, Any]
    """Options that decide the result, by dotted name, without name, seed and those that nothing reads."""
    inputs: Mapping[str, str]
    """Hashes of what the run was made of: student, cache, gold, ..."""
    settings: str
    """Hash of role, options and inputs: equal for the seeds of an arm."""
    pool: Mapping[str, Any] | None = None
    """What the pool that it has read is made of; None where that was no pool."""

    @property
    def paths(self) -> RunPaths:
        """The files of the run folder."""
        return RunPaths(folder=self.folder)

    @property
    def reads_cache(self) -> bool:
        """Whether a teacher's distributions were read."""
        return "cache" in self.inputs or "gold_cache" in self.inputs

    @property
    def reads_gold(self) -> bool:
        """Whether trusted labels were read."""
        return "gold" in self.inputs or "gold_cache" in self.inputs


def read_runs(patterns: Sequence[str]) -> list[StudyRun]:
    """All finished runs with test scores, by folder; those left out are named in a warning.

    InputError where there is none, or where they were scored on different test texts.
    """
    folders = sorted({path for pattern in patterns for path in matching_paths(pattern)})
    runs, unfinished, unscored, renamed = [], list[Path](), list[Path](), set[str]()
    for paths in (RunPaths(folder=folder) for folder in folders):
        if not paths.config.exists():
            continue
        if not paths.result.exists():
            if read_config(paths.config).get("role") != MEMBER:
                unfinished.append(paths.folder)
            continue
        run = read_run(paths)
        if run.role == MEMBER:
            continue
        if not run.result.get("test"):
            unscored.append(paths.folder)
            continue
        if run.config.get("role") is None and run.role not in (OTHER, "control"):
            renamed.add(run.role)
        runs.append(run)
    for what, left_out in (("not finished", unfinished), ("without scores on a test text", unscored)):
        for folder in left_out:
            log.warning("%s is %s: left out", folder, what)
    if renamed:
        log.info("runs without a role are taken for what they are called: %s", ", ".join(sorted(renamed)))
    if not runs:
        raise InputError(
            f"runs: expected finished run folders with test scores, found none in {list(patterns)}; train with "
            "scripts/train.py, or give the folders with runs="
        )
    check_same_text(runs)
    return runs


def read_run(paths: RunPaths) -> StudyRun:
    """One finished run from its folder."""
    config = read_config(paths.config)
    result = json.loads(paths.result.read_text())
    identity = json.loads(paths.identity.read_text())
    role = role_of(config)
    options, inputs = options_and_inputs(identity)
    seed = int(options.pop("seed", config["seed"]))
    name = options.pop("name", config["name"])
    return StudyRun(
        folder=paths.folder,
        role=role,
        name=name,
        seed=seed,
        config=config,
        identity=identity,
        result=result,
        options=options,
        inputs=inputs,
        settings=content_hash([role, name if role == OTHER else None, options, inputs]),
        pool=kept_pool(paths.folder) or pool_of(config.get("cache"), identity.get("cache")),
    )


def options_and_inputs(identity: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Of identity.json: the options that decide the result, by dotted name, and hashes of what the run is made of."""
    options = _flat(identity["options"])
    inputs = _inputs(identity, options)
    return effective_options(options, inputs), inputs


def read_config(path: Path) -> dict[str, Any]:
    """The options of a run as plain data: those of any version, known today or not."""
    return dict(yaml.load(path.read_text(), Loader=YAML_LOADER))


def role_of(config: Mapping[str, Any]) -> str:
    """The role of a run: as configured; else its name where that is a role; else `OTHER`.

    A run whose teacher was replaced (loss.kd.control) is a control, whatever else it is called.
    """
    control = ((config.get("loss") or {}).get("kd") or {}).get("control", "none")
    if control != "none" and config.get("cache") is not None:
        return "control"
    configured = config.get("role")
    if configured is not None:
        return str(configured)
    return config["name"] if config["name"] in Role.__members__ else OTHER


def text_of(run: StudyRun, test: str) -> str | None:
    """The hash of a test text on which a run was scored: `test`, or the name of a further one."""
    scores = scores_on(run, test) or {}
    return scores.get("text") or (run.identity.get("test") if test == "test" else None)


def scores_on(run: StudyRun, test: str) -> Mapping[str, Any] | None:
    """The scores of a run on a test text, as in result.json; None where it has none."""
    scores: Mapping[str, Any] | None = run.result["test"] if test == "test" else run.result.get("more", {}).get(test)
    return scores


def check_same_text(runs: Sequence[StudyRun], test: str = "test") -> None:
    """InputError where the scores of some runs are of different texts, which must not be compared.

    Runs of an earlier version name a text by another hash: beside new ones only their records tell whether it is the
    same, when predictions are joined.
    """
    by_version: dict[bool, dict[str | None, list[str]]] = {True: defaultdict(list), False: defaultdict(list)}
    for run in runs:
        scores = scores_on(run, test)
        if scores is not None:
            by_version["text" in scores][text_of(run, test)].append(str(run.folder))
    for texts in by_version.values():
        if len(texts) > 1:
            shown = "; ".join(", ".join(folders) for folders in texts.values())
            what = "test text" if test == "test" else f"text called {test}"
            raise InputError(f"runs: expected one {what}, found {len(texts)}: {shown}; report them apart, with runs=")
    if all(by_version.values()):
        log.info("%s: some runs were scored by an earlier version; that it is the same text, its records show", test)


# ------------------------------------------------------------------------------------------- options


def _flat(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options by dotted name, those of earlier versions by today's, absent ones as by default."""
    found = dict(_leaves(options))
    for old, new in RENAMED_OPTIONS.items():
        for name in [name for name in found if name == old or name.startswith(f"{old}.")]:
            found[new + name[len(old) :]] = found.pop(name)
    for name, values in RENAMED_VALUES.items():
        if name in found:
            found[name] = values.get(found[name], found[name])
    return DEFAULTS | found


def _leaves(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in options.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


DEFAULTS = dict(_leaves(identity_options(TrainConfig())))


def effective_options(options: Mapping[str, Any], inputs: Mapping[str, str]) -> dict[str, Any]:
    """The options without those that nothing reads in a run with these inputs: they cannot change the result."""
    from_cache, from_gold = {"cache", "gold_cache"} & inputs.keys(), {"gold", "gold_cache"} & inputs.keys()
    unread = ["test"] if dev_decides(options) else ["test", "dev"]
    if options["steps"] == 0:
        unread += [name for name in options if not name.startswith(("student.", "scoring.")) and name not in KEPT]
    if not from_cache:
        unread += ["loss.kd", "loss.hard", "loss.confidence", "k", "cache_weights", "curriculum_parts"]
    if not from_gold:
        unread += ["gold_epochs", "gold_fraction_of"]
        unread += [] if "corpus" in options["loss.lm.on"] else ["loss.lm"]
    if not options["loss.kd.weight"]:
        unread += [f"loss.kd.{name}" for name in KD_ALONE]
        unread += [] if options["loss.confidence.weight"] else ["loss.kd.gate"]
        weighs = options["loss.confidence.weight"] or options["loss.hard.weight"]
        unread += [] if weighs else ["loss.kd.position_weight"]
    for term in ("hard", "confidence"):
        parts = [name for name in options if name.startswith(f"loss.{term}.") and not name.endswith(".weight")]
        unread += [] if options[f"loss.{term}.weight"] else parts
    unread += [] if options["early_stopping.patience"] else ["early_stopping.min_delta"]
    below = tuple(f"{name}." for name in unread)
    return {name: value for name, value in options.items() if name not in unread and not name.startswith(below)}


KEPT = ("name", "seed", "steps")
KD_ALONE = (
    *("ramp", "on", "temperature", "temperature_squared", "divergence", "beta", "tail_weight", "adaptive_weight"),
)
"""Of loss.kd, read by its own term alone; confidence has its gate too, and control changes what all terms read."""


def dev_decides(options: Mapping[str, Any]) -> bool:
    """Whether the dev text changes the trained weights, or which of them are exported."""
    is_best = options["export.what"] == "best"
    return bool(is_best or options["early_stopping.patience"] or options["loss.kd.adaptive_weight.every_steps"])


def _inputs(identity: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, str]:
    """What a run was made of, by content: a hash each. Of dev only where it decided something."""
    left_out = ["options", *NOT_OF_TRAINING] + ([] if dev_decides(options) else ["dev"])
    found = {
        name: value if isinstance(value, str) else content_hash(value)
        for name, value in identity.items()
        if name not in left_out
    }
    take = (identity["options"].get("gold") or {}).get("take")
    if take is not None and "gold" in found:  # the first records of the same files are another gold set
        found["gold"] = content_hash([found["gold"], take])
    return found
