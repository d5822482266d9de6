"""Real runs through the script: real ranks, real stops, real kills; what they leave behind."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import polars as pl
import psutil
import pytest
import torch
import transformers
from huggingface_hub import ModelCard

from pipeline.config.schema import TrainConfig
from pipeline.core.files import RunPaths
from pipeline.core.stopping import Stopped
from pipeline.core.types import InputError
from pipeline.training import driver, run_lock
from pipeline.training.inputs import load_keys
from support.commands import (
    ROOT,
    composed,
    losses_of,
    prepare_run,
    run_ranks,
    script,
    start,
    train_arguments,
    wait_for,
    wait_for_steps,
)
from support.modes import other_modes
from support.tiny import make_model, make_tokenizer, write_lines

SCORES = {"num_records": 4, "num_targets": 4, "nll": 1.0, "perplexity": 2.7, "num_choice_records": 4, "accuracy": 0.75}
SCORES |= {"num_free_records": 0, "exact_match": None, "agreement": None}


def result_of(runs: Path) -> dict[str, Any]:
    (found,) = runs.glob("*/result.json")
    return json.loads(found.read_text())


# ------------------------------------------------------------------------------------ one whole run


def test_a_run_from_start_to_result_and_again(student: Path, data: Path, cache: Path, tmp_path: Path) -> None:
    arguments = train_arguments(student, data, str(cache), steps=8)
    (tmp_path / "pipeline.py").write_text("raise SystemExit('a file of the user, which no rank may import')")
    shown = script("train", *arguments, cwd=tmp_path).stderr
    (run,) = (tmp_path / "runs").iterdir()
    (whole, beside) = re.findall(rf"finished: runs/{run.name}; ([\d.]+) s, ([\d.]+) s of them beside its steps", shown)[
        0
    ]
    result = json.loads((run / "result.json").read_text())
    assert float(whole) - float(beside) == pytest.approx(result["train_seconds"], abs=0.11)  # each is rounded
    assert {path.name for path in run.iterdir()} == {
        *("config.yaml", "environment.json", "identity.json", "lock", "log.txt", "metrics.jsonl", "model"),
        *("predictions-dev.parquet", "predictions-test.parquet", "result.json", "state.json"),
    }
    assert other_modes(tmp_path / "runs") == {}
    assert (run / "lock").read_text().startswith("free since ")
    rows = pl.read_ndjson(run / "metrics.jsonl")
    assert rows["step"].to_list() == list(range(1, 9))
    assert rows["lm_count"].sum() > 0
    assert rows["kd_count"].sum() > 0
    weighted = rows["lm_weight"] * rows["lm"].fill_null(0) + rows["kd_weight"] * rows["kd"].fill_null(0)
    assert (rows["loss"] - weighted).abs().max() < 1e-5
    assert rows["loss"][-1] < rows["loss"][0]
    assert (rows["grad_norm"] > 0).all()
    result = json.loads((run / "result.json").read_text())
    assert (result["test"]["num_records"], result["dev"]["num_records"], result["steps"]) == (20, 10, 8)
    assert result["exported_step"] == 8
    assert pl.read_parquet(run / "predictions-test.parquet")["correct"].mean() == result["test"]["accuracy"]
    # anybody can load it
    model = transformers.AutoModelForCausalLM.from_pretrained(run / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "model")
    assert model.config.vocab_size == len(tokenizer) + 20
    assert all(torch.isfinite(weight).all() for weight in model.state_dict().values())
    card = ModelCard.load(run / "model" / "README.md")
    assert card.data.tags == ["weak-to-strong", "distillation"]
    identity = json.loads((run / "identity.json").read_text())
    hashes = (identity["cache"], identity["gold"], identity["student"][0], result["test"]["text"])
    for told in (*hashes, f"{result['test']['nll']:.4f}", "| kd ("):
        assert told in card.text
    assert str(tmp_path) not in card.content
    assert str(student.parent) not in card.content
    # the same command does nothing and says so
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    again = script("train", *arguments, cwd=tmp_path)
    assert "is finished; nothing to do" in again.stderr
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_a_sweeps_driver_does_not_import_deepspeed() -> None:
    code = "import sys, pipeline.training.driver, pipeline.config.cli; print('deepspeed' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# --------------------------------------------------------------------------- ranks and ZeRO stages


@pytest.mark.slow
def test_zero_0_to_3_on_two_ranks_equal_one_rank_without(
    student: Path, data: Path, cache: Path, tmp_path: Path
) -> None:
    """20 steps of fp32 training, gradients clipped, both terms: the same losses and the same weights."""

    def prepare(name: str, stage: int) -> Path:
        arguments = train_arguments(student, data, str(cache), steps=20, micro_batch=1, deepspeed__zero_stage=stage)
        return prepare_run(tmp_path / name, arguments)

    alone = prepare("alone", 0)
    sharded = [prepare(f"zero{stage}", stage) for stage in range(4)]
    run_ranks(1, [alone])
    run_ranks(2, sharded)
    expected = torch.tensor(losses_of(alone))
    assert len(expected) == 20
    assert expected[-1] < 0.8 * expected[0]
    weights = transformers.AutoModelForCausalLM.from_pretrained(alone / "model").state_dict()
    norms = torch.tensor([json.loads(line)["grad_norm"] for line in (alone / "metrics.jsonl").read_text().splitlines()])
    assert (norms > 0).all()
    for folder in sharded:
        theirs_norms = [json.loads(line)["grad_norm"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert torch.allclose(torch.tensor(theirs_norms), norms, rtol=1e-3), folder.name
        found = torch.tensor(losses_of(folder))
        assert torch.allclose(found, expected, rtol=1e-4), (folder.name, (found / expected - 1).abs().max())
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()
        for name, weight in weights.items():
            assert torch.allclose(theirs[name], weight, atol=2e-4), (folder.name, name)


# ------------------------------------------------------------------------------- stops and resumes


@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_command_ends_as_if_never_stopped(
    student: Path, data: Path, cache: Path, tmp_path: Path
) -> None:
    def arguments(runs: str) -> list[str]:
        return train_arguments(student, data, str(cache), steps=60, runs_dir=runs)

    script("train", *arguments("undisturbed"), cwd=tmp_path)
    process = start(arguments("runs"), tmp_path)
    wait_for_steps(tmp_path / "runs", 5, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 75
    assert "the same command continues from its checkpoint" in (tmp_path / "output.txt").read_text()
    (run,) = (tmp_path / "runs").iterdir()
    stopped_at = json.loads((run / "checkpoints" / "published.json").read_text())["state"]["step"]
    assert 5 <= stopped_at < 60
    done = script("train", *arguments("runs"), cwd=tmp_path)
    assert f"step {stopped_at} of 60" in done.stderr
    (undisturbed,) = (tmp_path / "undisturbed").iterdir()
    assert losses_of(run) == losses_of(undisturbed)  # to the last bit
    for name in ("model.safetensors", "config.json"):
        assert (run / "model" / name).read_bytes() == (undisturbed / "model" / name).read_bytes()
    assert not (run / "checkpoints").exists()


@pytest.mark.slow
def test_a_multirun_killed_in_the_middle_ends_with_all_results_and_nothing_twice(
    student: Path, data: Path, cache: Path, tmp_path: Path
) -> None:
    arguments = train_arguments(student, data, str(cache), steps=15, checkpoint__every_steps=2)
    arguments = [a for a in arguments if not a.startswith("seed=")] + ["loss.kd.weight=0.5,1", "seed=1,2", "-m"]
    process = start(arguments, tmp_path)
    wait_for_steps(tmp_path / "runs", 19, process)  # one finished, one under way
    process.kill()
    process.wait()
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/result.json")}
    assert len(finished) == 1
    done = script("train", *arguments, cwd=tmp_path)
    assert done.stderr.count("is finished; nothing to do") == 1
    assert done.stderr.count("resuming") == 1
    resumed = int(re.findall(r"step (\d+) of 15,", done.stderr)[0])
    assert resumed >= 2  # from its checkpoint, not from the beginning
    assert done.stderr.count("starting:") == 2
    results = list(tmp_path.glob("runs/*/result.json"))
    assert len(results) == 4
    assert all(path.stat().st_mtime_ns == modified for path, modified in finished.items())
    for path in results:
        steps = [json.loads(line)["step"] for line in (path.parent / "metrics.jsonl").read_text().splitlines()]
        assert steps == list(range(1, 16))
    done = script("train", *arguments, cwd=tmp_path)
    assert done.stderr.count("is finished; nothing to do") == 4


@pytest.mark.slow
def test_one_failing_run_does_not_end_its_sweep(student: Path, data: Path, cache: Path, tmp_path: Path) -> None:
    arguments = train_arguments(student, data, str(cache), steps=3)
    done = script("train", *arguments, "optimizer.learning_rate=1e38,0.001", "-m", cwd=tmp_path, check=False)
    assert done.returncode != 0
    assert "expected a finite loss, found" in done.stderr
    assert "lower the learning rate" in done.stderr
    assert len(list(tmp_path.glob("runs/*/result.json"))) == 1


@pytest.mark.slow
def test_stopped_while_it_starts_a_sweep_ends_and_goes_on(
    student: Path, data: Path, cache: Path, tmp_path: Path
) -> None:
    arguments = [*train_arguments(student, data, str(cache), steps=4), "seed=1,2", "-m"]
    process = start(arguments, tmp_path)
    wait_for(lambda: list(tmp_path.glob("runs/*/config.yaml")), process)
    process.send_signal(signal.SIGINT)  # long before the first step
    assert process.wait(60) == 75
    assert "stop requested" in (tmp_path / "output.txt").read_text()
    assert len(list(tmp_path.glob("runs/*/identity.json"))) == 1
    script("train", *arguments, cwd=tmp_path)
    assert len(list(tmp_path.glob("runs/*/result.json"))) == 2


@pytest.mark.slow
def test_bf16_on_two_ranks(student: Path, data: Path, cache: Path, tmp_path: Path) -> None:
    changes = {"student__dtype": "bfloat16", "launcher__num_processes": 2, "deepspeed__zero_stage": 2}
    arguments = train_arguments(student, data, str(cache), steps=12, export__shard_bytes=40_000, **changes)
    script("train", *arguments, cwd=tmp_path)
    (run,) = (tmp_path / "runs").iterdir()
    assert len(list((run / "model").glob("model-*-of-*.safetensors"))) > 1
    losses = losses_of(run)
    assert losses[-1] < losses[0]
    model = transformers.AutoModelForCausalLM.from_pretrained(run / "model", dtype="auto")
    assert model.dtype == torch.bfloat16


@pytest.mark.slow
def test_a_signal_to_every_process_of_a_run_stops_it(student: Path, data: Path, cache: Path, tmp_path: Path) -> None:
    """As schedulers send it: to the driver, to torchrun and to the ranks at once."""
    arguments = train_arguments(student, data, str(cache), steps=5000, launcher__num_processes=2)
    process = start(arguments, tmp_path)
    wait_for_steps(tmp_path / "runs", 3, process)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 3
    for one in [process, *children]:
        one.send_signal(signal.SIGTERM)
    assert process.wait(120) == 75, (tmp_path / "output.txt").read_text()[-3000:]
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "checkpoints" / "published.json").exists()
    assert "failed" not in (tmp_path / "output.txt").read_text()


@pytest.mark.slow
def test_two_drivers_never_train_in_one_folder(
    student: Path, data: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = train_arguments(student, data, str(cache), steps=2000)
    process = start(arguments, tmp_path)
    wait_for_steps(tmp_path / "runs", 1, process)
    code = "from pipeline.training import run_lock; run_lock.LOCK_WAIT_SECONDS = 1.0; "
    code += "import sys, runpy; sys.argv[0] = 'train'; "
    code += f"runpy.run_path({str(ROOT / 'scripts' / 'train.py')!r}, run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 75
    assert done.returncode == 2
    assert "expected a free run folder, found lock held" in done.stderr


def test_a_lock_names_its_process_to_those_that_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    paths = RunPaths(folder=tmp_path)
    monkeypatch.setattr(run_lock, "LOCK_WAIT_SECONDS", 0.05)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    logging.getLogger("pipeline").propagate = True
    with run_lock.run_lock(paths), caplog.at_level(logging.INFO), pytest.raises(InputError), run_lock.run_lock(paths):
        pass
    state = f"locked by process {os.getpid()} on {socket.gethostname()} since "
    assert all(f"{tmp_path}: {state}" in record.getMessage() for record in caplog.records)
    assert caplog.records
    assert paths.lock.read_text().startswith("free since ")


def test_a_lock_that_fails_is_not_taken_for_one_that_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver would wait for it for a minute."""

    def fail(file: Any, operation: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", fail)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("waits"))
    message = "lock: expected to lock the run folder, found Input/output error; choose another runs_dir"
    with pytest.raises(InputError, match=message), run_lock.run_lock(RunPaths(folder=tmp_path)):
        pass


@pytest.mark.parametrize("finishes", [True, False])
def test_a_request_to_stop_and_what_the_run_has_left_to_do(
    finishes: bool, student: Path, data: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while a trained student is scored: its result stands. Before its last step: the run has none."""

    def ranks(config: TrainConfig, paths: RunPaths, num_ranks: int, lock: int) -> int:
        os.kill(os.getpid(), signal.SIGINT)
        assert paths.stop.exists()
        if finishes:
            (key,) = load_keys(paths).values()
            paths.predictions("test").touch()
            paths.result.write_text(json.dumps({"test": SCORES | dataclasses.asdict(key)}))
        return 0

    monkeypatch.setattr(driver, "run_ranks", ranks)
    arguments = train_arguments(student, data, str(cache), runs_dir=str(tmp_path), dev="null")
    with pytest.raises(Stopped) as stopped:
        driver.run(composed("train", *arguments))
    assert (stopped.value.is_finished, stopped.value.score) == ((True, 0.75) if finishes else (False, None))
    assert not list(tmp_path.glob("*/stop-requested"))
    if finishes:
        assert driver.run(composed("train", *arguments)) == 0.75  # nothing is left to do


def test_a_folder_of_runs_that_cannot_be_written_is_refused_before_any_rank_starts(
    student: Path, data: Path, cache: Path, tmp_path: Path
) -> None:
    (tmp_path / "runs").touch()
    arguments = train_arguments(student, data, str(cache), runs_dir=str(tmp_path / "runs"))
    with pytest.raises(InputError, match="runs_dir: expected a folder to write into, found Not a directory"):
        driver.run(composed("train", *arguments))


# ------------------------------------------------------------------------------------------ refusals


def test_refusals_before_any_rank_starts(student: Path, data: Path, cache: Path, tmp_path: Path) -> None:
    make_model(tmp_path / "stranger", make_tokenizer(lines=["quite other words"]), seed=3)
    write_lines(tmp_path / "empty.jsonl", [])
    write_lines(tmp_path / "untold.jsonl", [{"prompt": "who knows:"}])
    write_lines(tmp_path / "broken.jsonl", [{"prompt": "a", "completion": "b"}, '{"prompt": '])
    cases: list[tuple[dict[str, Any], str]] = [
        ({"student__path": tmp_path / "stranger"}, "to have the teacher's tokenizer"),
        ({"gold__files": f"[{tmp_path}/empty.jsonl]"}, "gold: expected usable records, found none in"),
        ({"gold__files": f"[{tmp_path}/untold.jsonl]"}, "untold.jsonl, line 1: expected a known target"),
        ({"test__files": f"[{tmp_path}/broken.jsonl]"}, "broken.jsonl, line 2: expected a JSON object"),
        ({"gold__columns__prompt": "question"}, "found ['answer', 'choices', 'completion', 'prompt']"),
        ({"window": 300}, "window: expected at most 256"),
        ({"k": 9}, "k: expected 1 to 8 (captured in"),
        ({"loss__kd__temperature": 3.0}, "temperature: expected one of the captured [1.0, 2.0], found 3.0"),
        ({"cache": f"{cache.parent}"}, "cache: expected"),
        ({"launcher__num_processes": 3}, "global_batch: expected a multiple of the 3 ranks, found 4"),
        (
            {"test__targets": "next", "test__malformed": "skip", "test__files": f"[{tmp_path}/untold.jsonl]"},
            "test: expected records with targets or choices, found none",
        ),
    ]
    for changes, message in cases:
        arguments = train_arguments(student, data, str(cache), runs_dir=str(tmp_path / "runs"))
        arguments += [f"{k.replace('__', '.')}={v}" for k, v in changes.items()]
        with pytest.raises(InputError, match=re.escape(message)):
            driver.run(composed("train", *arguments))
        assert not (tmp_path / "runs").exists()
