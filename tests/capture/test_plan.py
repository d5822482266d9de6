"""The corpus is read and tokenized once; an unchanged corpus is recognised without reading it again."""

from __future__ import annotations

import dataclasses
import gzip
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.cache import manifest as manifests
from pipeline.cache import sequence_files
from pipeline.cache.sequence_files import open_sequence_file, sequence_file
from pipeline.capture import corpus, estimate, plan, plan_lookup, worker
from pipeline.capture.driver import run
from pipeline.capture.plan_lookup import plan_folder
from pipeline.config.schema import Dtype, MalformedPolicy, Targets, TextConfig
from pipeline.core.progress import Progress
from pipeline.core.types import InputError
from pipeline.data.text_files import all_records, raw_records, read_chunks
from support.commands import ROOT, capture_arguments, config_of, script
from support.tiny import LINES, prompts, text_of, write_lines


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One corpus in five files of five formats, with blank lines and small row groups."""
    folder = tmp_path_factory.mktemp("mixed")
    rows = [{"text": f"{LINES[i % 5]} {i}"} for i in range(100)]
    write_lines(folder / "a.jsonl", [*rows[:17], "", *rows[17:20]])
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows[20:45]).encode()))
    pq.write_table(pa.Table.from_pylist(rows[45:80]), folder / "c.parquet", row_group_size=4)
    (folder / "d.txt").write_text("".join(row["text"] + "\n" for row in rows[80:99]))
    (folder / "e.jsonl.zst").write_bytes(pa.compress((json.dumps(rows[99]) + "\n").encode(), "zstd", asbytes=True))
    return folder


@settings(deadline=None, max_examples=60)
@given(size=st.integers(1, 110))
def test_groups_are_the_records_in_order(mixed: Path, size: int) -> None:
    files = text_of(mixed).files
    groups = [list(raw_records(group)) for group in read_chunks(files, size=size)]
    assert [len(group) for group in groups] == [min(size, 100 - first) for first in range(0, 100, size)]
    assert [record for group in groups for record in group] == list(all_records(files))
    assert list(all_records(files))[-1][0].endswith("e.jsonl.zst, line 1")


def test_lines_and_rows_keep_their_numbers(mixed: Path) -> None:
    places = [where for where, _, _ in all_records(text_of(mixed).files)]
    assert places[17].endswith("a.jsonl, line 19")  # after the blank line
    assert places[45].endswith("c.parquet, row 1")
    assert places[79].endswith("c.parquet, row 35")


def planned_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_many_processes_make_the_same_plan_as_one(
    mixed: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(teacher, mixed, tmp_path, records_per_shard=7)
    planned = plan_folder(config)
    manifest = plan.make_plan(config, planned)
    files_of_one = planned_files(planned.sequences)
    assert (manifest.num_records, manifest.num_shards) == (100, 15)
    shutil.rmtree(planned.folder)
    monkeypatch.setattr(corpus, "CORPUS_BYTES_PER_PROCESS", 1)
    assert plan.make_plan(config, planned) == manifest
    assert planned_files(planned.sequences) == files_of_one


def test_a_bad_record_stops_the_plan_and_leaves_nothing(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = write_lines(tmp_path / "a.jsonl", [*({"text": LINES[0]} for _ in range(50)), "broken"])
    config = config_of(teacher, files, tmp_path / "caches", records_per_shard=5)
    for bytes_per_process in (1 << 30, 1):
        monkeypatch.setattr(corpus, "CORPUS_BYTES_PER_PROCESS", bytes_per_process)
        with pytest.raises(InputError, match="a.jsonl, line 51: expected a JSON object, found it broken"):
            run(config)
        assert list((tmp_path / "caches" / ".plans").glob("*/*")) == []


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from pipeline.capture import corpus, plan
from pipeline.capture.plan_lookup import plan_folder
from support.commands import config_of
import psutil
corpus.CORPUS_BYTES_PER_PROCESS, corpus.MAX_PENDING_BYTES = 1, 2000
def advance(progress, count, num_tokenized=[0]):
    num_tokenized[0] += 1
    if num_tokenized[0] == 3:
        print(*(child.pid for child in psutil.Process().children()), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
if __name__ == "__main__":
    corpus.Progress.advance = advance
    config = config_of(Path({teacher!r}), Path({files!r}), Path({folder!r}), records_per_shard=5, lease_seconds=0.5)
    plan.make_plan(config, plan_folder(config))
"""


