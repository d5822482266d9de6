"""Jobs of a sweep side by side: how the machine is divided, what their processes get, and how they end."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from pipeline.config.outcomes import State, read_outcomes
from pipeline.config.overrides import completed_overrides
from pipeline.config.parallel import divided, job_commands, run_jobs
from pipeline.config.schema import IfBusy
from pipeline.config.sweeps import Sweep, check_at_once, check_one_run, jobs_side_by_side
from pipeline.core.processes import cores_in_order, process_exists, started
from pipeline.core.runtime import visible_gpus
from pipeline.core.types import InputError
from support.commands import ROOT, wait_for
from support.placed_jobs import job, start_sweep, sweep_of

needs_two_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two places need two cores")


def states(sweep: Sweep) -> list[str]:
    return [one.outcome.state.name for one in read_outcomes(sweep.folder).values()]


# ------------------------------------------------------------------------------------- the machine


@pytest.mark.parametrize("num_places", [1, 2, 3, 5, 7])
def test_cores_are_divided_without_rest(num_places: int) -> None:
    cores = [0, 4, 1, 5, 2, 6, 3]  # in the order of neighbours, not of numbers
    parts = [place.cores for place in divided(num_places, cores, [])]
    assert [core for part in parts for core in part] == cores
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert all(place.gpus == () for place in divided(num_places, cores, []))


@pytest.mark.parametrize(("num_places", "parts"), [(1, ["5,3,GPU-ab,7"]), (2, ["5,3", "GPU-ab,7"]), (4, [*"5"])])
def test_every_place_has_as_many_gpus_under_the_names_that_were_given(num_places: int, parts: list[str]) -> None:
    found = [",".join(place.gpus) for place in divided(num_places, range(8), ["5", "3", "GPU-ab", "7"])]
    assert found[: len(parts)] == parts
    assert len(found) == num_places
    assert ",".join(found) == "5,3,GPU-ab,7"


@pytest.mark.parametrize(
    ("num_places", "num_cores", "gpus", "message"),
    [
        (3, 2, "", r"^launcher.jobs=3: expected at least one core for each, found 2; use launcher.jobs=2$"),
        (
            4,
            8,
            "23",
            r"^launcher.jobs=4: expected at least one GPU for each, found 2 \(2,3\); use launcher.jobs=2 or le",
        ),
        (
            4,
            8,
            "012345",
            r"expected a number that divides the GPUs into equal parts, found 6 .*use one of 1, 2, 3, 6, ",
        ),
    ],
)
def test_what_cannot_be_divided_is_refused(num_places: int, num_cores: int, gpus: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        divided(num_places, range(num_cores), list(gpus))


@pytest.mark.parametrize(
    ("given", "num_gpus", "expected"),
    [(None, 2, ["0", "1"]), ("", 0, []), ("3, 1", 2, ["3", "1"]), ("2,-1,0", 1, ["2"]), ("MIG-a", 1, ["MIG-a"])],
)
def test_the_gpus_are_those_that_this_process_may_use(
    given: str | None, num_gpus: int, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if given is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert visible_gpus() == expected


def test_the_cores_are_those_that_this_process_may_use() -> None:
    assert sorted(cores_in_order()) == sorted(os.sched_getaffinity(0))


# -------------------------------------------------------------------------------------- the commands


def test_a_job_gets_the_flags_of_its_sweep_and_its_own_options(tmp_path: Path) -> None:
    arguments = ["--config-dir", "mine", "-m", "experiment=combined", "seed=1,2"]
    sweep = sweep_of(tmp_path, 2, job_overrides=(("seed=1", "launcher.jobs=2"), ("launcher.jobs=2", "seed=2")))
    first, second = job_commands("train", None, arguments, sweep)
    assert first[1].endswith("/scripts/train.py")
    assert first[2:] == ["--config-dir", "mine", "seed=1"]
    assert second[2:] == ["--config-dir", "mine", "seed=2"]


def test_a_completed_command_line_is_complete() -> None:
    """The process of a job gets one."""
    once, _ = completed_overrides("train", ["student.path=x", "gold.files=[x]", "gold.take=3", "steps=4"])
    assert "+section@gold=used" in once
    assert completed_overrides("train", once) == (once, [])


def test_only_a_command_that_would_not_wait_is_made_to() -> None:
    assert jobs_side_by_side(IfBusy.fail) == ("launcher.if_busy=wait",)
    assert jobs_side_by_side(IfBusy.skip) == jobs_side_by_side(None) == ()


@pytest.mark.parametrize(
    ("changes", "sweeper", "message"),
    [
        ({"launcher": "submitit_local"}, "basic", "launcher.jobs=2: expected Hydra's own launcher"),
        ({}, "optuna", "launcher.jobs=2: expected jobs that are known before, found a search"),
        ({"varied": ("launcher.jobs",)}, "basic", "launcher.jobs: expected one number for all jobs"),
    ],
)
def test_only_this_command_runs_jobs_side_by_side(
    changes: dict[str, object], sweeper: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        check_at_once(sweep_of(tmp_path, 2, **changes), sweeper)


# ------------------------------------------------------------------------------------- the processes


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for jobs that find this code, on a machine without GPUs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    return tmp_path


def test_one_run_alone_is_no_sweep() -> None:
    check_one_run(["launcher.jobs=1", "seed=1"])
    with pytest.raises(InputError, match=r"^launcher.jobs=2: expected a sweep \(-m\), found one run"):
        check_one_run(["launcher.jobs=2", "seed=1"])


@needs_two_cores
def test_two_jobs_at_a_time_share_no_core_and_a_failure_ends_itself_alone(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = sweep_of(here, 4)
    assert not run_jobs(sweep, [job("1"), job("0", "fail"), job("1"), job("0")], started=sweep.started)
    assert states(sweep) == ["finished", "failed", "finished", "finished"]
    shown = capsys.readouterr()
    begun = [line for line in shown.out.splitlines() if line.startswith("==>")]
    assert begun == [f"==> [{number}/4] combined seed={number}" for number in range(1, 5)]
    assert "    [1/4] finished; score 0.1000; " in shown.out
    log = sweep.folder / "00002.log"
    assert shown.err == f"error: [2/4] its process ended with exit code 1: a reason; its output: {log}\n"
    first, second = ((sweep.folder / f"0000{number}.log").read_text().split() for number in (1, 2))
    assert not {*first[:-2]} & {*second[:-3]}
    assert len({*first[:-2], *second[:-3]}) == len(os.sched_getaffinity(0))


@needs_two_cores
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_request_to_stop_reaches_the_jobs_and_starts_no_other(number: int, here: Path) -> None:
    parent = start_sweep(here, 3)
    wait_for(lambda: len(list(here.glob("begun-*"))) == 2, parent)
    time.sleep(0.2)
    parent.send_signal(number)
    assert parent.wait(30) == 75
    found = read_outcomes(here / "sweep")
    assert [one.outcome.state for one in found.values()] == [State.stopped, State.stopped]
    assert not (here / "begun-3").exists()


@needs_two_cores
def test_a_request_to_one_job_ends_the_sweep(here: Path) -> None:
    """As where the time limit of the command ends a run."""
    sweep = sweep_of(here, 3)
    assert run_jobs(sweep, [job("0", "asked"), job("60"), job("0")], started=sweep.started)
    assert states(sweep) == ["finished", "stopped"]


@needs_two_cores
def test_jobs_end_with_their_parent_however_it_ends(here: Path) -> None:
    parent = start_sweep(here, 2)
    wait_for(lambda: sum(bool(path.read_text()) for path in here.glob("begun-*")) == 2, parent)
    processes = [int(path.read_text()) for path in here.glob("begun-*")]
    assert all(map(process_exists, processes))
    parent.kill()
    parent.wait()
    wait_for(lambda: all(not process_exists(pid) or started(pid) == "ended" for pid in processes), seconds=30)
