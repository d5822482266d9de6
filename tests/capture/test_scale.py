"""A large corpus: planned, resumed and verified in the memory of a small one."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from pipeline.cache import manifest as manifests
from pipeline.cache.schema import column_encoding, shard_schema
from pipeline.cache.sequence_files import open_sequence_file, sequence_file
from pipeline.capture.plan_lookup import plan_folder
from pipeline.core.types import Manifest
from pipeline.data.packing import OPEN_WINDOWS
from pipeline.data.text_files import all_records
from support.commands import ROOT, script
from support.large_corpus import K, large_capture
from support.tiny import LINES, make_model

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


def write_corpus(path: Path, num_records: int, *, num_words: int = 2) -> None:
    words, generator = " ".join(LINES).split(), np.random.default_rng(0)
    with path.open("w") as file:
        for i in range(num_records):
            chosen = " ".join(words[word] for word in generator.integers(len(words), size=num_words).tolist())
            file.write(json.dumps({"text": f"{chosen} {i:07d}"}) + "\n")


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
import dataclasses, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from support.large_corpus import large_capture
from pipeline.capture.plan import make_plan
from pipeline.capture.plan_lookup import plan_folder
if __name__ == "__main__":
    config, _ = large_capture(Path({teacher!r}), Path({folder!r}))
    config = dataclasses.replace(config, **{changes!r})
    make_plan(config, plan_folder(config))
"""


def measure_plan(teacher: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    """Seconds and memory of the plan of `folder`/corpus.jsonl; `changes` are options."""
    planning = folder / "planning.py"
    names = {"teacher": str(teacher), "folder": str(folder), "changes": changes}
    planning.write_text(PLAN.format(tests=str(ROOT / "tests"), **names))
    return measured(str(planning))


def measure_steps(teacher: Path, folder: Path, num_records: int) -> dict[str, dict[str, Any]]:
    """Plan, commit all shards but the first, resume, run again, verify; seconds and memory of each step."""
    folder.mkdir()
    write_corpus(folder / "corpus.jsonl", num_records)
    config, arguments = large_capture(teacher, folder)
    measures = {"plan": measure_plan(teacher, folder)}
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


@pytest.mark.alone
@pytest.mark.slow(minutes=3)
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


@pytest.mark.slow(minutes=2)
def test_a_plan_with_long_windows_takes_the_same_memory_for_a_larger_corpus(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Windows of 32,768 tokens; each shard fills more of them than the packer holds open."""
    window = 32_768
    teacher = make_model(tmp_path / "teacher", tokenizer, seed=2, max_position_embeddings=window)
    measures = {}
    for name, num_shards in (("small", 3), ("large", 12)):
        (tmp_path / name).mkdir()
        write_corpus(tmp_path / name / "corpus.jsonl", num_shards * 700, num_words=1000)
        measures[name] = measure_plan(teacher, tmp_path / name, window=window, records_per_shard=700)
        (planned,) = (tmp_path / name).glob("caches/.plans/*/sequences")
        rows = [open_sequence_file(path).num_rows for path in planned.iterdir()]
        assert len(rows) == num_shards
        assert min(rows) > OPEN_WINDOWS
    print(json.dumps(measures, indent=2))
    assert measures["large"]["peak_mb"] < 1.2 * measures["small"]["peak_mb"]


@pytest.mark.slow
def test_one_large_row_group_costs_what_small_ones_cost(tmp_path: Path) -> None:
    """The median of paired ratios, each the same rows read from two files in turn."""
    generator = np.random.default_rng(0)
    rows = pa.table({"text": [f"{number} " * 50 for number in generator.integers(10**9, size=200_000)]})
    sizes = {"one": len(rows), "many": 1000}
    for name, size in sizes.items():
        pq.write_table(rows, tmp_path / f"{name}.parquet", row_group_size=size)
    assert pq.read_metadata(tmp_path / "one.parquet").num_row_groups == 1
    ratios = []
    for _ in range(7):
        seconds = {}
        for name in sizes:
            started = time.perf_counter()
            num_read = sum(1 for _ in all_records([tmp_path / f"{name}.parquet"], ["text"]))
            seconds[name] = time.perf_counter() - started
            assert num_read == len(rows)
        ratios.append(seconds["one"] / seconds["many"])
    print(f"one row group / small ones: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    assert statistics.median(ratios) < 1.5
