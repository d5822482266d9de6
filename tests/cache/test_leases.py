"""Leases of processes that have ended: taken over at once where that is certain, else when they are stale."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.cache import leases
from pipeline.cache.leases import hold_lease, holder, share_lease
from pipeline.core import processes
from pipeline.core.object_store import age_seconds
from pipeline.core.types import InputError
from support.commands import mounted, needs_root

HOLD = (
    "import sys, time; from pathlib import Path; from pipeline.cache.leases import hold_lease\n"
    "with hold_lease(Path(sys.argv[1]), lease_seconds=60) as held: print(held, flush=True); time.sleep(60)"
)


@pytest.fixture(scope="module")
def left_behind(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The text of a lease whose holder was killed; while it lives, nobody takes the lease."""
    place = tmp_path_factory.mktemp("leases") / "lease"
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(place)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "True\n"
    assert holder(place).startswith(f"process {process.pid} on ")
    with hold_lease(place, lease_seconds=60) as held:
        assert not held
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # ended, and a zombie until its parent waits for it
    text = place.read_text()
    assert is_taken(place, text)
    process.wait()
    return text


def is_taken(place: Path, text: str) -> bool:
    place.write_text(text)  # so it is not stale
    with hold_lease(place, lease_seconds=60) as held:
        return held


def test_a_lease_of_a_process_of_this_machine_that_has_ended(left_behind: str, tmp_path: Path) -> None:
    assert is_taken(tmp_path / "lease", left_behind)
    assert list(tmp_path.iterdir()) == []


def changed(field: int, value: str) -> Callable[[str], str]:
    def change(text: str) -> str:
        fields = text.split()
        fields[field] = value
        return " ".join(fields)

    return change


@pytest.mark.parametrize(
    "change",
    [
        changed(1, "another-boot/pid:[4026531836]"),
        changed(1, "?"),
        changed(3, "?"),
        lambda text: "host 1 0123456789abcdef",  # as before these fields
        lambda text: "",  # created, and not written yet
    ],
    ids=["another machine", "unknown machine", "unknown start", "older", "empty"],
)
def test_what_is_not_certain_waits_until_the_lease_is_stale(
    change: Callable[[str], str], left_behind: str, tmp_path: Path
) -> None:
    place = tmp_path / "lease"
    assert not is_taken(place, change(left_behind))
    os.utime(place, (0, 0))
    with hold_lease(place, lease_seconds=60) as held:
        assert held


def test_a_pid_that_was_given_again_is_another_process(tmp_path: Path) -> None:
    place = tmp_path / "lease"
    with hold_lease(place, lease_seconds=60):
        text = place.read_text()
    assert not is_taken(place, text)  # this very process
    assert is_taken(place, changed(3, str(int(text.split()[3]) - 1))(text))


def test_without_proc_nothing_is_certain(left_behind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "machine", lambda: processes.UNKNOWN)
    assert not is_taken(tmp_path / "lease", changed(1, processes.UNKNOWN)(left_behind))


def test_a_folder_that_was_deleted_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match=r"cache: expected a folder, found none there any more"),
        hold_lease(tmp_path / "cache" / ".00000.lease", lease_seconds=60),
    ):
        pass


