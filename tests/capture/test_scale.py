"""A cache of a million sequences: planned, gone on with and verified in minutes, in the memory of a small one."""

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
from support.large_corpus import K, settings
from support.tiny import LINES

MEASURED = """
import json, psutil, runpy, sys, threading, time
sys.argv, started, code, peak, done = sys.argv[1:], time.monotonic(), 0, 0, threading.Event()
def watch():  # getrusage would begin with the peak of whoever started us
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
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert found["code"] == 0, done.stdout + done.stderr
    return found


def write_corpus(path: Path, num_records: int) -> None:
    words, chance = " ".join(LINES).split(), np.random.default_rng(0)
    with path.open("w") as file:
        for i, (a, b) in enumerate(chance.integers(len(words), size=(num_records, 2)).tolist()):
            file.write(json.dumps({"text": f"{words[a]} {words[b]} {i:07d}"}) + "\n")


def speak_at_random(sequences: Path, cache: Path, manifest: Manifest, index: int) -> None:
    """Commit a shard in which the teacher said anything: what has to hold of a shard holds."""
    planned = pq.read_table(sequence_file(sequences, index))
    lengths = np.diff(planned["target_ids"].combine_chunks().offsets.to_numpy())
    targets_N = planned["target_ids"].combine_chunks().values.to_numpy()
    chance, num = np.random.default_rng(index), len(targets_N)
    steps_NK = chance.integers(1, 60, size=(num, K)).cumsum(axis=1)  # never the target itself
    gaps_NK = chance.uniform(0.1, 2.0, size=(num, K)).cumsum(axis=1)
    values = {
        "topk_ids": ((targets_N[:, None] + steps_NK) % manifest.vocabulary_size).astype(np.uint16).ravel(),
        "relative_logits": (gaps_NK[:, :1] - gaps_NK).astype(np.float16).ravel(),
        "log_tail": chance.uniform(-3, 0, num).astype(np.float32),
        "next_log_prob": np.full(num, -12, np.float16),
        "entropy": chance.uniform(0, 5, num).astype(np.float16),
    }
    schema = shard_schema(manifest)
    columns = {name: planned[name].combine_chunks() for name in planned.column_names}
    for name, column in values.items():
        offsets = np.concatenate([[0], np.cumsum(lengths * (len(column) // num))]).astype(np.int32)
        kind = schema.field(name).type
        columns[name] = pa.ListArray.from_arrays(offsets, pa.array(column, kind.value_type), type=kind)
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
from support.large_corpus import K, settings
from pipeline.capture.plan import make
from pipeline.capture.plan_lookup import request_of
if __name__ == "__main__":
    config, _ = settings(Path({teacher!r}), Path({folder!r}))
    make(config, request_of(config))
"""


def through(teacher: Path, folder: Path, num_records: int) -> dict[str, dict[str, Any]]:
    """Plan, fill, lose a shard, go on, again, verify; what each took."""
    folder.mkdir()
    write_corpus(folder / "corpus.jsonl", num_records)
    config, words = settings(teacher, folder)
    planning = folder / "planning.py"
    planning.write_text(PLAN.format(tests=str(ROOT / "tests"), teacher=str(teacher), folder=str(folder)))
    took = {"plan": measured(str(planning))}
    request = plan_folder(config)
    manifest = request.load()
    assert manifest is not None
    cache = folder / "caches" / f"many-{manifest.fingerprint[:12]}"
    manifests.create_cache(cache, manifest)
    for index in range(1, manifest.num_shards):  # the first is left to the real teacher
        speak_at_random(request.sequences, cache, manifest, index)
    scripts = ROOT / "scripts"
    took["resume"] = measured(str(scripts / "capture.py"), *words)
    took["again"] = measured(str(scripts / "capture.py"), *words)
    took["verify"] = measured(str(scripts / "audit.py"), "verify", f"cache={cache}")
    took["sequences"] = {"num": sum(info.rows for info in manifests.committed_shards(cache, manifest))}
    return took


@pytest.mark.slow
def test_a_million_sequences(teacher: Path, tmp_path: Path) -> None:
    """Twenty times the corpus, the same memory; the seconds are several times what two slow cores took."""
    small = through(teacher, tmp_path / "small", 50_000)
    large = through(teacher, tmp_path / "large", 1_000_000)
    print(json.dumps({"small": small, "large": large}, indent=2))
    assert large["sequences"]["num"] >= 1_000_000
    for step in ("plan", "resume", "again", "verify"):
        assert large[step]["peak_mb"] < 1.1 * small[step]["peak_mb"] + 16, step
    assert large["plan"]["seconds"] < 400
    assert large["resume"]["seconds"] < 100
    assert large["again"]["seconds"] < 10
    assert large["verify"]["seconds"] < 100


def test_the_same_way_with_fewer(teacher: Path, tmp_path: Path) -> None:
    """What the million go through, and damage in it is still found."""
    took = through(teacher, tmp_path / "few", 12_000)
    assert took["sequences"]["num"] >= 12_000
    (shard,) = (tmp_path / "few").glob("caches/many-*/shards/00001.parquet")
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 1
    shard.write_bytes(content)
    done = script("audit", "verify", f"cache={shard.parent.parent}", cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert "00001.parquet: expected sha256" in done.stdout
