"""Predictions of all runs in one order of records; curves; the records behind them; examples."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from pipeline.config.options import identity_options, save_config
from pipeline.config.schema import StudentConfig, TextConfig, TrainConfig
from pipeline.core.types import InputError, Record
from pipeline.data.records import read_records
from pipeline.data.text_files import open_text
from pipeline.evaluation.requests import record_key
from pipeline.report.arms import ArmRuns, group_arms
from pipeline.report.curves import MAX_PARSED, MAX_POINTS, mean_curves, read_rows, training_of
from pipeline.report.examples import EXAMPLES_PER_KIND, MAX_CHARACTERS, find_examples, shortened
from pipeline.report.predictions import TextPredictions, held_out, probabilities, read_predictions
from pipeline.report.records import gold_sizes, held_out_records
from pipeline.report.runs import read_runs
from support.run_folders import StudyFolder, write_study
from support.simulated_study import TrueArm, simulate, study_of
from support.tiny import make_model, make_tokenizer, write_lines

STUDENTS = (
    TrueArm(role="gold_only", accuracy=0.76, imitation=0.12, kd_weight=0.0, gold_fraction=1.0, num_gold=50, seeds=2),
    TrueArm(role="combined", accuracy=0.83, imitation=0.3, correction=0.5, num_gold=50, seeds=2),
)
NUM_RECORDS = 200


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> StudyFolder:
    predictions, text = simulate(study_of(STUDENTS, num_records=NUM_RECORDS), seed=1)
    return write_study(tmp_path_factory.mktemp("study"), predictions, text)


@pytest.fixture
def copied(study: StudyFolder, tmp_path: Path) -> StudyFolder:
    """A copy to damage; config.yaml leads to the original's texts."""
    shutil.copytree(study.folder / "runs", tmp_path / "runs")
    return StudyFolder(folder=tmp_path, texts=study.texts)


def arms_of(study: StudyFolder) -> list[ArmRuns]:
    runs = read_runs(study.runs)
    return group_arms(runs, gold_sizes(runs))


def records_of(study: StudyFolder, found: TextPredictions) -> dict[bytes, Record]:
    return held_out_records(read_runs(study.runs), found.name, found.keys)


def rewrite(study: StudyFolder, name: str, change: object) -> None:
    path = next(study.folder.glob(f"runs/{name}-*/predictions-test.parquet"))
    change(pl.read_parquet(path)).write_parquet(path)  # type: ignore[operator]


def test_what_was_simulated_is_what_is_read(study: StudyFolder) -> None:
    simulated, text = simulate(study_of(STUDENTS, num_records=NUM_RECORDS), seed=1)
    found = read_predictions(arms_of(study))
    assert found.metric == "accuracy"
    of_text = held_out(found, records_of(study, found))
    assert of_text.answer_M is not None
    assert of_text.class_M is not None
    assert of_text.length_M is not None
    assert text.class_M is not None
    np.testing.assert_array_equal(of_text.answer_M, text.answer_M)
    np.testing.assert_array_equal(of_text.class_M, text.class_M)
    prompts = [json.loads(line)["prompt"] for line in study.texts["test"].read_text().splitlines()]
    np.testing.assert_array_equal(of_text.length_M, [len(prompt) for prompt in prompts])
    for read, true in zip(found.arms, simulated, strict=True):
        assert read.arm.role == true.arm.role
        assert read.arm.seeds == true.arm.seeds
        assert read.arm.num_gold in (true.arm.num_gold, 900)
        np.testing.assert_array_equal(read.credit_RM, true.credit_RM)
        np.testing.assert_array_equal(read.predicted_RM, true.predicted_RM)  # type: ignore[arg-type]
        np.testing.assert_allclose(read.probability_RMC, true.probability_RMC, atol=1e-12)  # type: ignore[arg-type]


