"""Captures part-way, by real workers and by real leases, and plans under way."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest

from pipeline.cache.leases import hold_lease
from pipeline.cache.manifest import info_path, lease_path
from pipeline.capture import driver
from pipeline.capture.plan_lookup import plan_folder
from pipeline.core.processes import this_process
from pipeline.status.captures import find_capture, find_plan, is_cache, shards_per_second
from pipeline.status.values import CaptureStatus
from support.commands import config_of
from support.status_folders import ELSEWHERE, ended_process, let_age


@pytest.fixture(scope="module")
def captured(teacher: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of three shards of which one worker has captured its share, the second."""
    folder = tmp_path_factory.mktemp("caches")
    cache = driver.run(config_of(teacher, data / "corpus.jsonl", folder, share="1/3"))
    assert isinstance(cache, Path)
    return cache


@pytest.fixture
def cache(captured: Path, tmp_path: Path) -> Path:
    """A copy, whose last sign of life was a minute ago."""
    copied = Path(shutil.copytree(captured, tmp_path / captured.name))
    let_age(copied, 60)
    return copied


def found(cache: Path) -> CaptureStatus:
    return find_capture(cache, silent_seconds=600, lease_seconds=60)


def test_a_share_is_captured_and_nobody_works(cache: Path) -> None:
    status = found(cache)
    info = json.loads(info_path(cache, 1).read_text())
    assert (status.state, status.num_committed, status.num_shards) == ("stopped", 1, 3)
    assert (status.num_targets, status.bytes, status.leases) == (info["targets"], info["bytes"], ())
    weights = json.loads((cache / "manifest.json").read_text())["made_of"]["teacher_weights"]
    assert status.label == f"teacher {weights[:8]}  float32  k 8  window 48"
    assert status.age_seconds == pytest.approx(60, abs=30)
    os.utime(info_path(cache, 1))
    assert found(cache).state == "running"  # between two shards


def test_a_worker_holds_a_shard(cache: Path) -> None:
    place = lease_path(cache, 0)
    with hold_lease(place, lease_seconds=60):
        status = found(cache)
        assert (status.state, status.note) == ("running", "")
        (lease,) = status.leases
        assert (lease.shard, lease.holder) == (0, f"process {os.getpid()} on {os.uname().nodename}")
        assert lease.age_seconds < 30
        let_age(cache, 700)
        os.utime(place)  # renewed, and nothing is written
        status = found(cache)
    assert (status.state, status.note) == ("silent", "its worker lives, but nothing was written for 12 min")


@pytest.mark.parametrize(
    ("process", "age_seconds", "state"),
    [(ELSEWHERE, 30, "running"), (ELSEWHERE, 90, "silent"), ("here", 90, "silent"), ("ended", 1, "stopped")],
)
def test_a_lease_that_was_left(cache: Path, process: str, age_seconds: float, state: str) -> None:
    place = lease_path(cache, 2)
    process = {"here": this_process(), "ended": ended_process()}.get(process, process)
    place.write_text(f"{process} 0123456789abcdef")
    os.utime(place, (time.time() - age_seconds,) * 2)
    assert found(cache).state == state


def test_finished_waiting_and_an_import(cache: Path) -> None:
    for shard in (0, 2):
        info_path(cache, shard).write_text(info_path(cache, 1).read_text().replace('"index": 1', f'"index": {shard}'))
    assert (found(cache).state, found(cache).num_committed) == ("finished", 3)
    for shard in range(3):
        info_path(cache, shard).unlink()
    assert (found(cache).state, found(cache).note) == ("waiting", "no shard yet")
    temporary = cache / "shards" / ".00000.12.0123abcd.tmp"
    temporary.touch()
    assert found(cache).state == "running"
    let_age(cache, 700)
    assert found(cache).state == "waiting"


def test_speed_leaves_pauses_out() -> None:
    assert shards_per_second([]) is None
    assert shards_per_second([5.0]) is None
    assert shards_per_second([3.0, 3.0]) is None
    assert shards_per_second([0.0, 10.0, 20.0]) == pytest.approx(0.1)
    assert shards_per_second([0.0, 10.0, 20.0, 90_000.0, 90_010.0]) == pytest.approx(0.1)
    assert shards_per_second([0.0, 0.0, 0.0, 10.0]) == pytest.approx(0.3)  # three workers at once
    assert shards_per_second([index * 100.0 for index in range(30)] + [2901.0 + index for index in range(20)]) == 1.0


@pytest.mark.parametrize(("num_workers", "spread"), [(2, 5.0), (4, 20.0), (8, 60.0), (16, 10.0), (40, 10.0)])
def test_speed_of_workers_that_commit_in_bursts(num_workers: int, spread: float) -> None:
    """Each takes ten minutes for a shard, and all began within `spread` seconds."""
    starts = [spread * worker / num_workers for worker in range(num_workers)]
    times = sorted(start + 600.0 * number for start in starts for number in range(1, 6))
    for num_seen in range(2 * num_workers + 1, len(times)):
        found = shards_per_second(times[:num_seen], num_workers=num_workers)
        assert found is not None
        assert 0.5 * num_workers / 600 < found < 2.1 * num_workers / 600


def test_time_left_by_the_committed_shards(cache: Path) -> None:
    info_path(cache, 0).write_text(info_path(cache, 1).read_text().replace('"index": 1', '"index": 0'))
    now = time.time()
    os.utime(info_path(cache, 0), (now - 45,) * 2)
    os.utime(info_path(cache, 1), (now - 5,) * 2)
    status = found(cache)
    assert status.state == "running"
    assert status.seconds_left == pytest.approx(40)
    assert status.targets_per_second == pytest.approx(status.num_targets / 2 / 40)


@pytest.mark.parametrize(
    ("name", "content", "note"),
    [
        ("manifest.json", "{", "JSONDecodeError"),
        ("manifest.json", '{"temperatures": []}', "TypeError"),
        ("shards/00001.json", "", "JSONDecodeError"),
        ("shards/00001.json", '{"row_groups": [], "retained_mass_histogram": []}', "TypeError"),
    ],
)
def test_damaged_files_are_named(cache: Path, name: str, content: str, note: str) -> None:
    (cache / name).write_text(content)
    assert (found(cache).state, note in found(cache).note) == ("unreadable", True)
    shutil.rmtree(cache)
    assert found(cache).note == "deleted while it was read"
    assert not is_cache(cache)


def test_a_plan(teacher: Path, data: Path, tmp_path: Path) -> None:
    folder = plan_folder(config_of(teacher, data / "corpus.jsonl", tmp_path)).folder

    def plan() -> CaptureStatus | None:
        return find_plan(folder, silent_seconds=600, lease_seconds=60)

    (folder / ".unfinished").mkdir(parents=True)
    (folder / ".unfinished" / "00000.parquet").touch()
    (folder / ".unfinished" / ".00001.tmp").touch()
    with hold_lease(folder / "lease", lease_seconds=60):
        status = plan()
        assert status is not None
        assert (status.kind, status.state, status.num_committed, len(status.leases)) == ("plan", "running", 1, 1)
        let_age(folder / ".unfinished", 700)
        status = plan()
        assert status is not None
        assert status.state == "silent"
    status = plan()
    assert status is not None
    assert (status.state, status.leases) == ("stopped", ())
    (folder / ".unfinished").rename(folder / "sequences")
    assert plan() is None
