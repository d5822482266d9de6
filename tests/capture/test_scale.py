"""A large corpus: planned, resumed and verified in the memory of a small one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.cache import manifest as manifests
from pipeline.cache.schema import column_encoding, shard_schema
from pipeline.cache.sequence_files import sequence_file
from pipeline.capture.plan_lookup import plan_folder
from pipeline.core.types import Manifest
from support.commands import ROOT, script
from support.large_corpus import K, large_capture
from support.tiny import LINES

MEASURED = """
import json, psutil, runpy, sys, threading, time
sys.argv, started, code, peak, done = sys.argv[1:], time.monotonic(), 0, 0, threading.Event()
def watch():  # not getrusage: its peak includes that of the process that started this one
    global peak
    while not done.wait(0.05):
        for process in (me, *me.children(recursive=True)):
            try: peak = max(peak, process.memory_info().rss)
            except psutil.Error: pass
if __name__ == "__main__":
    me = psutil.Process()
    threading.Thread(target=watch, daemon=True).start()
    try: runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as left: code = left.code or 0
    done.set()
    print(json.dumps({"code": code, "seconds": time.monotonic() - started, "peak_mb": peak / 2**20}))
"""


def measured(script_path: str, *arguments: str) -> dict[str, Any]:
    """Exit code, seconds and peak memory of a Python file and of its largest child."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, script_path, *arguments], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    measures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert measures["code"] == 0, done.stdout + done.stderr
    return measures


def write_corpus(path: Path, num_records: int) -> None:
    words, generator = " ".join(LINES).split(), np.random.default_rng(0)
    with path.open("w") as file:
        for i, (a, b) in enumerate(generator.integers(len(words), size=(num_records, 2)).tolist()):
            file.write(json.dumps({"text": f"{words[a]} {words[b]} {i:07d}"}) + "\n")


def commit_random_shard(sequences: Path, cache: Path, manifest: Manifest, index: int) -> None:
    """Commit a valid shard with random distributions in place of a teacher's."""
    planned = pq.read_table(sequence_file(sequences, index))
    lengths = np.diff(planned["target_ids"].combine_chunks().offsets.to_numpy())
    targets_N = planned["target_ids"].combine_chunks().values.to_numpy()
    generator, num = np.random.default_rng(index), len(targets_N)
    steps_NK = generator.integers(1, 60, size=(num, K)).cumsum(axis=1)  # never the target itself
    gaps_NK = generator.uniform(0.1, 2.0, size=(num, K)).cumsum(axis=1)
    values = {
        "topk_ids": ((targets_N[:, None] + steps_NK) % manifest.vocabulary_size).astype(np.uint16).ravel(),
        "relative_logits": (gaps_NK[:, :1] - gaps_NK).astype(np.float16).ravel(),
        "log_tail": generator.uniform(-3, 0, num).astype(np.float32),
        "next_log_prob": np.full(num, -12, np.float16),
        "entropy": generator.uniform(0, 5, num).astype(np.float16),
    }
    schema = shard_schema(manifest)
    columns = {name: planned[name].combine_chunks() for name in planned.column_names}
    for name, column in values.items():
        offsets = np.concatenate([[0], np.cumsum(lengths * (len(column) // num))]).astype(np.int32)
        list_type = schema.field(name).type
        columns[name] = pa.ListArray.from_arrays(offsets, pa.array(column, list_type.value_type), type=list_type)
    relative_NK = values["relative_logits"].astype(np.float64).reshape(num, K)
    head_N, tail_N = np.exp(relative_NK).sum(axis=1), np.exp(values["log_tail"].astype(np.float64))
    histogram = np.histogram(head_N / (head_N + tail_N), bins=10, range=(0, 1))[0].tolist()
    temporary = cache / "shards" / f".{index:05d}.tmp"
    encoding = column_encoding(schema)
    with pq.ParquetWriter(
        temporary, schema, compression="zstd", use_dictionary=False, column_encoding=encoding, write_page_checksum=True
    ) as file:
        file.write_table(pa.Table.from_arrays([columns[name] for name in schema.names], schema=schema))
        file.add_key_value_metadata(manifests.footer_totals(targets=num, num_skipped=0, histogram=histogram))
    manifests.commit_shard(cache, temporary, index)


PLAN = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from support.large_corpus import large_capture
from pipeline.capture.plan import make_plan
from pipeline.capture.plan_lookup import plan_folder
if __name__ == "__main__":
    config, _ = large_capture(Path({teacher!r}), Path({folder!r}))
    make_plan(config, plan_folder(config))
"""


def measure_steps(teacher: Path, folder: Path, num_records: int) -> dict[str, dict[str, Any]]:
    """Plan, commit all shards but the first, resume, run again, verify; seconds and memory of each step."""
    folder.mkdir()
    write_corpus(folder / "corpus.jsonl", num_records)
    config, arguments = large_capture(teacher, folder)
    planning = folder / "planning.py"
    planning.write_text(PLAN.format(tests=str(ROOT / "tests"), teacher=str(teacher), folder=str(folder)))
    measures = {"plan": measured(str(planning))}
    plan = plan_folder(config)
    manifest = plan.load()
    assert manifest is not None
    cache = folder / "caches" / f"many-{manifest.fingerprint[:12]}"
    manifests.create_cache(cache, manifest)
    for index in range(1, manifest.num_shards):  # the real teacher captures the first
        commit_random_shard(plan.sequences, cache, manifest, index)
    scripts = ROOT / "scripts"
    measures["resume"] = measured(str(scripts / "capture.py"), *arguments)
    measures["again"] = measured(str(scripts / "capture.py"), *arguments)
    measures["verify"] = measured(str(scripts / "audit.py"), "verify", f"cache={cache}")
    measures["sequences"] = {"num": sum(info.rows for info in manifests.committed_shards(cache, manifest))}
    return measures


@pytest.mark.slow
def test_ten_times_the_corpus_takes_the_same_memory(teacher: Path, tmp_path: Path) -> None:
    """The bounds in seconds are several times what two slow cores took."""
    small = measure_steps(teacher, tmp_path / "small", 30_000)
    large = measure_steps(teacher, tmp_path / "large", 300_000)
    print(json.dumps({"small": small, "large": large}, indent=2))
    assert large["sequences"]["num"] >= 300_000
    for step in ("plan", "resume", "again", "verify"):
        assert large[step]["peak_mb"] < 1.1 * small[step]["peak_mb"] + 16, step
    assert large["plan"]["seconds"] < 120
    assert large["resume"]["seconds"] < 60
    assert large["again"]["seconds"] < 10
    assert large["verify"]["seconds"] < 30


@pytest.mark.slow
def test_the_same_steps_with_fewer_sequences(teacher: Path, tmp_path: Path) -> None:
    """The steps of the large cache; then a damaged shard is found."""
    measures = measure_steps(teacher, tmp_path / "few", 12_000)
    assert measures["sequences"]["num"] >= 12_000
    (shard,) = (tmp_path / "few").glob("caches/many-*/shards/00001.parquet")
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 1
    shard.write_bytes(content)
    done = script("audit", "verify", f"cache={shard.parent.parent}", cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert "00001.parquet: expected sha256" in done.stdout
