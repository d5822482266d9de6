"""Workers killed, frozen or out of disk space: afterwards each shard has the bytes of an undisturbed capture."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from pipeline.cache import manifest as manifests
from pipeline.cache.leases import hold_lease
from pipeline.capture import driver, worker
from pipeline.capture.driver import run, shards_of_share
from pipeline.capture.plan import make_plan
from pipeline.capture.plan_lookup import plan_folder
from pipeline.capture.worker import run_worker
from pipeline.config.schema import CaptureConfig
from pipeline.core.types import InputError
from support.commands import ROOT, capture_arguments, config_of, mounted, needs_root, script, train_arguments, wait_for
from support.tiny import prompts, write_lines


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    write_lines(folder / "corpus.jsonl", prompts(1200, labeled=False))
    return folder


def arguments(teacher: Path, data: Path, **changes: Any) -> list[str]:
    """Options of a capture with many small shards; `changes` are further options."""
    chosen = {"records_per_shard": 10, "batch_sequences": 1, "lease_seconds": 2, "log_every_seconds": 1, **changes}
    return capture_arguments(teacher, data, **chosen)


def start(arguments: list[str], cwd: Path) -> subprocess.Popen:
    with (cwd / "output.txt").open("a") as output:
        command = [sys.executable, str(ROOT / "scripts" / "capture.py"), *arguments]
        return subprocess.Popen(command, cwd=cwd, stdout=output, stderr=output, env=one_thread())


def one_thread() -> dict[str, str]:
    """An environment with one thread per process, so that all processes compute the same bits."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def shards_of(folder: Path) -> dict[str, bytes]:
    (shards,) = folder.glob("caches/*/shards")
    return {path.name: path.read_bytes() for path in shards.iterdir() if not path.name.startswith(".")}


