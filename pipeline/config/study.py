"""A study: what belongs together, declared once in `conf/study/NAME.yaml`, and what every command takes from it.

The file is turned into layers of options, one for each command and one for each role. Hydra composes them between the
defaults of a command and the options of an experiment, so that everything on the command line still wins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from pipeline.config import schema
from pipeline.config.options import option
from pipeline.config.schema import ModelConfig, StudentConfig, TextConfig


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
    file: StudyFile = option(StudyFile, "the study itself; each of its options can be overridden here")
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
