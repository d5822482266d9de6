"""What keeps two commands from training the same run, on one machine and on several, with file locks and without."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.audit.verify import findings
from pipeline.cache.leases import hold_lease
from pipeline.cache.manifest import committed_shards, load_manifest
from pipeline.capture.driver import run as capture
from pipeline.config.schema import Targets, TextConfig
from pipeline.core.file_systems import probe_folder
from pipeline.core.files import RunPaths
from pipeline.core.types import InputError
from pipeline.training import driver, run_lease, run_lock
from support.commands import config_of, losses_of, merged, only, train_arguments
from support.file_systems import mounted_without


def take(paths: RunPaths) -> bool:
    """Try once, and give it back."""
    with paths.lock.open("a") as file, contextlib.ExitStack() as held:
        try:
            run_lease.take(paths, file, held)
        except BlockingIOError:
            return False
        return True


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    return RunPaths(folder=tmp_path)


@pytest.fixture
def ended(paths: RunPaths) -> str:
    """What a driver of this machine that was killed has left in its lease."""
    code = "import sys; from pathlib import Path; from pipeline.cache.leases import hold_lease; import os\n"
    code += "with hold_lease(Path(sys.argv[1]), lease_seconds=60): os._exit(0)"
    subprocess.run([sys.executable, "-c", code, str(paths.lease)], check=True)
    return paths.lease.read_text()


def refuse_locks(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file: Any, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)


def test_a_run_of_another_machine_is_left_to_it_until_its_lease_is_stale(paths: RunPaths) -> None:
    """Also where locks work on each machine alone, as with Lustre's localflock and most of FUSE."""
    paths.lease.write_text("node7 another-boot/pid:[4026531836] 77 12345 0123456789abcdef")
    assert not take(paths)
    old = time.time() - run_lease.LEASE_SECONDS - 1
    os.utime(paths.lease, (old, old))
    assert take(paths)
    assert not paths.lease.exists()


def test_a_driver_that_was_killed_leaves_the_run_free_once_its_ranks_have_ended(paths: RunPaths, ended: str) -> None:
    with paths.lock.open("a") as ranks:  # they have inherited the lock
        fcntl.flock(ranks, fcntl.LOCK_EX)
        assert not take(paths)
    assert take(paths)


def test_without_locks_the_ranks_of_a_killed_driver_may_be_at_work_until_the_lease_is_stale(
    paths: RunPaths, ended: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_locks(errno.ENOSYS, monkeypatch)
    assert not take(paths)
    old = time.time() - run_lease.LEASE_SECONDS - 1
    os.utime(paths.lease, (old, old))
    assert take(paths)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EPERM, errno.EOPNOTSUPP])
def test_two_drivers_without_locks(
    number: int, paths: RunPaths, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    refuse_locks(number, monkeypatch)
    monkeypatch.setattr(run_lock, "LOCK_WAIT_SECONDS", 0.05)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    logging.getLogger("pipeline").propagate = True
    with run_lock.run_lock(paths), caplog.at_level(logging.INFO):
        with pytest.raises(InputError, match="expected a free run folder, found lock held"), run_lock.run_lock(paths):
            pass
        assert f"locked by process {os.getpid()} on" in caplog.messages[0]
    with run_lock.run_lock(paths):
        pass
    assert sorted(path.name for path in paths.folder.iterdir()) == ["lock"]


def test_a_waiting_driver_takes_over_before_it_gives_up() -> None:
    assert run_lease.LEASE_SECONDS + 5 < run_lock.LOCK_WAIT_SECONDS


def test_a_rank_renews_the_lease_of_its_killed_driver_and_leaves_when_it_is_taken_over(
    paths: RunPaths, ended: str
) -> None:
    code = "import sys, time; from pathlib import Path; from pipeline.core.files import RunPaths\n"
    code += "from pipeline.training import run_lease; run_lease.LEASE_SECONDS = 0.4\n"
    code += "with run_lease.renewed_by_rank(RunPaths(folder=Path(sys.argv[1]))): print('', flush=True); time.sleep(120)"
    command = [sys.executable, "-c", code, str(paths.folder)]
    rank = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert rank.stdout is not None
        rank.stdout.readline()
        renewed = paths.lease.stat().st_mtime
        deadline = time.monotonic() + 30
        while paths.lease.stat().st_mtime == renewed:
            assert time.monotonic() < deadline, "not renewed"
            time.sleep(0.05)
        with hold_lease(paths.lease, lease_seconds=60) as held:  # as if this rank had been frozen
            assert held
            _, said = rank.communicate(timeout=60)
        assert rank.returncode == 1
        assert "another command has taken over this run" in said
    finally:
        rank.kill()
        rank.wait()


@pytest.mark.slow
def test_both_stages_run_to_the_end_without_links_locks_and_fsync_of_folders(
    student: Path, teacher: Path, data: Path, tmp_path: Path
) -> None:
    with mounted_without(tmp_path / "fuse", "links", "locks", "sync_folder") as folder:
        found = probe_folder(folder)
        assert [found.links, found.locks, found.sync_folder] == [False, False, False]
        corpus = TextConfig(files=[str(data / "corpus.jsonl")], targets=Targets.next, end_token=False)
        cache = capture(config_of(teacher, data, folder / "caches", corpus=corpus, batch_sequences=4))
        infos = committed_shards(cache, load_manifest(cache))
        assert all(info.file.startswith(f"{info.index:05d}-{info.sha256[:12]}-") for info in infos)
        assert findings(cache) == []
        arguments = train_arguments(
            student, data, str(cache), runs_dir=str(folder / "runs"), checkpoint__every_steps=2, dev="null"
        )
        driver.run(merged(arguments))
        run = only(folder / "runs")
        assert len(losses_of(run)) == 6
        assert (run / "result.json").exists()
        assert (run / "model" / "model.safetensors").exists()
        assert not (run / "lease").exists()
