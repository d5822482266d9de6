"""How a command ends: exit codes of requests to stop and of places that cannot be written; what a sweep does then."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable

import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import read_write

from pipeline.config.overrides import flags_first
from pipeline.core.stopping import Stopped
from pipeline.core.types import RunFailed

Train = Callable[..., tuple[int, list[int]]]


def stopped(seed: int) -> float:
    raise Stopped(f"stopped: {seed}", is_finished=False)


def finished(seed: int) -> float:
    raise Stopped(f"finished: {seed}", is_finished=True, score=0.5)


def failed(seed: int) -> float:
    raise RunFailed(f"{seed} failed")


def test_a_stopped_run_ends_with_75_and_one_that_finished_all_the_same_with_0(train: Train) -> None:
    assert train(stopped) == (75, [1])
    assert train(finished) == (0, [1])
    assert train(failed) == (2, [1])


@pytest.mark.parametrize("body", [stopped, finished])
def test_a_request_to_stop_ends_a_sweep_and_it_is_written(
    body: Callable[[int], float], train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(body, "seed=1,2,3", "-m") == (75, [1])
    assert capsys.readouterr().err == (
        "the sweep ends here, as requested; the same command continues with its other runs\n"
    )


def test_a_failed_run_does_not_end_a_sweep(train: Train) -> None:
    assert train(failed, "seed=1,2,3", "-m") == (2, [1, 2, 3])


def test_another_launcher_sees_a_failed_run_and_not_the_end_of_the_process(train: Train) -> None:
    """As joblib and submitit do, which run each of them in a process of its own and expect an Exception of it."""

    def elsewhere(body: Callable[[int], float]) -> Callable[[int], float]:
        def run(seed: int) -> float:
            with read_write(HydraConfig.get()):
                HydraConfig.get().runtime.choices["hydra/launcher"] = "joblib"
            return body(seed)

        return run

    assert train(elsewhere(stopped), "seed=1,2,3", "-m") == (75, [1, 2, 3])
    assert train(elsewhere(finished), "seed=1,2,3", "-m") == (0, [1, 2, 3])


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2"])
def test_a_signal_between_two_runs_ends_the_sweep(name: str, train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    """Or while a run reads its inputs, before its ranks are started."""

    def body(seed: int) -> float:
        if seed == 2:
            os.kill(os.getpid(), signal.Signals[name])
        return 0.5

    assert train(body, "seed=1,2,3", "-m") == (75, [1, 2])
    assert capsys.readouterr().err == f"stopped by {name}; the same command continues with what is left\n"


def test_a_place_that_cannot_be_written_is_one_line(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    def full(seed: int) -> float:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/x/config.yaml")

    assert train(full) == (2, [1])
    assert capsys.readouterr().err == (
        "error: runs/x/config.yaml: expected to read and write there, found No space left on device; make room or "
        "correct the permissions, and run the same command again\n"
    )

    def other(seed: int) -> float:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    with pytest.raises(OSError, match="Bad file descriptor"):  # a fault of the code keeps its traceback
        train(other)


def test_flags_may_stand_between_options() -> None:
    """argparse, which Hydra uses, refuses options on both sides of a flag."""
    given = ["seed=2", "--config-dir", "mine", "-m", "loss.kd.weight=0,1", "--cfg=job", "~gold"]
    assert flags_first(given) == ["--config-dir", "mine", "-m", "--cfg=job", "seed=2", "loss.kd.weight=0,1", "~gold"]
