"""Submit a study: write the files of its jobs, and give them to SLURM."""

from __future__ import annotations

import dataclasses
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from pipeline.cache.manifest import load_manifest
from pipeline.cluster.jobs import jobs_of
from pipeline.cluster.sbatch import BatchJob, script_text, submission_text
from pipeline.config.commands import SubmitConfig
from pipeline.config.compose import open_study, quoted
from pipeline.config.study import Study
from pipeline.core.files import is_url, matching_paths, write_atomically
from pipeline.core.progress import start_logging
from pipeline.core.types import InputError
from pipeline.declare.leaks import check_texts
from pipeline.study.forecast import ADAPTIVE, Composer, check_jobs, jobs_at_once, texts_of, with_curve_length
from pipeline.study.members import check_pool, pool_words
from pipeline.study.plan import POOLED, Job, fold_jobs, student_jobs


def run(config: SubmitConfig) -> None:
    """Check every run of the study, write the files, and submit them unless only asked to show them."""
    start_logging()
    study = open_study(config.study, config.study_dir)
    check_cluster(config)
    composer = Composer(study)
    students, folds = student_jobs(config, study), fold_jobs(config, study)
    check_pool(config, composer, students)
    check_jobs(composer, [*folds[:1], *students])
    check_texts(texts_of(study), allowed=study.file.allow_shared_records)
    students = [with_teacher_on_dev(composer, with_curve_length(composer, job)) for job in students]
    folds = [with_teacher_on_dev(composer, job) for job in folds]
    check_one_teacher(study)
    if folds:
        check_one_pool(config, study)
    if (num_jobs := jobs_at_once(composer, students)) > 1:
        raise InputError(
            f"launcher.jobs: expected 1, because each student is a batch job of its own, found {num_jobs}; leave it "
            "out, or run scripts/study.py on one machine"
        )
    captures = any(map(composer.reads_cache, students))
    pool = [*pool_words(config, study), *config.overrides]
    jobs = jobs_of(study, students, config.cluster, captures=captures, folds=folds, pool=pool)
    files = write_files(config, study, jobs)
    if config.dry_run:
        for file in files:
            print(f"==> {file}\n\n{file.read_text()}")
        return
    check_queue(study, jobs)
    check_arrays(jobs)
    names = ",".join(f"{study.name}-{job.name}" for job in jobs)
    advice = f"cancel what it has submitted before: scancel --me --name={names}"
    print(answer_of("bash", str(files[-1]), advice=advice))
    print(f"files and logs: {files[-1].parent}; what they do: squeue --name={names}, and scripts/status.py")


def write_files(config: SubmitConfig, study: Study, jobs: list[BatchJob]) -> list[Path]:
    """The file of each job, numbered in their order, and last the one that submits them."""
    folder = Path(config.folder or f"{study.file.runs_dir}/submit")
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    origin = shlex.join(["python", *sys.orig_argv[1:]])
    names = {"study": study.name, "folder": str(Path.cwd())}
    files = [folder / f"{number}-{job.name}.sbatch" for number, job in enumerate(jobs, 1)]
    for job, file in zip(jobs, files, strict=True):
        write_atomically(file, script_text(job, config.cluster, origin=origin, logs=f"{folder}/logs", **names))
    last = folder / "submit.sh"
    write_atomically(last, submission_text(jobs, files=[str(file) for file in files], **names))
    return [*files, last]


def check_cluster(config: SubmitConfig) -> None:
    """Refuse options that no job could hold, and a machine that cannot submit."""
    cluster = config.cluster
    for name, value, least in (
        ("nodes", cluster.nodes, 1),
        ("capture_jobs", cluster.capture_jobs, 1),
        ("gpus_per_node", cluster.gpus_per_node, 0),
        ("leave_seconds", cluster.leave_seconds, 1),
    ):
        if value < least:
            raise InputError(f"cluster.{name}: expected at least {least}, found {value}; correct it")
    if cluster.time is not None and cluster.time.isdigit():
        raise InputError(
            f"cluster.time: expected HOURS:MINUTES:SECONDS or DAYS-HOURS, found {cluster.time}; write it in quotes "
            '("12:00:00"): without them YAML reads a number of seconds, which SLURM takes for minutes'
        )
    if not config.dry_run and shutil.which("sbatch") is None:
        raise InputError(
            "cluster: expected the command sbatch, found none on this machine; run this on a login node of the "
            "cluster, or add --print to see the files"
        )