def test_a_killed_plan_goes_on_where_it_was(teacher: Path, tmp_path: Path) -> None:
    files = write_lines(tmp_path / "a.jsonl", [{"text": f"{LINES[i % 5]} {i}"} for i in range(200)])
    script_file = tmp_path / "planning.py"
    folder = tmp_path / "caches"
    script_file.write_text(
        KILLED.format(tests=str(ROOT / "tests"), teacher=str(teacher), files=str(files), folder=str(folder))
    )
    with (tmp_path / "printed").open("w") as printed:  # a pipe would stay open as long as a child of it lives
        killed = subprocess.run([sys.executable, script_file], stdout=printed, timeout=300)
    assert killed.returncode == -signal.SIGKILL
    pids = [int(pid) for pid in (tmp_path / "printed").read_text().split()]
    assert pids
    alive = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=60)[1]
    for child in alive:
        child.kill()
    assert not alive  # those that tokenized have noticed that nobody reads the corpus any more
    (unfinished,) = folder.glob(".plans/*/.unfinished")
    (unfinished / ".00099.parquet.1.0.tmp").write_bytes(b"the beginning of a file")
    before = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in unfinished.glob("*.parquet")}
    assert 3 <= len(before) < 40

    config = config_of(teacher, files, folder, records_per_shard=5, lease_seconds=0.5)
    planned = plan_folder(config)
    assert planned.folder == unfinished.parent
    manifest = plan.make_plan(config, planned)
    after = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in planned.sequences.iterdir()}
    assert before.items() <= after.items()
    undisturbed = config_of(teacher, files, tmp_path / "other", records_per_shard=5)
    assert plan.make_plan(undisturbed, plan_folder(undisturbed)) == manifest
    assert planned_files(planned.sequences) == planned_files(plan_folder(undisturbed).sequences)


def test_text_that_waits_for_a_processor_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard larger than the bound waits alone."""
    waiting: list[int] = []
    largest = []

    class Tokenized(Future[None]):
        def result(self, timeout: float | None = None) -> None:
            waiting.pop(0)

    class Executor(ThreadPoolExecutor):
        def submit(self, function: Any, path: Path, chunks: Any, *arguments: Any) -> Any:
            waiting.append(sum(chunk.num_bytes for chunk in chunks))
            largest.append(sum(waiting))
            return Tokenized()

    monkeypatch.setattr(corpus, "MAX_PENDING_BYTES", 1000)
    pending = corpus.PendingShards(Executor(1), Progress("plan", total=0, unit="", log_every_seconds=1))
    for length in (200, 200, 300, 5000, 100, 900, 70):
        (chunks,) = read_chunks([write_lines(tmp_path / "a.jsonl", ["x" * (length - 65)])], size=1)
        pending.submit(chunks, 1, tmp_path / "0")
    pending.wait(max_bytes=-1)
    assert largest == [200, 400, 700, 5000, 100, 1000, 970]
    assert not waiting


def test_progress_of_the_plan_counts_what_it_does_now(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By the position in the packed files."""
    for name in ("a.jsonl.gz", "b.jsonl.gz"):
        lines = "".join(json.dumps({"text": f"{LINES[i % 5]} {i}"}) + "\n" for i in range(100))
        (tmp_path / name).write_bytes(gzip.compress(lines.encode()))
    size = sum(path.stat().st_size for path in tmp_path.glob("*.gz"))
    monkeypatch.setattr(corpus, "MB", 1)
    config = config_of(teacher, tmp_path, tmp_path / "caches", records_per_shard=20, log_every_seconds=1e-9)
    with caplog.at_level(logging.INFO, "pipeline"):
        plan.make_plan(config, plan_folder(config))
    shown = [message for message in caplog.messages if message.startswith("plan ")]
    assert f"plan {size}/{size} MB" in shown[-1]
    assert "0 s left" in shown[-1]


