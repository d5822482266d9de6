"""The sbatch files of a study: read whole, as a person would; correct shell; and what they do at each signal."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from pipeline.cluster import submit
from pipeline.cluster.jobs import jobs_of
from pipeline.cluster.sbatch import BatchJob, script_text, submission_text
from pipeline.cluster.submit import answer_of, check_cluster, check_one_pool, check_one_teacher, with_teacher_on_dev
from pipeline.config.cluster import ClusterConfig
from pipeline.config.commands import StudyConfig, StudyPoolConfig, SubmitConfig
from pipeline.config.compose import open_study, study_arguments
from pipeline.core.types import InputError
from pipeline.study.forecast import ADAPTIVE, Composer
from pipeline.study.members import pool_words
from pipeline.study.plan import Job, fold_jobs, student_jobs
from pipeline.training.launch import ranks_command, rendezvous, srun
from pipeline.training.nodes import check_allocation
from support.commands import ROOT, composed, script

EXPECTED = Path(__file__).parent / "expected"
LARGE = ClusterConfig(
    partition="gpu",
    account="mylab",
    time="24:00:00",
    nodes=4,
    gpus_per_node=8,
    cpus_per_node=96,
    memory="0",
    max_running=6,
    setup=["module load cuda/12.8", "source .venv/bin/activate"],
    python="python",
)
PLACES = {"study": "demo", "folder": "/home/me/weak-to-strong", "origin": "python scripts/submit.py study=demo"}


def jobs_of_demo(cluster: ClusterConfig = LARGE) -> list[BatchJob]:
    study = open_study("demo", None)
    students = student_jobs(StudyConfig(study="demo", seeds=[1, 2, 3], grid=["kd_weight:0.3,3"]), study)
    return jobs_of(study, students, cluster, captures=True)


def test_the_files_of_four_nodes_with_eight_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As they stand in tests/cluster/expected; shellcheck finds nothing in them."""
    monkeypatch.chdir(ROOT)
    jobs = jobs_of_demo()
    names = [f"{number}-{job.name}.sbatch" for number, job in enumerate(jobs, 1)]
    texts = {
        name: script_text(job, LARGE, logs="runs/demo/submit/logs", **PLACES)
        for name, job in zip(names, jobs, strict=True)
    }
    files = [f"runs/demo/submit/{name}" for name in names]
    texts["submit.sh"] = submission_text(jobs, study="demo", folder=PLACES["folder"], files=files)
    assert {path.name for path in EXPECTED.iterdir()} == texts.keys()
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        assert text == (EXPECTED / name).read_text(), name
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert shellcheck is not None
    checked = [shellcheck, "--exclude=SC1091", *map(str, sorted(tmp_path.iterdir()))]  # it may not follow `source`
    done = subprocess.run(checked, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_words_with_spaces_stay_words() -> None:
    job = BatchJob(name="x", purpose="p.", command=("python", "train.py", "gold.files=['a b.jsonl']", "$HOME"))
    cluster = ClusterConfig(prefix="apptainer exec --nv 'my image.sif'", extra=["--exclusive"])
    text = script_text(job, cluster, logs="logs", **(PLACES | {"folder": "/a b"}))
    assert (
        "run=(apptainer exec --nv 'my image.sif' python train.py 'gold.files=['\"'\"'a b.jsonl'\"'\"']' '$HOME')"
        in text
    )
    assert "cd '/a b'\n" in text
    assert "#SBATCH --exclusive\n" in text
    assert "--gpus" not in text
    assert "--partition" not in text


def test_without_a_cache_the_students_wait_for_the_teacher() -> None:
    jobs = jobs_of(open_study("demo", None), [], ClusterConfig(), captures=False)
    assert [(job.name, job.after_success, job.after) for job in jobs] == [
        ("teacher", None, None),
        ("students", "teacher", None),
        ("report", None, "students"),
    ]


# ---------------------------------------------------------------------------------------- the signals

TRAINING = """
import os, pathlib, signal, sys, time
def stop(number, frame):
    time.sleep(0.3)  # the checkpoint
    pathlib.Path("signal").write_text(signal.Signals(number).name)
    sys.exit(int(os.environ["CODE"]))
for one in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(one, stop)
pathlib.Path("started").touch()
time.sleep(float(os.environ["SECONDS_OF_WORK"]))
sys.exit(int(os.environ["CODE"]))
"""


@pytest.mark.parametrize(
    ("sent", "code", "state", "requeued"),
    [
        ("SIGUSR1", 75, "RUNNING", True),
        (None, 75, "RUNNING", True),  # launcher.time_limit, or a signal to its steps alone
        (None, 75, "COMPLETING", False),  # cancelled meanwhile
        ("SIGTERM", 75, "RUNNING", False),
        ("SIGUSR1", 0, "RUNNING", False),
        ("SIGUSR1", 2, "RUNNING", False),
        (None, 0, "RUNNING", False),
    ],
)
@pytest.mark.parametrize("task", [None, 3])
def test_a_job_that_was_asked_to_stop_is_queued_again(
    sent: str | None, code: int, state: str, requeued: bool, task: int | None, tmp_path: Path
) -> None:
    """The command gets the signal, its exit code is the job's; of an array its one job is queued, never all of them."""
    (tmp_path / "train.py").write_text(TRAINING)
    (tmp_path / "bin").mkdir()
    for name, line in (("scontrol", 'echo "$@" > requeued'), ("squeue", f'echo {state}; echo "$@" > asked')):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    job = BatchJob(name="x", purpose="p.", command=(sys.executable, "train.py"))
    batch = tmp_path / "job.sbatch"
    batch.write_text(script_text(job, ClusterConfig(), logs="logs", **(PLACES | {"folder": str(tmp_path)})))
    variables = os.environ | {"SLURM_JOB_ID": "17", "CODE": str(code), "SECONDS_OF_WORK": "60" if sent else "0"}
    if task is not None:  # the job that begins last has the number of the whole array
        variables |= {"SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": str(task)}
    name = "17" if task is None else f"17_{task}"
    variables["PATH"] = f"{tmp_path / 'bin'}:{variables['PATH']}"
    with subprocess.Popen(["bash", str(batch)], env=variables) as process:
        if sent is not None:
            while not (tmp_path / "started").exists():
                time.sleep(0.05)
            process.send_signal(signal.Signals[sent])
        assert process.wait(60) == code
    assert sent is None or (tmp_path / "signal").read_text() == sent
    assert (tmp_path / "requeued").exists() == requeued
    assert not requeued or (tmp_path / "requeued").read_text() == f"requeue {name}\n"
    assert not requeued or f"--jobs={name} " in (tmp_path / "asked").read_text()


# --------------------------------------------------------------------------------------- several nodes


def test_every_attempt_of_a_job_meets_at_a_port_of_its_own() -> None:
    first, second = ({"SLURM_JOB_ID": "412", "SLURM_RESTART_COUNT": str(count)} for count in range(2))
    assert rendezvous(first, "node1") == ["--rdzv-id=412-0", "--rdzv-endpoint=node1:22884"]
    assert rendezvous(second, "node1") == ["--rdzv-id=412-1", "--rdzv-endpoint=node1:22885"]
    assert srun({"SLURM_CPUS_PER_TASK": "8"}, 3)[1:3] == ["--nodes=3", "--ntasks=3"]
    assert "--cpus-per-task=8" in srun({"SLURM_CPUS_PER_TASK": "8"}, 3)
    assert not [word for word in srun({}, 3) if word.startswith("--cpus-per-task")]


def test_one_node_needs_no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "412")  # such as a shell that srun --pty has opened
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    command = ranks_command(["rank"], num_nodes=1, num_processes=4)
    assert "--standalone" in command
    assert "srun" not in command
    command = ranks_command(["rank"], num_nodes=2, num_processes=4)
    assert command[0] == "srun"
    assert "--nnodes=2" in command