def check_queue(study: Study, jobs: list[BatchJob]) -> None:
    """Refuse a study that is in the queue already: its jobs would only wait for each other."""
    names = ",".join(f"{study.name}-{job.name}" for job in jobs)
    found = answer_of("squeue", "--noheader", "--me", f"--name={names}", "--format=%j %i %T").splitlines()
    if found:
        raise InputError(
            f"expected none of this study's jobs in the queue, found {len(found)}, such as {found[0].strip()}; wait "
            f"for them, or cancel them with scancel --name={names}"
        )


def check_arrays(jobs: list[BatchJob]) -> None:
    """Refuse an array that is larger than the cluster allows: sbatch would only call its specification invalid."""
    limit = re.search(r"^MaxArraySize\s*=\s*(\d+)", answer_of("scontrol", "show", "config"), re.MULTILINE)
    for job in jobs:
        size = job.workers or len(job.tasks)
        if limit is not None and size > int(limit[1]):
            what = "choose a smaller cluster.capture_jobs" if job.workers else "submit a part of the seeds at a time"
            raise InputError(f"{job.name}: expected at most {limit[1]} jobs (MaxArraySize), found {size}; {what}")


def answer_of(*words: str, advice: str = "see whether this machine reaches the cluster") -> str:
    """What a command prints; InputError with its own words where it fails."""
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = " ".join((done.stderr or done.stdout).split()) or f"exit code {done.returncode}"
        raise InputError(f"{words[0]}: expected success, found: {reason}; {advice}")
    return done.stdout.strip()


# ------------------------------------------------------------------------------------------- inputs


def with_teacher_on_dev(composer: Composer, job: Job) -> Job:
    """The job with the teacher's predictions on dev, which a weight that adapts reads and the teacher's job makes."""
    adaptive = composer.train(job).loss.kd.adaptive_weight
    if adaptive.every_steps == 0 or any(override.startswith(f"{ADAPTIVE}=") for override in job.overrides):
        return job
    place = f"{composer.study.file.runs_dir}/teacher-*/predictions-dev.parquet"
    return dataclasses.replace(job, overrides=(f"{ADAPTIVE}={quoted([place])[1:-1]}", *job.overrides))


def check_one_teacher(study: Study) -> None:
    """Refuse a study with several teachers or caches in its folders: its jobs find theirs by a glob."""
    places = [("teacher", f"{study.file.runs_dir}/teacher-*"), ("cache", f"{study.file.caches_dir}/{study.name}-*")]
    for what, pattern in places:
        found = [] if is_url(pattern) else matching_paths(pattern)
        if len(found) > 1:
            raise InputError(
                f"{what}: expected at most one, because the jobs take what matches {pattern}, found {len(found)} "
                f"({', '.join(str(path) for path in found[:3])}); move the others away, or give the study other folders"
            )


def check_one_pool(config: SubmitConfig, study: Study) -> None:
    """Refuse another pool than the one asked for in the study's folder: the students find theirs by a glob, too."""
    pattern, asked = f"{study.file.caches_dir}/{POOLED}-{study.name}-*", config.pool
    others = []
    for path in matching_paths(pattern):
        made_of = load_manifest(path).made_of
        weights = "fit" if "fit" in made_of else (made_of["weights"], made_of["temperature"])
        found = (made_of["pool"], len(made_of["members"][-1]), weights)
        wanted = "fit" if asked.fit else (asked.weights or [0.5, 0.5], asked.temperature)
        others += [path] * (found != (asked.kind.name, config.folds, wanted))
    if others:
        raise InputError(
            f"pool: expected no other pool than the one asked for, because the jobs take what matches {pattern}, found "
            f"{', '.join(map(str, others))}; move it away, or give the study another caches_dir"
        )
