"""A real SLURM cluster for tests: two virtual nodes on this machine, partition `high` preempts `low`."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """A running cluster, as a shell on its login node sees it."""

    root: Path

    @property
    def variables(self) -> dict[str, str]:
        """The environment of a command that talks to it."""
        return os.environ | {"SLURM_CONF": str(self.root / "slurm.conf"), "OMP_NUM_THREADS": "1"}

    def run(self, *command: str, cwd: Path | None = None) -> str:
        """What a command of SLURM prints."""
        done = subprocess.run(command, env=self.variables, cwd=cwd, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, (command, done.stderr)
        return done.stdout

    def states(self, job: str) -> dict[str, str]:
        """The state of each job of an array, or of the only one, by its number there."""
        lines = self.run("sacct", "-X", "-n", "-P", "-D", "-j", job, "-o", "JobID,State").splitlines()
        found = dict(line.split("|") for line in lines)  # of a job that was queued again the last line counts
        return {name.partition("_")[2]: state.split()[0] for name, state in found.items()}

    def in_queue(self) -> list[str]:
        """Names of the jobs that wait or run."""
        return self.run("squeue", "-h", "-r", "-o", "%j").split()

    def wait(self, condition: Callable[[], object], *, seconds: float = 1200, what: str = "the cluster") -> None:
        """Until a condition holds; so long only where something hangs, since other tests run beside these."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"waited for {what}: {self.run('squeue', '-r')}"
            time.sleep(0.3)

    def preempt(self, node: str, cwd: Path) -> None:
        """A short job of the partition `high` takes a whole node from what runs there."""
        self.run("sbatch", "-p", "high", "-w", node, "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1", cwd=cwd)


def start_cluster(root: Path) -> Cluster:
    """Install SLURM where it is missing (Debian, as root) and start a cluster in a folder."""
    environment = os.environ | {"SLURM_TEST_ROOT": str(root)}
    command = ["bash", str(HERE / "start.sh")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return Cluster(root=root)


def stop_cluster(cluster: Cluster) -> None:
    """End its jobs, then its daemons."""
    environment = os.environ | {"SLURM_TEST_ROOT": str(cluster.root)}
    subprocess.run(["bash", str(HERE / "stop.sh")], env=environment, check=True, capture_output=True, timeout=120)