def test_records_are_joined_by_content(copied: StudyFolder, study: StudyFolder) -> None:
    rewrite(copied, "combined", lambda table: table.sample(fraction=1.0, shuffle=True, seed=3))
    expected, found = read_predictions(arms_of(study)), read_predictions(arms_of(copied))
    assert found.keys == expected.keys
    for ours, theirs in zip(found.arms, expected.arms, strict=True):
        np.testing.assert_array_equal(ours.credit_RM, theirs.credit_RM)


def test_a_record_that_stands_twice_counts_twice(copied: StudyFolder) -> None:
    for path in copied.folder.glob("runs/*/predictions-test.parquet"):
        table = pl.read_parquet(path)
        pl.concat([table, table[:3]]).sample(fraction=1.0, shuffle=True, seed=1).write_parquet(path)
    found = read_predictions(arms_of(copied))
    assert len(found.keys) == NUM_RECORDS + 3
    assert len(set(found.keys)) == NUM_RECORDS


def test_records_without_a_prediction_of_each_run_are_counted(
    copied: StudyFolder, caplog: pytest.LogCaptureFixture
) -> None:
    rewrite(copied, "combined", lambda table: table[5:])
    found = read_predictions(arms_of(copied))
    assert {arm.credit_RM.shape[1] for arm in found.arms} == {NUM_RECORDS - 5}
    assert f"test: {NUM_RECORDS - 5} of {NUM_RECORDS} records count" in caplog.text
    rewrite(copied, "teacher", lambda table: table[:5])
    with pytest.raises(InputError, match="expected records that all runs have predictions of, found none"):
        read_predictions(arms_of(copied))


def test_missing_predictions_are_an_error(copied: StudyFolder) -> None:
    next(copied.folder.glob("runs/combined-*/predictions-test.parquet")).unlink()
    with pytest.raises(InputError, match=r"expected the predictions of a finished run, found no such file"):
        read_predictions(arms_of(copied))


def test_nlls_of_different_targets_are_not_compared(tmp_path: Path) -> None:
    """As of runs with other tokenizers: the nll of a target is then another measure."""
    simulated, text = simulate(study_of(STUDENTS, num_records=20), seed=2)
    for of_arm in simulated:
        of_arm.credit_RM[:] = -4.0 + of_arm.credit_RM
    folder = write_study(tmp_path, simulated, text, metric="-nll", steps=2)
    assert read_predictions(arms_of(folder)).metric == "-nll"
    rewrite(folder, "combined", lambda table: table.with_columns(pl.col("num_targets") + 1))
    with pytest.raises(InputError, match=r"same number of targets a record in all runs.*/combined-.*with runs="):
        read_predictions(arms_of(folder))


def test_a_text_without_any_metric_is_refused(copied: StudyFolder) -> None:
    for path in copied.folder.glob("runs/*/predictions-test.parquet"):
        table = pl.read_parquet(path)
        empty = [
            pl.lit(None, dtype=table[name].dtype).alias(name) for name in ("correct", "exact") if name in table.columns
        ]
        table.with_columns(*empty, num_targets=pl.lit(0)).write_parquet(path)
    with pytest.raises(InputError, match="test: expected predictions with an answer or targets, found none"):
        read_predictions(arms_of(copied))


def test_runs_with_options_of_another_version_are_reported_without_their_gold(copied: StudyFolder) -> None:
    for path in copied.folder.glob("runs/*/config.yaml"):
        path.write_text(f"{path.read_text()}an_option_of_yesterday: 3\n")
    runs = read_runs(copied.runs)
    assert gold_sizes(runs) == {}
    found = read_predictions(group_arms(runs, {}))
    assert held_out_records(runs, found.name, found.keys) == {}


def test_probabilities_of_unequal_numbers_of_choices() -> None:
    found = probabilities(pl.Series([[0.0, np.log(3.0)], [-1000.0, -1000.0, -1000.0]]))
    np.testing.assert_allclose(found, [[0.25, 0.75, 0.0], [1 / 3, 1 / 3, 1 / 3]])