def test_a_row_group_ends_by_tokens_too(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = write_lines(tmp_path / "a.jsonl", [{"text": f"{LINES[i % 5]} {i}"} for i in range(100)])
    config = config_of(teacher, files, tmp_path / "caches", records_per_shard=100)
    planned = plan_folder(config)
    plan.make_plan(config, planned)
    path = sequence_file(planned.sequences, 0)
    whole = list(open_sequence_file(path))
    monkeypatch.setattr(sequence_files, "TOKENS_PER_GROUP", 200)
    sequence_files.write_sequence_file(path, whole)
    metadata = pq.read_metadata(path)
    assert metadata.num_rows == len(whole)
    assert metadata.row_group(0).num_rows == 200 // 48 + 1  # windows of 48 tokens are nearly full
    assert [sequence.key for sequence in open_sequence_file(path)] == [sequence.key for sequence in whole]


def test_the_plan_is_remembered_until_something_changes(teacher: Path, tmp_path: Path) -> None:
    files = write_lines(tmp_path / "a.jsonl", prompts(30, labeled=False))
    config = config_of(teacher, files, tmp_path / "caches")
    first = plan_folder(config)
    assert first.load() is None
    cache = run(config)
    assert plan_folder(config) == first
    assert first.load() is not None
    assert not first.sequences.exists()  # deleted when the cache was finished
    os.utime(files)
    assert plan_folder(config) != first  # read again, since its content may have changed
    assert run(config) == cache
    write_lines(files, prompts(31, labeled=False))
    assert run(config) != cache


def test_a_lost_shard_of_a_finished_cache_is_planned_and_captured_again(teacher: Path, tmp_path: Path) -> None:
    files = write_lines(tmp_path / "a.jsonl", prompts(30, labeled=False))
    config = config_of(teacher, files, tmp_path / "caches", records_per_shard=10)
    cache = run(config)
    before = (cache / "shards" / "00001.parquet").read_bytes()
    for path in (cache / "shards").glob("00001.*"):
        path.unlink()
    assert run(config) == cache
    assert (cache / "shards" / "00001.parquet").read_bytes() == before


def test_another_version_of_the_package_leaves_no_tokenized_text(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A capture is interrupted, a file of the package changes: the second plan is another, and both are cleaned up."""
    files = write_lines(tmp_path / "a.jsonl", prompts(30, labeled=False))
    config = config_of(teacher, files, tmp_path / "caches", records_per_shard=10)
    elsewhere = dataclasses.replace(config, cache=str(tmp_path / "exactly here"), plans_dir=f"{tmp_path}/caches/.plans")
    plans = [plan_folder(one) for one in (config, elsewhere)]
    for one, planned in zip((config, elsewhere), plans, strict=True):
        plan.make_plan(one, planned)
    states = plan_lookup.file_states
    monkeypatch.setattr(plan_lookup, "file_states", lambda paths: [*states(paths), ("changed.py",)])
    later = plan_folder(config)
    assert later not in plans
    run(config)
    assert later.load() == plans[0].load()
    assert [planned.sequences.exists() for planned in (later, *plans)] == [False, False, True]


def test_a_worker_says_where_auto_means_another_dtype(
    teacher: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(teacher, data / "corpus.jsonl", tmp_path)
    manifest = plan.make_plan(config, plan_folder(config))
    assert manifest.made_of["teacher_dtype"] == "float32"
    for here in (Dtype.float32, Dtype.bfloat16):
        monkeypatch.setattr(
            worker, "resolve_dtype", lambda teacher, here=here: dataclasses.replace(teacher, dtype=here)
        )
        for dtype in (Dtype.float32, Dtype.auto):
            asked = dataclasses.replace(config, teacher=dataclasses.replace(config.teacher, dtype=dtype))
            caplog.clear()
            assert worker.planned_teacher(asked, manifest).dtype is Dtype.float32
            assert bool(caplog.messages) == (here is Dtype.bfloat16 and dtype is Dtype.auto)
    assert "chose float32, and all workers use it; this one would choose bfloat16" in caplog.text


def test_a_damaged_plan_is_rejected(teacher: Path, tmp_path: Path) -> None:
    files = write_lines(tmp_path / "a.jsonl", prompts(3000, labeled=False))
    config = config_of(teacher, files, tmp_path / "caches", records_per_shard=3000)
    planned = plan_folder(config)
    plan.make_plan(config, planned)
    path = planned.sequences / "00000.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"expected the tokenized text, found it damaged .*; delete"):
        list(open_sequence_file(sequence_file(planned.sequences, 0)))


def test_a_finished_cache_is_recognised_without_torch(teacher: Path, data: Path, tmp_path: Path) -> None:
    """A second run, as in a sweep, imports neither torch nor transformers."""
    arguments = capture_arguments(teacher, data)
    script("capture", *arguments, cwd=tmp_path)
    again = (
        "import runpy, sys; sys.argv = ['capture.py', *sys.argv[1:]]; "
        f"runpy.run_path({str(ROOT / 'scripts' / 'capture.py')!r}, run_name='__main__'); "
        "print(sorted({'torch', 'transformers'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", again, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "60 records (0 skipped)" in done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_full_disk_stops_the_plan(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = write_lines(tmp_path / "a.jsonl", prompts(3, labeled=False))

    def raise_disk_full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(plan, "sync_files", raise_disk_full)
    with pytest.raises(InputError, match="expected to write the tokenized corpus, found No space left on device"):
        run(config_of(teacher, files, tmp_path / "caches"))


# ------------------------------------------------------------------------------------------- estimate


def test_the_estimate_agrees_with_the_capture(mixed: Path, teacher: Path, tmp_path: Path, capfd: Any) -> None:
    config = config_of(teacher, mixed, tmp_path / "caches", records_per_shard=50)
    assert estimate.run(config) == 0
    printed = capfd.readouterr().out
    assert not (tmp_path / "caches").exists()
    cache = run(config)
    infos = manifests.committed_shards(cache, manifests.load_manifest(cache))
    assert "100 records" in printed
    assert "in 2 shards" in printed
    targets = float(printed.split(" targets in")[0].split()[-1].replace(",", ""))
    assert targets == pytest.approx(sum(info.targets for info in infos), rel=0.1)


def test_an_estimate_from_a_first_batch_that_takes_longer_than_the_probe(
    teacher: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setattr(estimate, "PROBE_SECONDS", 0.0)
    config = config_of(teacher, data / "corpus.jsonl", tmp_path / "caches", batch_sequences=1)
    assert estimate.run(config) == 0
    printed = capfd.readouterr().out
    assert 0 < int(printed.split("Measured: ")[1].split(" records")[0]) < 60
    assert "The corpus has 60 records" in printed


def test_shards_that_take_long_are_named_with_a_better_size(
    teacher: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """An interruption loses the shard at work: the estimate says it, and so does a capture after its first minute."""
    assert worker.shard_advice(1800.0, 20_000) is None
    advice = worker.shard_advice(3600.0, 20_000)
    assert advice is not None
    assert advice.startswith("a shard takes 60 min here")
    assert "records_per_shard=3333 makes it about 10 min" in advice
    monkeypatch.setattr(worker, "LONG_SHARD_SECONDS", 0.0)
    monkeypatch.setattr(worker, "MEASURED_SECONDS", 0.0)
    config = config_of(teacher, data / "corpus.jsonl", tmp_path / "caches")
    assert estimate.run(config) == 0
    assert "A shard takes" in capfd.readouterr().out
    run(config)
    assert capfd.readouterr().err.count("a shard takes") == 3  # once in each


def test_an_estimate_without_usable_records_is_refused(teacher: Path, tmp_path: Path) -> None:
    files = write_lines(tmp_path / "a.jsonl", ["broken", "{}"])
    corpus = TextConfig(files=[str(files)], malformed=MalformedPolicy.skip)
    message = r"corpus: expected usable records, found none at its beginning \(2 malformed\)"
    with pytest.raises(InputError, match=message):
        estimate.run(config_of(teacher, files, tmp_path / "caches", corpus=corpus))


def test_the_estimate_warns_of_a_small_disk(
    teacher: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    corpus = TextConfig(files=[str(data / "corpus.jsonl")], targets=Targets.next)
    assert estimate.run(config_of(teacher, data / "corpus.jsonl", tmp_path / "caches", corpus=corpus)) == 1
    assert "NOT enough" in capfd.readouterr().out


def test_audit_plan_takes_the_options_of_a_capture(teacher: Path, data: Path, tmp_path: Path) -> None:
    done = script("audit", "plan", *capture_arguments(teacher, data), cwd=tmp_path)
    assert "60 records" in done.stdout
    assert "kind=topk k=8" in done.stdout


# ------------------------------------------------------------------------------------------ the teacher


def test_a_teacher_that_cannot_be_used_stops_before_the_corpus_is_read(
    teacher: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: Any) -> None:
        raise AssertionError("the corpus was tokenized")

    monkeypatch.setattr(plan, "tokenize_corpus", never)
    folder = Path(shutil.copytree(teacher, tmp_path / "run" / "model"))
    for path, expected in ((folder.parent, f"found none; give {folder}"), (folder, "as its header describes")):
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1])
        with pytest.raises(InputError, match=expected):
            run(config_of(path, data / "corpus.jsonl", tmp_path / "caches"))


def test_code_of_the_teacher_is_in_the_fingerprint_where_it_is_run(teacher: Path, data: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(teacher, tmp_path / "teacher"))
    (folder / "parts").mkdir()

    def planned(code: str, trust: bool) -> Any:
        (folder / "parts" / "code.py").write_text(code)
        config = config_of(folder, data / "corpus.jsonl", tmp_path / "caches")
        config.teacher.trust_remote_code = trust
        return plan.make_plan(config, plan_folder(config))

    plain, one, other = planned("a = 1", False), planned("a = 1", True), planned("a = 22", True)
    assert "remote_code" not in plain.made_of
    assert len({plain.fingerprint, one.fingerprint, other.fingerprint}) == 3
    assert planned("a = 22", False).fingerprint == plain.fingerprint


def test_a_manifest_records_the_parts_of_the_tokenizer_outside_the_fingerprint(cache: Path, tmp_path: Path) -> None:
    manifest = manifests.load_manifest(cache)
    assert manifest.tokenizer is not None
    assert [token["content"] for token in manifest.tokenizer["added_tokens"].values()] == ["<bos>", "<eos>"]
    assert "tokenizer_parts" not in manifest.made_of
    older = json.loads((cache / "manifest.json").read_text())
    older["tokenizer"]["added_tokens"]["1"]["content"] = "<end>"
    (tmp_path / "manifest.json").write_text(json.dumps(older))
    with pytest.raises(InputError, match="tokenizer: not what was recorded"):
        manifests.load_manifest(tmp_path)
    del older["tokenizer"]  # as a cache of before
    (tmp_path / "manifest.json").write_text(json.dumps(older, indent=2) + "\n")
    loaded = manifests.load_manifest(tmp_path)
    assert loaded.tokenizer is None
    assert json.loads(json.dumps(manifests.to_plain(loaded))) == older
    assert loaded.fingerprint == manifest.fingerprint == manifests.fingerprint(manifest.made_of)
