"""The file of a study: what each command and each experiment takes from it, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipeline.config.compose import find_study, open_study, take_study
from pipeline.config.validate import check_files
from pipeline.core.types import InputError
from support.commands import composed, script

FILE = """
teacher: {path: weak, num_layers: 4, attention: eager}
student: {path: strong}
window: 96
runs_dir: out/runs
caches_dir: out/caches
text: {targets: completion, end_token: false}
teacher_labels: {files: [t.jsonl]}
corpus: {files: [c.jsonl], targets: next}
gold: {files: [g.jsonl]}
dev: {files: [d.jsonl], end_token: true}
test: {files: [e.jsonl]}
ceiling: {files: [l.jsonl]}
capture: {k: 16, complete.max_new_tokens: 7}
train: {global_batch: 4, optimizer: {learning_rate: 1e-3}, loss.kd.temperature: 2.0}
experiments:
  teacher: {epochs: 5}
  gold_only: {steps: 9}
  combined: {gold_fraction: 0.5, loss.lm.weight: 0.3}
"""


@pytest.fixture
def study(tmp_path: Path) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(FILE)
    return f"study={path}"


def test_every_command_takes_its_part(study: str) -> None:
    train = composed("train", study, "experiment=combined")
    assert (train.student.path, train.window, train.global_batch, train.runs_dir) == ("strong", 96, 4, "out/runs")
    assert (train.optimizer.learning_rate, train.loss.kd.temperature) == (1e-3, 2.0)
    assert (train.gold_fraction, train.loss.lm.weight, train.cache) == (0.5, 0.3, "out/caches/mine-*")
    assert (train.gold.files, train.gold.targets.name, train.gold.end_token) == (["g.jsonl"], "completion", False)
    assert (train.dev.end_token, train.test.files, train.study) == (True, ["e.jsonl"], "mine")
    capture = composed("capture", study)
    assert (capture.name, capture.k, capture.complete.max_new_tokens, capture.window) == ("mine", 16, 7, 96)
    assert (capture.teacher.path, capture.teacher.num_layers) == ("out/runs/teacher-*/model", None)
    assert (capture.teacher.attention, capture.corpus.targets.name) == ("eager", "next")
    assert composed("report", study).runs == ["out/runs/*"]
    status = composed("status", study)
    assert (status.runs, status.caches) == (["out/runs/*"], ["out/caches/*"])
    assert composed("audit", study).cache == "out/caches/mine-*"
    assert composed("evaluate", study, "model.path=m").text.files == ["e.jsonl"]


def test_what_a_study_lacks_is_named_with_the_command_that_makes_it(study: str, tmp_path: Path) -> None:
    files = dict.fromkeys(("gold", "dev", "test"), f"[{tmp_path / 'mine.yaml'}]")
    given = [f"{name}.files={file}" for name, file in files.items()] + [f"student.path={tmp_path}"]
    train = composed("train", study, "experiment=combined", *given)
    with pytest.raises(InputError, match=rf"cache: .*capture first: python scripts/capture\.py study={tmp_path}/mine"):
        check_files(train)
    train.cache = str(tmp_path)
    with pytest.raises(
        InputError, match=r"teacher first; python scripts/study\.py study=\S+ makes all that is missing"
    ):
        check_files(train)
    train.cache = "out/other"  # not the study's
    with pytest.raises(
        InputError, match="cache: expected 'out/other' to exist, found nothing there; the current folder"
    ):
        check_files(train)


def test_every_experiment_takes_its_texts(study: str) -> None:
    teacher = composed("train", study, "experiment=teacher")
    assert (teacher.student.path, teacher.student.num_layers, teacher.student.attention) == ("weak", 4, "eager")
    assert (teacher.gold.files, teacher.epochs, teacher.scoring.teacher_predictions) == (["t.jsonl"], 5, None)
    gold_only = composed("train", study, "experiment=gold_only")
    assert (gold_only.steps, gold_only.epochs, gold_only.cache) == (9, None, None)
    assert gold_only.student.num_layers is None
    assert gold_only.scoring.teacher_predictions == "out/runs/teacher-*/predictions-test.parquet"
    assert composed("train", study, "experiment=ceiling").gold.files == ["l.jsonl"]
    assert composed("train", study, "experiment=weak_only").gold is None
    for control in ("shuffled", "smoothed"):
        config = composed("train", study, f"experiment={control}")
        assert (config.role.name, config.loss.kd.control.name, config.gold_fraction) == ("control", control, 0.5)


def test_the_command_line_wins_over_the_study_and_a_chosen_group_over_its_options(study: str) -> None:
    config = composed("train", study, "experiment=combined", "window=64", "gold_fraction=0.25")
    assert (config.window, config.gold_fraction) == (64, 0.25)
    weak = composed("train", study, "experiment=combined", "loss=weak").loss
    assert (weak.lm.weight, weak.kd.weight, weak.kd.temperature) == (0.0, 1.0, 1.0)


def test_an_experiment_of_ones_own_begins_with_a_ready_one(study: str, tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\ndefaults:\n  - combined\n  - _self_\n\nname: gentle\nloss: {kd: {weight: 0.1}}\n"
    (tmp_path / "experiment" / "gentle.yaml").write_text(text)
    config = composed("train", study, f"hydra.searchpath=[file://{tmp_path}]", "experiment=gentle")
    assert (config.name, config.role.name, config.loss.kd.weight, config.gold_fraction) == (
        "gentle",
        "combined",
        0.1,
        0.5,
    )


def test_without_a_study_nothing_of_the_demo_is_a_default() -> None:
    for root, missing in (("train", "student.path"), ("capture", "teacher.path")):
        with pytest.raises(InputError, match=re.escape(missing)):
            composed(root)
    config = composed("train", "student.path=m")
    assert (config.dev, config.test, config.window, config.student.attention) == (None, None, 512, None)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("windw: 3", "Key 'windw' not in 'StudyFile'"),
        ("gold: {fils: [g]}", "Key 'fils' not in 'TextConfig' (gold.fils)"),
        ("window: many", "could not be converted to Integer"),
        ("train: {optimizer.lr: 1}", "train: expected the name of an option, found 'optimizer.lr'"),
        ("experiments: {combined: {gold_fracton: 1}}", "found 'gold_fracton'; did you mean gold_fraction"),
        ("experiments: {combind: {gold_fraction: 1}}", "expected the name of an experiment, found 'combind'"),
        ("teacher: {num_layers: 3}", "expected a value for teacher.path, found none; add it"),
        ("{", "expected YAML"),
        ("- a", "expected"),
    ],
)
def test_a_wrong_file_is_refused(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"{line}\n")
    with pytest.raises(InputError, match=re.escape(message)):
        take_study([f"study={path}"])


def test_a_study_that_is_not_there() -> None:
    with pytest.raises(InputError, match="study: expected a file .*demos.yaml, found none; did you mean demo?"):
        find_study("demos", None)
    with pytest.raises(InputError, match="study: expected one study"):
        take_study(["study=demo", "study=quick"])


def test_the_studies_of_this_repository_are_read() -> None:
    for name in ("demo", "quick", "bad_teacher"):
        assert open_study(name, None).trains_teacher


def test_a_script_without_a_study_names_the_way_out(tmp_path: Path) -> None:
    done = script("train", "experiment=gold_only", cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "student.path" in done.stderr
    assert "study=NAME" in done.stderr