@pytest.fixture(scope="module")
def undisturbed_folder(teacher: Path, many: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    script("capture", *arguments(teacher, many), cwd=folder, env=one_thread())
    return folder


@pytest.fixture(scope="module")
def undisturbed(undisturbed_folder: Path) -> dict[str, bytes]:
    return shards_of(undisturbed_folder)


def workers_of(process: subprocess.Popen) -> list[psutil.Process]:
    """The worker processes, without multiprocessing's resource tracker."""
    with contextlib.suppress(psutil.Error):
        return [p for p in psutil.Process(process.pid).children() if "spawn_main" in " ".join(p.cmdline())]
    return []


def test_two_workers_write_the_same_shards_as_one(
    teacher: Path, many: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    script("capture", *arguments(teacher, many, num_workers=2), cwd=tmp_path, env=one_thread())
    assert shards_of(tmp_path) == undisturbed


@pytest.mark.slow
def test_independent_processes_share_a_folder_without_a_coordinator(
    teacher: Path, many: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    processes = [start(arguments(teacher, many), tmp_path) for _ in range(2)]
    assert [process.wait(120) for process in processes] == [0, 0]
    assert shards_of(tmp_path) == undisturbed


@pytest.mark.parametrize(("task", "first", "last", "count"), [(7, 3, 7, 2), (5, 0, 15, 4), (0, 0, 0, 1)])
def test_a_task_of_any_job_array_finishes_the_cache(
    task: int, first: int, last: int, count: int, teacher: Path, data: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """Tasks are workers: of --array=3,7, of --array=0-15:5, of an array that someone else's script started."""
    for name, value in (("TASK_ID", task), ("TASK_MIN", first), ("TASK_MAX", last), ("TASK_COUNT", count)):
        monkeypatch.setenv(f"SLURM_ARRAY_{name}", str(value))
    cache = run(config_of(teacher, data / "corpus.jsonl", tmp_path, records_per_shard=6))
    assert len(manifests.committed_shards(cache, manifests.load_manifest(cache))) == 10


@pytest.mark.slow
def test_a_share_is_captured_only_where_it_is_asked_for(
    teacher: Path, many: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    script("capture", *arguments(teacher, many, share="0/2"), cwd=tmp_path, env=one_thread())
    assert 2 * len(shards_of(tmp_path)) == len(undisturbed)
    done = script("capture", *arguments(teacher, many, share="1/2"), cwd=tmp_path, env=one_thread())
    assert "capturing 60 of 120 shards" in done.stderr
    assert "Loading weights" not in done.stderr
    assert shards_of(tmp_path) == undisturbed
    done = script("capture", *arguments(teacher, many, share="2/2"), cwd=tmp_path, check=False)
    assert "share: expected INDEX/COUNT with INDEX from 0 to COUNT - 1, found '2/2'" in done.stderr


@pytest.mark.slow(minutes=2)
def test_kills_of_workers_lose_nothing_and_double_nothing(
    teacher: Path,
    student: Path,
    data: Path,
    many: Path,
    undisturbed_folder: Path,
    undisturbed: dict[str, bytes],
    tmp_path: Path,
) -> None:
    """SIGKILL to random workers at random times; if a capture ends before 24 kills, another starts in a new folder.

    Training on such a cache has the losses of training on undisturbed shards.
    """
    generator, kills, rounds = random.Random(0), 0, 0
    while kills < 24:
        rounds += 1
        folder = tmp_path / str(rounds)
        folder.mkdir()
        process = start(arguments(teacher, many, num_workers=3), folder)
        while process.poll() is None:
            time.sleep(generator.uniform(0.1, 1.5))
            workers = workers_of(process)
            if workers and kills < 24:
                with contextlib.suppress(psutil.NoSuchProcess):
                    generator.choice(workers).send_signal(signal.SIGKILL)
                    kills += 1
        output = (folder / "output.txt").read_text()
        if process.returncode == 2:  # too many deaths without a committed shard: the same command resumes
            assert "expected a committed shard between two deaths of workers" in output
            script("capture", *arguments(teacher, many, num_workers=3), cwd=folder, env=one_thread())
        else:
            assert process.returncode == 0, output[-3000:]
        assert shards_of(folder) == undisturbed
    assert kills == 24
    losses = []
    for folder in (tmp_path / "1", undisturbed_folder):
        (cache_folder,) = folder.glob("caches/tiny-*")
        script(
            "train",
            *train_arguments(student, data, str(cache_folder), runs_dir=tmp_path / "runs" / folder.name),
            cwd=tmp_path,
        )
        (metrics,) = (tmp_path / "runs" / folder.name).glob("*/metrics.jsonl")
        losses.append([json.loads(line)["loss"] for line in metrics.read_text().splitlines()])
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_a_worker_frozen_for_longer_than_its_lease_changes_nothing_when_it_resumes(
    teacher: Path, many: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    frozen = start(arguments(teacher, many), tmp_path)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("caches/*/shards/.*.lease")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    frozen.send_signal(signal.SIGSTOP)
    leases = list(tmp_path.glob("caches/*/shards/.*.lease"))
    script("capture", *arguments(teacher, many), cwd=tmp_path, env=one_thread())
    assert leases  # it was frozen during a shard, and the other capture took this shard over
    frozen.send_signal(signal.SIGCONT)
    assert frozen.wait(60) == 0
    assert shards_of(tmp_path) == undisturbed


@pytest.mark.slow
def test_a_killed_command_leaves_no_worker_and_no_lease(
    teacher: Path, many: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    """As by the kernel for want of memory: workers that stayed would hold their GPUs beside those of the next try."""
    process = start(arguments(teacher, many, num_workers=2), tmp_path)
    wait_for(lambda: len(list(tmp_path.glob("caches/*/shards/*.parquet"))) > 5, process)
    workers = workers_of(process)
    assert len(workers) == 2
    process.kill()
    process.wait()
    wait_for(lambda: not any(worker.is_running() for worker in workers), seconds=60)
    assert not list(tmp_path.glob("caches/*/shards/.*.lease"))
    assert not list(tmp_path.glob("caches/*/shards/.*.tmp"))
    script("capture", *arguments(teacher, many), cwd=tmp_path, env=one_thread())
    assert shards_of(tmp_path) == undisturbed


def test_a_killed_capture_resumes_where_it_stopped(
    teacher: Path, many: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    process = start(arguments(teacher, many), tmp_path)
    while len(list(tmp_path.glob("caches/*/shards/*.json"))) < 20:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    done = script("capture", *arguments(teacher, many), cwd=tmp_path, env=one_thread())
    assert "of 120 shards into" in done.stderr
    assert int(done.stderr.split("capturing ")[1].split()[0]) <= 120 - 20
    assert shards_of(tmp_path) == undisturbed


def test_a_worker_binds_its_gpu_before_it_loads_the_teacher(
    teacher: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(teacher, data / "corpus.jsonl", tmp_path)
    planned = plan_folder(config)
    manifests.create_cache(tmp_path / "cache", make_plan(config, planned))
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(f"set {device}"))

    def no_model(options: Any, device: torch.device) -> None:
        calls.append(f"load on {device}")
        raise InterruptedError

    monkeypatch.setattr(worker, "open_model", no_model)
    for number, gpu in ((3, "cuda:1"), (2, "cuda:0")):
        with pytest.raises(InterruptedError):
            worker.run_worker(config, tmp_path / "cache", planned.sequences, range(3), number)
        assert calls == [f"set {gpu}", f"load on {gpu}"]
        calls.clear()


@pytest.mark.parametrize(("name", "num_workers"), [("SIGTERM", 1), pytest.param("SIGUSR1", 2, marks=pytest.mark.slow)])
def test_a_stopped_capture_releases_its_leases_and_the_same_command_continues(
    name: str, num_workers: int, teacher: Path, many: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    changes = {"lease_seconds": 600, "num_workers": num_workers}
    script("capture", *arguments(teacher, many, lease_seconds=600, share="0/120"), cwd=tmp_path, env=one_thread())
    (shards,) = tmp_path.glob("caches/*/shards")
    with hold_lease(shards / ".00119.lease", lease_seconds=600) as held:  # so that it cannot end before it is stopped
        assert held
        process = start(arguments(teacher, many, **changes), tmp_path)
        wait_for(lambda: len(list(shards.glob("*.json"))) >= 10, process)
        process.send_signal(signal.Signals[name])
        assert process.wait(60) == 75
    output = (tmp_path / "output.txt").read_text()
    assert output.endswith(f"stopped by {name}; the same command continues with what is left\n")
    assert "Traceback" not in output
    assert [path.name for path in shards.iterdir() if path.name.startswith(".")] == []
    assert 10 <= len(list(shards.glob("*.json"))) < 120
    script("capture", *arguments(teacher, many, **changes), cwd=tmp_path, env=one_thread())
    assert shards_of(tmp_path) == undisturbed


def test_a_request_to_stop_waits_for_what_the_workers_write_last(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[str] = []

    class Process:
        def __init__(self, number: int) -> None:
            self.number = self.sentinel = number

        def terminate(self) -> None:
            calls.append(f"terminate {self.number}")

        def join(self) -> None:
            calls.append(f"join {self.number}")

    def asked_to_stop(sentinels: list[int]) -> None:
        calls.append(f"wait for {sentinels}")
        raise KeyboardInterrupt("SIGUSR1")

    monkeypatch.setattr(driver, "start_worker", lambda *arguments: Process(arguments[-1]))
    monkeypatch.setattr(driver, "wait", asked_to_stop)
    with pytest.raises(KeyboardInterrupt, match="SIGUSR1"):
        driver.supervise(CaptureConfig(name="x", num_workers=2), tmp_path, tmp_path, range(3))
    assert calls == ["wait for [0, 1]", "terminate 0", "terminate 1", "join 0", "join 1"]


def test_a_worker_that_waits_logs_for_whom(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shards = tmp_path / "cache" / "shards"
    shutil.copytree(cache, tmp_path / "cache")
    for name in ("00001.json", "00001.parquet"):
        (shards / name).unlink()
    (shards / ".00001.lease").write_text("elsewhere another-boot/pid:[1] 1234 5678 0123456789abcdef")

    def other_worker_commits(seconds: float) -> None:
        shutil.copytree(cache / "shards", shards, dirs_exist_ok=True)

    monkeypatch.setattr("pipeline.capture.worker.time.sleep", other_worker_commits)
    with caplog.at_level(logging.INFO, logger="pipeline"):
        run_worker(CaptureConfig(name="x"), tmp_path / "cache", tmp_path / "no sequences", [0, 1])
    assert [record.getMessage() for record in caplog.records] == [
        "waiting for shard 1, held by process 1234 on elsewhere; a lease that is not renewed for 60 s is taken over"
    ]


@pytest.mark.slow
def test_a_cache_in_a_folder_whose_name_looks_like_a_glob(teacher: Path, data: Path, tmp_path: Path) -> None:
    """What was written there is found again, by its name and by a glob in that folder; data2 is another folder."""
    folder, quoted = tmp_path / "data[2]", '"data[2]"'
    write_lines(folder / "corpus.jsonl", prompts(30, labeled=False))
    (tmp_path / "data2").mkdir()
    made = capture_arguments(teacher, data, caches_dir=quoted, corpus__files='["data[2]/corpus.jsonl"]')
    script("capture", *made, cwd=tmp_path)
    (cache,) = folder.glob("tiny-*")
    for name in (cache.name, "tiny-*"):
        done = script("audit", "verify", f'cache="data[2]/{name}"', cwd=tmp_path)
        assert "complete and correct: 30 records" in done.stdout


# ---------------------------------------------------------------------------------------------- disks


@pytest.mark.slow
@needs_root
def test_a_full_disk_loses_nothing(teacher: Path, many: Path, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    with mounted(tmp_path / "small", "size=600k") as small:
        done = script("capture", *arguments(teacher, many), cwd=small, env=one_thread(), check=False)
        assert done.returncode == 2
        assert "expected to write shard" in done.stderr
        assert "No space left on device" in done.stderr
        assert "Traceback" not in done.stderr
        committed = [name for name in shards_of(small) if name.endswith(".json")]
        assert 0 < len(committed) < 120
        subprocess.run(["mount", "-o", "remount,size=20m", str(small)], check=True)
        script("capture", *arguments(teacher, many), cwd=small, env=one_thread())
        assert shards_of(small) == undisturbed


@needs_root
def test_a_read_only_folder_is_rejected(teacher: Path, many: Path, tmp_path: Path) -> None:
    with mounted(tmp_path / "fixed", "size=1m,ro") as fixed:
        done = script("capture", *arguments(teacher, many), cwd=fixed, env=one_thread(), check=False)
    assert done.returncode == 2
    assert "caches_dir: expected a folder to write into, found Read-only file system" in done.stderr


def test_stale_temporary_files_of_a_finished_cache_are_deleted(
    teacher: Path, many: Path, undisturbed_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(undisturbed_folder, tmp_path, dirs_exist_ok=True)
    (shards,) = tmp_path.glob("caches/*/shards")
    (shards / ".00001.1.abc.tmp").write_bytes(b"half")
    os.utime(shards / ".00001.1.abc.tmp", (0, 0))
    (shards / ".00002.2.def.tmp").write_bytes(b"younger than a lease: it may still be written")
    script("capture", *arguments(teacher, many, lease_seconds=60), cwd=tmp_path)
    assert [path.name for path in shards.iterdir() if path.name.startswith(".")] == [".00002.2.def.tmp"]


# --------------------------------------------------------------------------------------------- leases


def test_a_lease_has_one_holder_who_renews_it(tmp_path: Path) -> None:
    path = tmp_path / ".0.lease"
    with hold_lease(path, lease_seconds=0.4) as first:
        assert first
        time.sleep(1.0)  # longer than the lease: the holder has renewed it
        with hold_lease(path, lease_seconds=0.4) as second:
            assert not second
        assert path.exists()
    assert list(tmp_path.iterdir()) == []


def test_a_stale_lease_is_taken_over_and_not_released_by_the_holder_that_lost_it(tmp_path: Path) -> None:
    path = tmp_path / ".0.lease"
    path.write_text("a process that was killed")
    os.utime(path, (0, 0))
    with hold_lease(path, lease_seconds=5) as taken:
        assert taken
        path.write_text("a successor")  # as if this process had been frozen, and another had taken over
    assert path.read_text() == "a successor"


def test_a_share_is_every_third_shard_and_is_checked() -> None:
    config = CaptureConfig(name="x", share="1/3")
    assert shards_of_share(config, 8) == [1, 4, 7]
    for wrong in ("3/3", "1", "a/b", "0/0"):
        with pytest.raises(InputError, match="share: expected INDEX/COUNT"):
            shards_of_share(CaptureConfig(name="x", share=wrong), 8)


def test_a_damaged_shard_without_its_info_is_rejected(
    teacher: Path, many: Path, undisturbed_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(undisturbed_folder, tmp_path, dirs_exist_ok=True)
    (shards,) = tmp_path.glob("caches/*/shards")
    (shards / "00003.json").unlink()
    (shards / "00003.parquet").write_bytes((shards / "00003.parquet").read_bytes()[:500])
    done = script("capture", *arguments(teacher, many), cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "00003.parquet: expected a complete shard, found it damaged" in done.stderr
