"""The options of the commands that neither capture, import nor train; and which options each command has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from pipeline.config.cluster import ClusterConfig
from pipeline.config.options import option
from pipeline.config.schema import (
    CaptureConfig,
    Control,
    DownloadsConfig,
    ImportConfig,
    ModelConfig,
    PoolKind,
    PoolStudents,
    ScoringConfig,
    TextConfig,
    TrainConfig,
)


@dataclass
class EvaluateConfig:
    model: ModelConfig = option(ModelConfig, "any causal language model")
    text: TextConfig = option(TextConfig, "held-out text")
    out: str | None = option(None, "folder for scores.json and predictions.parquet; null: print only")
    scoring: ScoringConfig = option(ScoringConfig, "how to score")
    log_every_seconds: float = option(10.0, "seconds between plain progress lines")


@dataclass
class ReportConfig:
    study: str | None = option(None, "name of the study, set by study=")
    command: str = option(
        "python scripts/study.py", "how the study is run, for the command to run next; study= sets it"
    )
    runs: list[str] = option(MISSING, "run folders, or globs of them, as runs=[runs/mine/*]; study= gives them")
    out: str | None = option(None, "folder for report.html, report.md and the tables; null: print only")
    keep: str | None = option(
        None,
        "folder for small copies of the runs, without weights and curves, which the report reads as runs; null: none",
    )


@dataclass
class AuditConfig:
    cache: str = option(MISSING, "folder or address of a cache, or a glob matching one", content=True, address=True)
    teacher: ModelConfig | None = option(
        None, "replay: the teacher of the cache; show: any model folder with its tokenizer", result=False
    )
    rows: int = option(8, "sequences drawn at random for replay and show")
    seed: int = option(0, "seed of that choice")
    record: int | None = option(None, "show: the record with this id, all its positions; null: random rows")
    top: int = option(8, "show: entries a position")
    out: str | None = option(None, "summary: folder for summary.json, summary.png and summary.svg; null: print only")
    batch_sequences: int = option(8, "replay: sequences in one teacher forward")
    log_every_seconds: float = option(10.0, "seconds between plain progress lines", result=False)


@dataclass
class StatusConfig:
    runs: list[str] = option(list, "run folders, or globs of them, as runs=[runs/mine/*]; study= gives them")
    caches: list[str] = option(
        list, "folders of caches, or globs of them, as caches=[caches/mine/*]; study= gives them"
    )
    plans_dir: str | None = option(None, "folder of the plans of captures; null: .plans beside each cache")
    silent_seconds: float = option(
        600.0, "a run or capture at work whose newest file is older is silent; for slow steps: five of them"
    )
    lease_seconds: float = option(60.0, "as given to the capture: a lease that was not renewed for so long is stale")
    json: bool = option(False, "one JSON object a line, for programs")
    watch: float | None = option(None, "seconds: show it again and again, until all are finished; null: once")


@dataclass
class SelftestConfig:
    checks: list[str] = option(list, "names of the checks to run, as in the table; none: all")
    out: str | None = option(None, "file for the table's rows as JSON; null: print only")


@dataclass
class PoolConfig:
    name: str = option(MISSING, "first part of the cache folder's name")
    caches_dir: str = option("caches", "folder or address that holds all caches", result=False, address=True)
    members: list[str] = option(
        MISSING,
        "captures of one corpus by several models, as members=[caches/A-*,caches/B-*]; a glob that matches several: "
        "the folds of one cross-fitted student",
        content=True,
        address=True,
    )
    weights: list[float] | None = option(None, "one weight a member; null: equal ones, whose sum is 1")
    fit_on: list[str] = option(
        list,
        "captures of gold by the same members in the same order: weights of the largest likelihood; none: as given",
        content=True,
        address=True,
    )
    kind: PoolKind = option(
        PoolKind.logarithmic, "logarithmic: the weighted product of the distributions; linear: their weighted mean"
    )
    temperature: float = option(1.0, "logarithmic: the pool is taken to the power 1 / temperature; below 1: sharper")
    round: int = option(1, "of a study: in which round the pool was made; a later one is named in the manifest")
    log_every_seconds: float = option(10.0, "seconds between plain progress lines", result=False)
    downloads: DownloadsConfig = option(
        DownloadsConfig, "caches in object stores are read through this folder", result=False
    )


@dataclass
class StudyCommand:
    """The options of every command that runs a study."""

    study: str = option(
        MISSING, "NAME of conf/study/NAME.yaml, or of study/NAME.yaml in the folder of --config-dir; or FILE.yaml"
    )
    command: str = option("python scripts/study.py", "how this study is run; study= sets it")
    study_dir: str | None = option(None, "the folder of --config-dir; study= sets it")
    overrides: list[str] = option(list, "filled with the options of scripts/train.py that are given: for every student")


@dataclass
class StudyPoolConfig:
    """The pool that the experiment pooled learns from: of the teacher and of one student a fold."""

    students: PoolStudents = option(
        PoolStudents.combined,
        "what the students of the folds learn: as combined, or as gold_only, where the teacher is near or below it",
    )
    kind: PoolKind = option(
        PoolKind.logarithmic, "logarithmic: the weighted product of the distributions; linear: their weighted mean"
    )
    weights: list[float] | None = option(
        None, "two weights, of the teacher and of the students of the folds; null: equal ones, whose sum is 1"
    )
    temperature: float = option(1.0, "logarithmic: the pool is taken to the power 1 / temperature; below 1: sharper")
    fit: bool = option(
        False,
        "weights, and where logarithmic the temperature, by their likelihood on gold, which no member has learnt",
    )


@dataclass
class RunsConfig(StudyCommand):
    """Which runs of a study: the options that scripts/study.py and scripts/submit.py have in common."""

    seeds: list[int] = option(lambda: [1], "seeds of every student, as seeds=1,2,3")
    experiments: list[str] | None = option(
        None,
        "experiments to run; null: zero_shot, gold_only, weak_only, combined, and ceiling if the study has one; "
        "pooled: combined on the pool of the teacher and of `folds` students",
    )
    folds: int = option(
        5, "pooled: students that share the corpus; each is captured on the fold that it has not learnt"
    )
    pool: StudyPoolConfig = option(StudyPoolConfig, "pooled: how the distributions become one")
    grid: list[str] = option(
        list, "settings of combined to compare, as grid=kd_weight:0,0.3,1,3; of pooled where combined is not asked for"
    )
    controls: list[Control] = option(list, "combined runs with a teacher without knowledge: shuffled, smoothed")
    few_shot: int = option(0, "also score the untrained student with this many gold records before each question")
    label_curve: list[int] = option(
        list, "sizes of gold sets cut from the ceiling's text, trained on alone: how many labels the teacher is worth"
    )


@dataclass
class StudyConfig(RunsConfig):
    """Options of scripts/study.py."""

    hydra_launcher: str | None = option(
        None, "Hydra launcher of the students, such as submitit_slurm; null: one by one in this process"
    )
    probe_seconds: float = option(20.0, "seconds to measure the speed of this machine for the estimate; 0: no estimate")
    rounds: int = option(
        1, "pooled: at most this many rounds; in each the students of the folds learn from the pool of the one before"
    )
    stop_after_pool: bool = option(
        False, "pooled: make the pool and all that it needs, and no student that learns from it, as a batch job does"
    )
    dry_run: bool = option(False, "print the plan and its cost, and run nothing")


@dataclass
class SubmitConfig(RunsConfig):
    """Options of scripts/submit.py."""

    cluster: ClusterConfig = option(ClusterConfig, "what each job asks for")
    folder: str | None = option(None, "folder of the files of the jobs; null: `submit` in runs_dir")
    dry_run: bool = option(False, "write and print the files, and submit nothing; --print is the same")


@dataclass
class SearchConfig(StudyCommand):
    """Options of scripts/search.py."""

    experiment: str = option("combined", "the experiment whose options are chosen")
    search: dict[str, Any] = option(
        dict, "the options to choose, each with {low, high}, on a logarithmic scale with log: true, or a list of values"
    )
    trials: int = option(20, "settings to try in all, those of earlier commands included")
    seeds: list[int] = option(lambda: [1], "seeds of each setting, whose scores on dev are averaged")
    seed: int = option(0, "seed of the choices")
    dry_run: bool = option(False, "check the first settings and the range, and run nothing")


@dataclass
class PreviewConfig(StudyCommand):
    """Options of `scripts/study.py preview`."""

    cache: str | None = option(
        None, "the teacher's capture of the corpus; null: the one in caches_dir that the study made", address=True
    )
    depths: list[float] = option(
        lambda: [0.47, 0.73, 1.0], "layers whose hidden states are features, as fractions of the student's depth"
    )
    max_records: int = option(4000, "read at most about so many records of the corpus, evenly spaced")
    components: int = option(256, "principal components of the features that linear students read")
    folds: int = option(5, "parts of the corpus: a cross-fitted student reads all but the one that it labels")
    resamples: int = option(4, "draws of 5/6 of corpus and gold, on each of which every recipe is tried")
    seed: int = option(0, "seed of these draws")
    batch_sequences: int = option(16, "sequences in one forward of the student")
    log_every_seconds: float = option(10.0, "seconds between plain progress lines")
    downloads: DownloadsConfig = option(DownloadsConfig, "a cache in an object store is read through this folder")


ROOTS: dict[str, type] = {
    "capture": CaptureConfig,
    "import": ImportConfig,
    "pool": PoolConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "report": ReportConfig,
    "audit": AuditConfig,
    "status": StatusConfig,
    "selftest": SelftestConfig,
    "study": StudyConfig,
    "submit": SubmitConfig,
    "search": SearchConfig,
    "preview": PreviewConfig,
}
"""The options of each command."""