@needs_root
def test_a_lease_on_a_full_disk_is_an_input_error_and_leaves_nothing(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=16k") as disk:
        (disk / "all").write_bytes(bytes(16 << 10))
        message = "lease: expected to write a lease, found No space left on device; free space"
        with pytest.raises(InputError, match=message), hold_lease(disk / "lease", lease_seconds=60):
            pass
        assert [path.name for path in disk.iterdir()] == ["all"]


def test_a_lease_that_was_replaced_on_the_server_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS gives ESTALE; it is tried again, like one that was released."""
    place = tmp_path / "lease"
    place.write_text("another")

    def read_text(path: Path) -> str:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_text", read_text)
        with hold_lease(place, lease_seconds=60) as held:
            assert not held
    assert place.read_text() == "another"


@pytest.mark.parametrize("error", [FileNotFoundError("s3://bucket/x"), OSError(errno.ESTALE, "stale handle")])
def test_a_lease_that_is_released_while_its_age_is_asked_for(
    error: OSError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An object store's error has no errno; another worker may take the lease at its next try."""

    def released(place: Path) -> float:
        raise error

    monkeypatch.setattr(leases, "age_seconds", released)
    (tmp_path / "lease").write_text("somebody")
    with hold_lease(tmp_path / "lease", lease_seconds=60) as held:
        assert not held


def test_a_lease_whose_holder_ended_and_left_others_at_work(left_behind: str, tmp_path: Path) -> None:
    """They renew it, until it is taken over: then they are told."""
    place = tmp_path / "lease"
    place.write_text(left_behind)
    lost = threading.Event()
    with share_lease(place, lease_seconds=0.4, on_loss=lost.set):
        with hold_lease(place, lease_seconds=60, ends_with_holder=False) as held:
            assert not held
        time.sleep(1)  # longer than the lease: it was renewed
        with hold_lease(place, lease_seconds=0.9, ends_with_holder=False) as held:
            assert not held
        assert not lost.is_set()
        with hold_lease(place, lease_seconds=60) as held:
            assert held
            assert lost.wait(10)


def test_a_lease_that_its_successor_has_released_is_lost(left_behind: str, tmp_path: Path) -> None:
    """As for a machine that was frozen while another one took the run over and finished it."""
    place = tmp_path / "lease"
    place.write_text(left_behind)
    lost = threading.Event()
    with share_lease(place, lease_seconds=0.4, on_loss=lost.set):
        place.unlink()
        assert lost.wait(10)


def test_a_lease_that_is_released_after_the_work_is_not_lost(left_behind: str, tmp_path: Path) -> None:
    place = tmp_path / "lease"
    place.write_text(left_behind)
    with share_lease(place, lease_seconds=0.2, on_loss=lambda: pytest.fail("lost")):
        pass
    place.unlink()
    time.sleep(0.5)
    assert not [thread for thread in threading.enumerate() if thread.name.endswith("(keep)")]


def test_the_age_of_a_lease_is_measured_without_a_change_of_its_folder(tmp_path: Path) -> None:
    """A change of the folder is a sign of work in it; processes that wait for a lease ask for its age all the time."""
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / "lease").write_text("x")
    os.utime(folder, (1, 1))
    assert 0 <= age_seconds(folder / "lease") < 60
    assert folder.stat().st_mtime == 1
    assert list(tmp_path.iterdir()) == [folder]


def test_no_lease_is_shared_where_there_is_none(tmp_path: Path) -> None:
    with share_lease(tmp_path / "lease", lease_seconds=0.1, on_loss=lambda: pytest.fail("lost")):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_lease_that_another_has_just_taken_over_is_put_back(tmp_path: Path) -> None:
    """Two processes find that the holder has ended; one takes the lease over, and then the other tries."""
    place = tmp_path / "lease"
    place.write_text("what the ended process wrote")
    place.unlink()
    assert leases._create(place, "first")
    assert not leases._take_over(place, "what the ended process wrote", "second")
    assert place.read_text() == "first"
    assert leases._take_over(place, "first", "second")
    assert place.read_text() == "second"


@pytest.mark.parametrize("interrupted", ["_create", "Thread.start", "Thread.join"])
def test_a_request_to_stop_leaves_no_lease_wherever_it_arrives(
    interrupted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It raises KeyboardInterrupt between any two lines, once: later signals are ignored."""
    owner, name = (threading.Thread, interrupted.split(".")[1]) if "." in interrupted else (leases, interrupted)
    original, raised = getattr(owner, name), []

    def and_then_the_signal(*arguments: Any, **named: Any) -> Any:
        found = original(*arguments, **named)
        if not raised:
            raised.append(name)
            raise KeyboardInterrupt("SIGTERM")
        return found

    monkeypatch.setattr(owner, name, and_then_the_signal)
    with pytest.raises(KeyboardInterrupt, match="SIGTERM"), leases.hold_lease(tmp_path / "lease", lease_seconds=60):
        pass
    assert raised == [name]
    assert list(tmp_path.iterdir()) == []
