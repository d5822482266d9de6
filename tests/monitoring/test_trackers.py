"""Copies of metrics.jsonl elsewhere: the runs of a study stand together, with all options and the final scores."""

from __future__ import annotations

import dataclasses
import json
import logging
import struct
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.options import identity_options
from pipeline.config.schema import Tracker, TrainConfig
from pipeline.config.validate_packages import TRACKER_PACKAGES
from pipeline.core.files import RunPaths
from pipeline.monitoring.trackers import TRACKERS, Trackers, record_result, tracked_run
from support.commands import composed

RESULT = {
    "name": "combined",
    "seed": 3,
    "test": {"accuracy": 0.75, "nll": 1.5, "exact_match": None, "num_records": 20},
    "dev": None,
    "steps": 2,
    "stopped_early_at": None,
}
FINAL = {"final_test_accuracy": 0.75, "final_test_nll": 1.5, "final_test_num_records": 20.0, "final_steps": 2.0}


def config_of(trackers: str, *more: str) -> TrainConfig:
    config: TrainConfig = composed(
        "train", "study=demo", "experiment=combined", "seed=3", f"trackers=[{trackers}]", *more
    )
    return config


def paths_of(folder: Path, name: str = "combined-0123456789ab") -> RunPaths:
    (folder / "demo-runs" / name).mkdir(parents=True, exist_ok=True)
    return RunPaths(folder=folder / "demo-runs" / name)


def track(config: TrainConfig, paths: RunPaths) -> None:
    """Two steps, a resume that repeats the second, and the final scores, as a run writes them."""
    for start in (0, 1):
        trackers = Trackers(config.trackers, tracked_run(config, paths), step=start)
        for step in range(start + 1, 3):
            trackers.write({"step": step, "loss": 1 / step, "kd": None, "parts": [1.0], "stopped_early": True})
        trackers.close()
    record_result(config, paths, RESULT)


# ------------------------------------------------------------------------------------ what is tracked


def test_every_tracker_of_the_options_exists_and_has_a_package() -> None:
    assert list(TRACKERS) == list(TRACKER_PACKAGES) == list(Tracker)


def test_the_runs_of_a_study_are_one_project_and_each_experiment_a_group(tmp_path: Path) -> None:
    runs = []
    for name in ("combined", "gold_only"):
        config = composed("train", "study=demo", f"experiment={name}")
        runs.append(tracked_run(config, paths_of(tmp_path, f"{name}-01")))
    assert [(run.project, run.group, run.role, run.name) for run in runs] == [
        ("demo", "combined", "combined", "combined-01"),
        ("demo", "gold_only", "gold_only", "gold_only-01"),
    ]
    options = runs[1].options
    assert (options["loss.kd.weight"], options["student.path"]) == (0.0, "data/demo/smollm2-135m")
    assert (options["student.dtype"], options["student.adapter.rank"], options["loss.lm.on"]) == (
        "auto",
        None,
        ["gold"],
    )
    without = dataclasses.replace(config, study=None, role=None)
    assert tracked_run(without, paths_of(tmp_path)).project == "demo-runs"  # the folder of the runs
    assert tracked_run(without, paths_of(tmp_path)).role == ""


