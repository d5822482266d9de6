"""Studies on a real SLURM: preempted, cancelled, killed, on two nodes, and equal to the bit to undisturbed ones."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from support.commands import BIT_BY_BIT, ROOT, losses_of, needs_root, only, script, steps_done, train_arguments
from support.slurm import Cluster, start_cluster, stop_cluster
from support.tiny import prompts, write_lines
from support.tiny_study import write_tiny_study

pytestmark = [pytest.mark.slow(minutes=5), pytest.mark.cluster, needs_root]
STUDENTS = ("experiments=combined,weak_only", "seeds=1,2,3")
STUDENTS_OF_SWEEP = ("experiment=combined,weak_only", "seed=1,2,3")
STEPS = 300


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    root = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # the paths of its sockets have to be short
    root.chmod(0o755)  # as munge requires
    cluster = start_cluster(root)
    try:
        yield cluster
    finally:
        stop_cluster(cluster)
        shutil.rmtree(root)


def submit(cluster: Cluster, cwd: Path, *arguments: str) -> dict[str, str]:
    """The ids of the jobs, by the part of the study."""
    asked = ("study=tiny", "--config-dir", str(cwd), "cluster.leave_seconds=20", *arguments)
    done = script("submit", *asked, cwd=cwd, env=cluster.variables)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("submitted: ")]
    return dict(word.split("=") for word in line.split()[1:])


def run_here(folder: Path, *arguments: str) -> None:
    """The same study without a cluster, with as many threads: they change the last bit of a teacher's logits."""
    asked = ("study=tiny", "--config-dir", str(folder), "probe_seconds=0", *arguments)
    script("study", *asked, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def texts(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny data with a corpus of 900 shards."""
    folder = tmp_path_factory.mktemp("texts")
    shutil.copytree(data, folder, dirs_exist_ok=True)
    write_lines(folder / "corpus.jsonl", prompts(4500, labeled=False, first=200))
    return folder


@pytest.fixture(scope="module")
def undisturbed(teacher: Path, student: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the whole study, made on this machine without a cluster."""
    folder = tmp_path_factory.mktemp("undisturbed")
    write_tiny_study(folder, teacher=teacher, student=student, data=texts, steps=STEPS)
    run_here(folder, *STUDENTS)
    return folder


def kill_task(script_name: str, *, number: str) -> None:
    """As if the machine had run out of memory: SIGKILL to the command of a job of an array."""
    for process in psutil.process_iter(["cmdline"]):
        with contextlib.suppress(psutil.Error):
            is_script = any(word.endswith(script_name) for word in process.info["cmdline"] or [])
            if is_script and process.environ().get("SLURM_ARRAY_TASK_ID") == number:
                process.kill()


def run_of(folder: Path, label: str) -> Path | None:
    """The run folder of an experiment and a seed, as `combined 2`; None as long as there is none."""
    experiment, seed = label.split()
    configs = folder.glob(f"runs/{experiment}-*/config.yaml")
    return next((path.parent for path in configs if f"\nseed: {seed}\n" in path.read_text()), None)


def has_steps(folder: Path, label: str) -> bool:
    """Whether a run is in the middle of its steps."""
    run = run_of(folder, label)
    return run is not None and (run / "metrics.jsonl").exists() and 5 < len(losses_of(run)) < STEPS


def only_run(folder: Path) -> Path:
    """The run of the only student."""
    run = run_of(folder, "combined 1")
    assert run is not None
    return run


def assert_same_students(found: Path, expected: Path) -> None:
    for label in (f"{experiment} {seed}" for experiment in ("combined", "weak_only") for seed in (1, 2, 3)):
        runs = run_of(found, label), run_of(expected, label)
        assert runs[0] is not None
        assert runs[1] is not None
        assert_same_run(runs[0], runs[1])


def assert_same_run(found: Path, expected: Path) -> None:
    assert losses_of(found) == losses_of(expected)
    for name in BIT_BY_BIT:
        assert (found / "model" / name).read_bytes() == (expected / "model" / name).read_bytes()
    scores = [json.loads((run / "result.json").read_text())["test"]["nll"] for run in (found, expected)]
    assert scores[0] == scores[1]


def shards_of(folder: Path) -> dict[str, bytes]:
    (cache,) = folder.glob("caches/tiny-*")
    return {path.name: path.read_bytes() for path in (cache / "shards").glob("*.parquet")}


def test_a_disturbed_study_is_the_undisturbed_one(
    cluster: Cluster, teacher: Path, student: Path, texts: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """Capture: of four jobs one killed, one preempted. Students: two preempted, one cancelled, then submitted again."""
    folder = tmp_path / "cluster"
    write_tiny_study(folder, teacher=teacher, student=student, data=texts, steps=STEPS)
    with pytest.raises(AssertionError, match="capture: expected at most 1001 jobs"):
        submit(cluster, folder, *STUDENTS, "cluster.capture_jobs=1002")
    jobs = submit(cluster, folder, *STUDENTS, "cluster.capture_jobs=4", "cluster.cpus_per_node=1")
    with pytest.raises(AssertionError, match="expected none of this study's jobs in the queue, found"):
        submit(cluster, folder, *STUDENTS)

    cluster.wait(lambda: len(list(folder.glob("caches/tiny-*/shards/*.parquet"))) > 10, what="the first shards")
    assert len(list(folder.glob("caches/tiny-*/shards/*.parquet"))) < 800
    kill_task("capture.py", number="1")
    cluster.preempt("node2", folder)

    array = jobs["students"]
    cluster.wait(lambda: steps_done(folder / "runs") > 10, what="the students")
    cluster.preempt("node1", folder)
    cluster.wait(lambda: "high" not in cluster.run("squeue", "-h", "-o", "%P"), what="the preempting job")
    cluster.wait(lambda: has_steps(folder, "weak_only 3"), what="the last student")
    cluster.run("scancel", f"{array}_5")
    cluster.wait(lambda: not cluster.in_queue(), what="the end")
    states = cluster.states(array)
    (killed,) = folder.glob("runs/submit/logs/tiny-capture-*_1.log")
    assert " Killed " in killed.read_text()  # it may have been queued again by the preemption of its node
    assert states["5"] == "CANCELLED"  # and not queued again
    assert {state for number, state in states.items() if number != "5"} == {"COMPLETED"}
    logs = [path.read_text() for path in folder.glob("runs/submit/logs/*.log")]
    assert sum("stop requested: saved at step" in log and "loading the checkpoint" in log for log in logs) >= 1
    assert len(list(folder.glob("runs/*/result.json"))) == 6  # the teacher's, and five of six
    shards = shards_of(folder)
    written = {path: path.stat().st_mtime_ns for path in folder.glob("caches/*/shards/*.parquet")}

    submit(cluster, folder, *STUDENTS, "cluster.capture_jobs=4", "cluster.cpus_per_node=1")
    cluster.wait(lambda: not cluster.in_queue(), what="the second end")
    assert {path: path.stat().st_mtime_ns for path in folder.glob("caches/*/shards/*.parquet")} == written
    assert shards == shards_of(undisturbed)
    assert_same_students(folder, undisturbed)
    for name in ("report.html", "report.md"):
        assert (folder / "runs" / "report" / name).exists()


def test_a_disturbed_sweep_of_submitit_is_the_undisturbed_one(
    cluster: Cluster, teacher: Path, student: Path, texts: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """Two runs preempted, the login process killed, one job cancelled; the same command ends with six results."""
    folder = tmp_path / "cluster"
    write_tiny_study(folder, teacher=teacher, student=student, data=texts, steps=STEPS)
    shutil.copytree(undisturbed / "caches", folder / "caches")
    shards = {path: path.stat().st_mtime_ns for path in folder.glob("caches/*/shards/*")}
    asked = ["study=tiny", "--config-dir", str(folder)]
    script("train", *asked, "experiment=teacher_as_is", cwd=folder, env=cluster.variables)
    job = {"partition": "low", "timeout_min": 60, "cpus_per_task": 1, "nodes": 1, "tasks_per_node": 1}
    options = [f"hydra.launcher.{name}={value}" for name, value in job.items()]
    sweep = [sys.executable, str(ROOT / "scripts" / "train.py"), "-m", *asked, *STUDENTS_OF_SWEEP, *options]
    sweep += ["hydra/launcher=submitit_slurm", "launcher.if_busy=wait"]

    with (folder / "first.txt").open("w") as output:
        login = subprocess.Popen(sweep, cwd=folder, env=cluster.variables, stdout=output, stderr=output)
    cluster.wait(lambda: steps_done(folder / "runs") > 10, what="the runs")
    cluster.preempt("node1", folder)
    cluster.wait(lambda: "high" not in cluster.run("squeue", "-h", "-o", "%P"), what="the preempting job")
    login.kill()
    login.wait()
    cluster.wait(lambda: has_steps(folder, "weak_only 3"), what="the last run")
    before = cluster.run("squeue", "-h", "-r", "-t", "running", "-o", "%i").split()
    cluster.run("scancel", before[-1])

    again = subprocess.run(
        sweep, cwd=folder, env=cluster.variables, capture_output=True, text=True, timeout=1200, check=False
    )
    assert again.returncode == 0, again.stdout + again.stderr
    assert "6 runs: 6 finished" in again.stdout
    cluster.wait(lambda: not cluster.in_queue(), what="the jobs of the first command")
    assert_same_students(folder, undisturbed)
    assert {path: path.stat().st_mtime_ns for path in folder.glob("caches/*/shards/*")} == shards
    logs = [path.read_text() for path in folder.glob("runs/*/log.txt")]
    assert sum("stop requested: saved at step" in log and "loading the checkpoint" in log for log in logs) >= 1


def test_a_run_on_two_nodes_is_that_of_two_ranks(
    cluster: Cluster, teacher: Path, student: Path, data: Path, tmp_path: Path
) -> None:
    """Warned by USR1, as before its time limit, it saves, is queued again, meets at another port and goes on."""
    folder, local = tmp_path / "cluster", tmp_path / "local"
    for place in (folder, local):
        write_tiny_study(place, teacher=teacher, student=student, data=data, steps=200)
    chosen = ("experiments=combined", "cluster.cpus_per_node=1", "launcher.num_processes=1")
    jobs = submit(cluster, folder, *chosen, "cluster.nodes=2", "cluster.capture_jobs=1")
    cluster.wait(lambda: steps_done(folder / "runs") > 10, what="the first steps")
    cluster.run("scancel", "--signal=USR1", "--batch", f"{jobs['students']}_0")
    cluster.wait(lambda: not cluster.in_queue(), what="the end")
    log = next(folder.glob("runs/submit/logs/tiny-students-*.log")).read_text()
    assert log.count("2 ranks on cpu") == 2
    assert "the same command continues from its checkpoint" in log
    run_here(local, "experiments=combined", "launcher.num_processes=2")
    assert_same_run(only_run(folder), only_run(local))


def test_srun_starts_one_command_a_node(
    cluster: Cluster, student: Path, data: Path, cache: Path, tmp_path: Path
) -> None:
    """USR1 to all tasks, as before a time limit: both save; a second job goes on, and equals two ranks of one node."""
    folder, local = tmp_path / "cluster", tmp_path / "local"
    changes = {"micro_batch": 2, "steps": 200, "dev": "null"}
    for place in (folder, local):
        place.mkdir()
    arguments = train_arguments(student, data, str(cache), launcher__num_nodes=2, launcher__num_processes=1, **changes)
    command = shlex.join([sys.executable, str(ROOT / "scripts" / "train.py"), *arguments])
    nodes = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1")
    asked = ("sbatch", "--parsable", *nodes, "-o", "log-%j.txt", "--wrap", f"srun {command}")
    job = cluster.run(*asked, cwd=folder).strip()
    cluster.wait(lambda: steps_done(folder / "runs") > 10, what="the first steps")
    cluster.run("scancel", "--signal=USR1", job)
    cluster.wait(lambda: not cluster.in_queue(), what="the end")
    log = (folder / f"log-{job}.txt").read_text()
    assert "2 ranks on cpu" in log
    assert "task 0: Exited with exit code 75" in log
    assert "task 1: Exited with exit code 75" in log
    job = cluster.run(*asked, cwd=folder).strip()
    cluster.wait(lambda: not cluster.in_queue(), what="the second end")
    assert "loading the checkpoint" in (folder / f"log-{job}.txt").read_text()
    on_one_node = train_arguments(student, data, str(cache), launcher__num_processes=2, **changes)
    script("train", *on_one_node, cwd=local, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert_same_run(only(folder / "runs"), only(local / "runs"))


def test_several_nodes_outside_of_slurm_need_their_place(student: Path, data: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), "experiment=gold_only", f"student.path={student}"]
    more = ["text@gold=own", f"gold.files=[{data}/gold.jsonl]", "launcher.num_nodes=2", "steps=1", "epochs=null"]
    done = subprocess.run([*command, *more], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "or to run in a job of SLURM with so many nodes, found neither; docs/clusters.md has the" in done.stderr
