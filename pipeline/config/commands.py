"""The options of each command; those of a study's commands are declared here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from pipeline.config import schema
from pipeline.config.cluster import ClusterConfig
from pipeline.config.options import option
from pipeline.config.schema import CaptureConfig, TrainConfig


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
class RunsConfig(StudyCommand):
    """Which runs of a study: the options that scripts/study.py and scripts/submit.py have in common."""

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


@dataclass
class StudyConfig(RunsConfig):
    """Options of scripts/study.py."""

    hydra_launcher: str | None = option(
        None, "Hydra launcher of the students, such as submitit_slurm; null: one by one in this process"
    )
    probe_seconds: float = option(20.0, "seconds to measure the speed of this machine for the estimate; 0: no estimate")
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


ROOTS: dict[str, type] = {
    "capture": CaptureConfig,
    "import": schema.ImportConfig,
    "train": TrainConfig,
    "evaluate": schema.EvaluateConfig,
    "report": schema.ReportConfig,
    "audit": schema.AuditConfig,
    "status": schema.StatusConfig,
    "study": StudyConfig,
    "submit": SubmitConfig,
    "search": SearchConfig,
}
"""The options of each command."""