@pytest.mark.parametrize("metric", ["exact_match", "-nll"])
def test_texts_without_choices(tmp_path: Path, metric: str) -> None:
    """The means that the figures start from are the scores in result.json."""
    simulated, text = simulate(study_of(STUDENTS, num_records=50), seed=2)
    if metric == "-nll":
        for of_arm in simulated:
            of_arm.credit_RM[:] = -4.0 + of_arm.credit_RM
            of_arm.weight_M[:] = np.arange(len(of_arm.weight_M)) % 3  # some records have no target
            of_arm.credit_RM[:, of_arm.weight_M == 0] = 0.0
    folder = write_study(tmp_path, simulated, text, metric=metric, steps=2)
    arms = arms_of(folder)
    found = read_predictions(arms)
    assert found.metric == metric
    for of_arm, predictions in zip(arms, found.arms, strict=True):
        scores = [run.result["test"] for run in of_arm.runs]
        expected = [-score["nll"] if metric == "-nll" else score["exact_match"] for score in scores]
        np.testing.assert_allclose(predictions.credit_RM.sum(axis=1) / predictions.weight_M.sum(), expected)
        assert predictions.predicted_RM is None
    examples = find_examples(arms, found, records_of(folder, found))
    assert bool(examples) == (metric == "exact_match")
    assert all(e.answers["teacher"] == e.answers["combined"] for e in examples if e.kind == "copied")
    assert all(e.answers["combined"] == e.truth for e in examples if e.kind == "corrected")


# ------------------------------------------------------------------------------- records and examples


def test_texts_that_have_changed_are_not_taken_for_those_scored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    simulated, text = simulate(study_of(STUDENTS, num_records=20), seed=2)
    folder = write_study(tmp_path, simulated, text, steps=2)
    runs = read_runs(folder.runs)
    found = read_predictions(arms_of(folder))
    assert len(records_of(folder, found)) == 20
    assert gold_sizes(runs) == {run.inputs["gold"]: 900 if run.role == "teacher" else 50 for run in runs}
    test, *_ = lines = folder.texts["test"].read_text().splitlines(keepends=True)
    folder.texts["test"].write_text("".join([*lines, test.replace("record 0", "new record")]))
    assert len(records_of(folder, found)) == 21  # all that were scored are there
    folder.texts["test"].write_text("".join([*lines[1:], test.replace("record 0", "new record")]))
    assert records_of(folder, found) == {}
    assert caplog.text.count("found 1 of 20 missing or changed") == 1  # not once for each run
    folder.texts["test"].unlink()
    assert records_of(folder, found) == {}
    of_text = held_out(found, {})
    assert of_text.class_M is None
    assert of_text.length_M is None
    assert of_text.answer_M is not None  # of the predictions
    for path in (tmp_path / "data").glob("gold*.jsonl"):
        path.write_text(path.read_text() + '{"prompt": "new", "completion": " class 1"}\n')
    assert gold_sizes(runs) == {}


def test_records_of_chats_are_read_as_they_were_scored(tmp_path: Path) -> None:
    """Their prompt is what the template of the run's tokenizer writes."""
    rows = [
        {"messages": [{"role": "user", "content": f"which class has {m}?"}], "choices": ["one", "two"], "answer": m % 2}
        for m in range(4)
    ]
    text = TextConfig(files=[str(write_lines(tmp_path / "chats.jsonl", rows))])
    tokenizer = make_tokenizer()
    model = make_model(tmp_path / "model", tokenizer, seed=1)
    keys = [record_key(record) for record in read_records(open_text(text, "test"), tokenizer)]
    folder = tmp_path / "runs" / "combined"
    folder.mkdir(parents=True)
    student = StudentConfig(path=str(model))
    save_config(TrainConfig(name="combined", gold_fraction=1.0, student=student, test=text), folder / "config.yaml")
    identity = {"options": identity_options(TrainConfig(steps=1)), "test": "hash"}
    (folder / "identity.json").write_text(json.dumps(identity))
    (folder / "result.json").write_text(json.dumps({"test": {"accuracy": 1.0}}))
    records = held_out_records(read_runs([str(folder)]), "test", keys)
    assert list(records) == keys
    assert records[keys[0]].prompt == "<user>which class has 0?</><assistant>"