def test_nodes_that_are_not_there_are_refused() -> None:
    with pytest.raises(
        InputError, match="launcher.num_nodes=2: expected .*, or to run in a job of SLURM .* found neither"
    ):
        check_allocation(2, {})
    allocated = {"SLURM_JOB_ID": "412", "SLURM_JOB_NUM_NODES": "2"}
    check_allocation(2, allocated)
    with pytest.raises(InputError, match="found one of 2; .*scripts/submit.py with cluster.nodes= makes such a job"):
        check_allocation(3, allocated)


# ------------------------------------------------------------------------------------------ the command


def test_what_cannot_be_submitted_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    check_cluster(SubmitConfig(study="demo", dry_run=True))
    with pytest.raises(InputError, match="expected the command sbatch, found none on this machine.*add --print"):
        check_cluster(SubmitConfig(study="demo"))
    with pytest.raises(InputError, match="cluster.time: expected HOURS:MINUTES:SECONDS or DAYS-HOURS, found 43200"):
        check_cluster(SubmitConfig(study="demo", cluster=ClusterConfig(time="43200")))  # YAML's 12:00:00
    for name in ("nodes", "capture_jobs", "leave_seconds"):
        with pytest.raises(InputError, match=f"cluster.{name}: expected at least 1, found 0"):
            check_cluster(SubmitConfig(study="demo", cluster=ClusterConfig(**{name: 0})))  # type: ignore[arg-type]