def test_a_tracker_that_fails_is_logged_once_and_the_others_continue(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Any] = []

    def failing(*_: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setitem(TRACKERS, Tracker.wandb, lambda *_: (failing, failing, failing))
    monkeypatch.setitem(
        TRACKERS, Tracker.mlflow, lambda *_: (lambda step, values: written.append((step, values)), written.append, list)
    )
    logging.getLogger("pipeline").propagate = True
    config = config_of("wandb,mlflow")
    with caplog.at_level(logging.WARNING):
        trackers = Trackers(config.trackers, tracked_run(config, paths_of(tmp_path)), step=0)
        for step in (1, 2):
            trackers.write({"step": step, "loss": 0.5, "kd": None, "parts": [1.0], "stopped_early": True})
        trackers.finish(RESULT)
        trackers.close()
    assert written == [(1, {"loss": 0.5}), (2, {"loss": 0.5}), FINAL]
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith(
        "tracker wandb: expected it to accept the metrics, found ConnectionError: no route to host;"
    )


# ------------------------------------------------------------------------------------ a fake wandb


def test_what_wandb_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inits: list[dict[str, Any]] = []
    record = types.SimpleNamespace(logged=[], summary={}, num_finished=0)
    record.log = lambda numbers, step: record.logged.append((step, numbers))

    def finish() -> None:
        record.num_finished += 1

    def init(**given: Any) -> Any:
        inits.append(given)
        return record

    record.finish = finish
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    config, paths = config_of("wandb"), paths_of(tmp_path)
    track(config, paths)
    assert record.logged == [(1, {"loss": 1.0}), (2, {"loss": 0.5}), (2, {"loss": 0.5})]
    assert (record.summary, record.num_finished) == (FINAL, 3)
    for given in inits:
        assert (given["project"], given["group"], given["job_type"]) == ("demo", "combined", "combined")
        assert (given["id"], given["resume"]) == (paths.folder.name, "allow")
        assert given["config"] == tracked_run(config, paths).options
    monkeypatch.setenv("WANDB_PROJECT", "elsewhere")
    record_result(dataclasses.replace(config, study="a/b"), paths, RESULT)
    monkeypatch.delenv("WANDB_PROJECT")
    record_result(dataclasses.replace(config, study="a/b"), paths, RESULT)
    assert [given["project"] for given in inits[3:]] == ["elsewhere", "a-b"]
    assert {(given["entity"], given["tags"], given["name"]) for given in inits} == {(None, None, paths.folder.name)}


CHOSEN = ["project=mine", "entity=team", "name=first", "tags=[ablation,7b]", "run_id=abc123"]


def test_names_project_tags_and_id_are_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They win over the services' variables, reach every tracker and make no other run."""
    inits: list[dict[str, Any]] = []
    record = types.SimpleNamespace(log=lambda *_, **__: None, summary={}, finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **given: inits.append(given) or record))
    monkeypatch.setenv("WANDB_PROJECT", "elsewhere")
    plain = config_of("wandb")
    config = config_of("wandb", *(f"tracking.{option}" for option in CHOSEN))
    track(config, paths_of(tmp_path))
    for given in inits:
        assert (given["project"], given["entity"], given["tags"]) == ("mine", "team", ["ablation", "7b"])
        assert (given["name"], given["id"]) == ("first", "abc123")
    assert identity_options(config) == identity_options(plain)


# ------------------------------------------------------------------------------------ the real packages


def test_tensorboard_has_steps_options_and_scores(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import plugin_data_pb2

    config, paths = config_of("tensorboard"), paths_of(tmp_path)
    track(config, paths)
    events = EventAccumulator(str(paths.tensorboard))
    events.Reload()
    assert {event.step: event.value for event in events.Scalars("loss")} == {1: 1.0, 2: 0.5}
    assert {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"] if tag != "loss"} == FINAL
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    given = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert given["project"].string_value == "demo"
    assert given["experiment"].string_value == "combined"
    assert given["loss.lm.weight"].number_value == 0.3
    assert given["student.adapter.rank"].string_value == "None"
    assert set(given) == {*tracked_run(config, paths).options, "project", "experiment", "role", "name", "tags"}


def test_mlflow_has_one_experiment_a_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    mlflow.set_tracking_uri(f"file://{tmp_path}/mlruns")
    config, paths = config_of("mlflow"), paths_of(tmp_path)
    track(config, paths)
    track(dataclasses.replace(config, runs_dir="moved"), paths)  # an option without effect may change
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("demo")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == (paths.folder.name, "FINISHED")
    assert (run.data.tags["experiment"], run.data.tags["role"]) == ("combined", "combined")
    assert {name: str(value)[:500] for name, value in tracked_run(config, paths).options.items()} == run.data.params
    assert run.data.metrics == {"loss": 0.5, **FINAL}


def test_wandb_itself_writes_them_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    paths = paths_of(tmp_path)
    config = config_of("wandb")
    track(config, paths)
    wandb.teardown()
    records = [record for path in paths.folder.glob("wandb/offline-run-*/*.wandb") for record in offline_records(path)]
    runs = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert {(run.project, run.run_group, run.job_type, run.run_id) for run in runs} == {
        ("demo", "combined", "combined", paths.folder.name)
    }
    given = {item.key: json.loads(item.value_json) for item in runs[0].config.update}
    assert given == given | tracked_run(config, paths).options
    updates = [item for record in records if record.HasField("summary") for item in record.summary.update]
    found = {item.key: json.loads(item.value_json) for item in updates if item.key.startswith("final_")}
    assert found == FINAL


def offline_records(path: Path) -> Iterator[Any]:
    """What wandb keeps of an offline run, to be sent later: a head of 7 bytes, then a log in the format of LevelDB."""
    from wandb.proto import wandb_internal_pb2

    content, place, parts = path.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:  # no record begins in the last bytes of a block
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack("<HB", content[place + 4 : place + 7])
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield wandb_internal_pb2.Record.FromString(parts)
            parts = b""