def test_examples_are_of_their_kind(study: StudyFolder) -> None:
    arms = arms_of(study)
    found = read_predictions(arms)
    examples = find_examples(arms, found, records_of(study, found))
    kinds = [example.kind for example in examples]
    assert {kind: kinds.count(kind) for kind in kinds} == dict.fromkeys(("copied", "corrected", "damaged"), 5)
    assert len({example.prompt for example in examples}) == 3 * EXAMPLES_PER_KIND
    for example in examples:
        teacher, combined, truth = example.answers["teacher"], example.answers["combined"], example.truth
        assert set(example.answers) == {"teacher", "gold_only", "combined"}
        assert {
            "copied": teacher == combined != truth,
            "corrected": teacher != combined == truth,
            "damaged": teacher == truth != combined,
        }[example.kind]


def test_long_prompts_lose_their_middle() -> None:
    text = shortened("a" * 5000 + "b" * 5000)
    assert text.startswith("aaa")
    assert text.endswith("bbb")
    assert f"[... {10_000 - MAX_CHARACTERS:,} characters ...]" in text
    assert shortened("short") == "short"


# -------------------------------------------------------------------------------------------- curves


def test_what_is_not_finite_is_no_point_of_a_curve() -> None:
    rows = [{"step": 1, "dev_nll": 2.0}, {"step": 1, "dev_nll": float("inf")}, {"step": 2, "dev_nll": float("nan")}]
    steps, curves = mean_curves(rows)
    assert (steps, curves) == ((1, 2), {"dev_nll": (2.0, None)})


def test_curves_are_means_over_seeds() -> None:
    first = [{"step": 1, "lm": 2.0, "sequences": "ab"}, {"step": 2, "lm": 1.0, "dev_nll": 0.5}]
    second = [{"step": 1, "lm": 4.0, "lm_count": 8}, {"step": 2, "lm": None}, {"step": 3, "lm": 7.0}]
    steps, curves = mean_curves([*first, *second])
    assert steps == (1, 2, 3)
    assert curves == {"lm": (3.0, 1.0, 7.0), "dev_nll": (None, 0.5, None)}


def test_long_curves_are_means_of_equal_parts(tmp_path: Path) -> None:
    steps, curves = mean_curves([{"step": step, "lm": float(step)} for step in range(1, 1001)])
    assert steps == tuple(range(5, 1001, 5))
    assert curves["lm"] == tuple(float(step - 2) for step in steps)
    rows = [{"step": step} | ({"dev_nll": 1.0} if step % 5000 == 4999 else {}) for step in range(1, 20_001)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 20')
    read = read_rows(tmp_path / "metrics.jsonl")
    assert len(read) <= MAX_PARSED + 4
    assert sum("dev_nll" in row for row in read) == 4  # none of them is lost
    assert len(mean_curves(read)[0]) == MAX_POINTS


def test_training_of_an_arm(study: StudyFolder) -> None:
    arms = {of_arm.arm.role: of_arm for of_arm in arms_of(study)}
    training = training_of(arms["combined"])
    assert training is not None
    assert training.label == "combined"
    assert training.seconds == 30.0
    assert {"lm", "kd", "grad_cosine", "dev_accuracy", "kd_at_T1"} <= training.curves.keys()
    assert not {"seconds", "sequences", "tokens", "lm_count"} & training.curves.keys()
    rows = [read_rows(run.paths.metrics) for run in arms["combined"].runs]
    assert training.curves["lm"][9] == pytest.approx((rows[0][9]["lm"] + rows[1][9]["lm"]) / 2)