def test_several_teachers_in_the_folders_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    study = open_study("demo", None)
    check_one_teacher(study)
    (tmp_path / study.file.runs_dir / "teacher-1").mkdir(parents=True)
    check_one_teacher(study)
    (tmp_path / study.file.runs_dir / "teacher-2").mkdir()
    with pytest.raises(
        InputError, match="teacher: expected at most one, because the jobs take what matches .* found 2"
    ):
        check_one_teacher(study)


def test_another_pool_in_the_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its students would find two. The pool that is asked for may be there already."""
    monkeypatch.chdir(tmp_path)
    study = open_study("demo", None)
    made_of = {"pool": "logarithmic", "members": ["a", ["b", "c"]], "weights": [0.5, 0.5], "temperature": 1.0}
    monkeypatch.setattr(submit, "load_manifest", lambda path: SimpleNamespace(made_of=made_of))
    config = SubmitConfig(study="demo", experiments=["pooled"], folds=2)
    check_one_pool(config, study)
    (tmp_path / study.file.caches_dir / "pooled-demo-0123").mkdir(parents=True)
    check_one_pool(config, study)
    for change in (
        {"folds": 3},
        {"pool": StudyPoolConfig(temperature=0.5)},
        {"pool": StudyPoolConfig(weights=[0.3, 0.7])},
        {"pool": StudyPoolConfig(fit=True)},
    ):
        with pytest.raises(InputError, match="pool: expected no other pool than the one asked for"):
            check_one_pool(dataclasses.replace(config, **change), study)


def test_a_weight_that_adapts_reads_the_teacher_on_dev() -> None:
    study = open_study("demo", None)
    composed_job = SimpleNamespace(study=study, train=lambda job: composed("train", "study=demo", *job.arguments))
    composer = cast(Composer, composed_job)
    adaptive = Job(experiment="combined", seed=1, overrides=("loss.kd.adaptive_weight.every_steps=5",))
    found = with_teacher_on_dev(composer, adaptive)
    assert found.overrides[0] == f"{ADAPTIVE}='{study.file.runs_dir}/teacher-*/predictions-dev.parquet'"
    assert found.overrides[1:] == adaptive.overrides
    assert with_teacher_on_dev(composer, found) == found
    plain = Job(experiment="combined", seed=1, overrides=())
    assert with_teacher_on_dev(composer, plain) == plain


def test_what_a_command_of_slurm_says_is_shown() -> None:
    with pytest.raises(InputError, match="bash: expected success, found: Invalid account; ask"):
        answer_of("bash", "-c", "echo Invalid account >&2; exit 1", advice="ask")
    assert answer_of("echo", "42") == "42"


def test_an_own_cluster_and_an_option_of_training(tmp_path: Path) -> None:
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "ours.yaml").write_text("partition: gpu\nsetup: [module load cuda]\n")
    arguments = ("study=demo", "cluster=ours", "cluster.account=mylab", "loss.kd.weight=0.3", "--cfg", "job")
    shown = script("submit", *arguments, "--config-dir", str(tmp_path), cwd=tmp_path).stdout
    assert "  partition: gpu\n" in shown
    assert "  account: mylab\n" in shown
    assert "overrides:\n- loss.kd.weight=0.3\n" in shown


def test_a_pool_waits_for_its_folds_and_the_students_for_the_pool() -> None:
    study = open_study("demo", None)
    config = StudyConfig(study="demo", experiments=["combined", "pooled"], folds=2, overrides=["loss.kd.weight=3"])
    folds, pool = fold_jobs(config, study), [*pool_words(config, study), *config.overrides]
    jobs = jobs_of(study, student_jobs(config, study), LARGE, captures=True, folds=folds, pool=pool)
    waits = {job.name: (job.after_success, job.after) for job in jobs}
    assert list(waits) == ["teacher", "capture", "cache", "cross_fit", "pool", "students", "report"]
    assert waits["cross_fit"] == ("cache", None)
    assert waits["pool"] == ("cross_fit", None)
    assert waits["students"] == ("cache", "pool")
    by_name = {job.name: job for job in jobs}
    assert by_name["cross_fit"].tasks == tuple(tuple(job.arguments) for job in folds)
    asked = "experiments=[zero_shot,gold_only,weak_only,combined,ceiling,pooled]"
    words = ["study=demo", asked, "folds=2", "loss.kd.weight=3", "probe_seconds=0", "stop_after_pool=true"]
    assert list(by_name["pool"].command[2:]) == words
    typed = composed("study", "study=demo", *study_arguments(words[1:]))
    assert (typed.experiments[-1], typed.folds, typed.stop_after_pool) == ("pooled", 2, True)
    assert typed.overrides == ["loss.kd.weight=3"]
