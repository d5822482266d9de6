"""A worker's GPU: bound before anything else, its events in its own streams, and no wait but the one for a copy.

The machine with two GPUs is a fake (`support.fake_gpu`), so that this is checked where there is none; the last test
needs two real ones.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.cache import manifest as manifests
from pipeline.cache.shards import ShardReader
from pipeline.capture import driver, teacher, worker
from pipeline.capture.plan import make_plan
from pipeline.capture.plan_lookup import plan_folder
from pipeline.core.runtime import bind_device
from pipeline.core.types import Captured, TopK
from pipeline.models.loading import load_model
from support import fake_gpu
from support.commands import config_of
from support.fake_gpu import FakeGpus
from support.tiny import prompts, write_lines

COLUMNS = 5  # of a cache of all tokens: ids, logits, tails, log-probability, entropy
FORWARD, COPIES = "the stream of cuda:1", "the copy stream of cuda:1"
Teacher = Path


@pytest.fixture(scope="module")
def worked(tmp_path_factory: pytest.TempPathFactory, teacher: Teacher) -> tuple[list[str], Path, Path]:
    """What worker 1 of a machine with two GPUs did, its cache, and the cache of a CPU."""
    folder = tmp_path_factory.mktemp("two-gpus")
    corpus = write_lines(folder / "corpus.jsonl", prompts(40, labeled=False))
    config = config_of(teacher, corpus, folder, batch_sequences=2, records_per_shard=20, plans_dir=str(folder / "p"))
    plan, cache = plan_folder(config), folder / "by-gpu"
    manifest = make_plan(config, plan)
    manifests.create_cache(cache, manifest)
    loaded = load_model(teacher, dtype="float32", device=torch.device("cpu"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        cuda = fake_gpu.install(monkeypatch)

        def opened(model: Any, device: torch.device) -> Any:
            cuda.log.append(f"load on {device}, the current one is {cuda.current()}")
            return fake_gpu.on_gpu(loaded, device)

        monkeypatch.setattr(worker, "open_model", opened)
        with FakeGpus(cuda.log):
            worker.run_worker(config, cache, plan.sequences, range(manifest.num_shards), worker=1)
    manifests.finalize_cache(cache, manifest, stale_seconds=1)
    by_cpu = driver.run(config)
    assert isinstance(by_cpu, Path)
    return cuda.log, cache, by_cpu


def test_the_worker_binds_its_gpu_before_anything_else(worked: tuple[list[str], Path, Path]) -> None:
    log, _, _ = worked
    assert log[:2] == ["MainThread binds cuda:1", "load on cuda:1, the current one is cuda:1"]


def test_so_does_the_thread_that_waits_and_writes(worked: tuple[list[str], Path, Path]) -> None:
    """A new thread begins with the first GPU, where its first call would open a context."""
    log, _, _ = worked
    assert log.count("write binds cuda:1") == 2  # one thread a shard
    assert log.index("write binds cuda:1") < next(i for i, line in enumerate(log) if line.startswith("wait for event"))


def test_each_event_is_recorded_in_the_stream_of_the_work_that_it_ends(worked: tuple[list[str], Path, Path]) -> None:
    """Begin and end of a forward in the forward's stream; the copies begin after its end, and end in their own."""
    log, _, _ = worked
    events = [line for line in log if re.match(r"record|enter|leave|copy to host|the copy|keep", line)]
    batches = log.count(f"enter {COPIES}")
    assert batches > 4
    one = len(events) // batches
    for first in range(0, len(events), one):
        numbers = [int(n) for line in events[first : first + one] for n in re.findall(r"event (\d+)", line)]
        assert events[first : first + one] == [
            f"record event {numbers[0]} in {FORWARD}",
            f"record event {numbers[1]} in {FORWARD}",
            f"{COPIES} waits for event {numbers[1]}",
            f"enter {COPIES}",
            *["copy to host", f"keep until {COPIES}"] * COLUMNS,
            f"record event {numbers[3]} in {COPIES}",
            f"leave {COPIES}",
        ]


def test_the_host_waits_for_the_end_of_the_copies_and_no_copy_blocks(worked: tuple[list[str], Path, Path]) -> None:
    """So the next forward is queued behind this one; only transformers looks, once a batch, whether it is packed."""
    log, _, _ = worked
    batches = log.count(f"enter {COPIES}")
    assert [line for line in log if "blocking" in line] == []
    assert sum("wait: " in line for line in log) <= batches
    copied = [line.split(" in ")[0].removeprefix("record ") for line in log if line.endswith(f"in {COPIES}")]
    assert sorted(line for line in log if line.startswith("wait for")) == sorted(
        f"wait for {event}" for event in copied
    )
    assert sum(line == "copy to host" for line in log) == COLUMNS * batches


def test_what_it_writes_is_what_a_cpu_writes(worked: tuple[list[str], Path, Path]) -> None:
    """The fake changes no value, so each row is the same to the last bit."""
    _, by_gpu, by_cpu = worked
    mine, other = ShardReader(by_gpu), ShardReader(by_cpu)
    assert mine.blocks == other.blocks
    for block, size in enumerate(mine.blocks):
        for row in range(size):
            (sequence, captured), (expected_sequence, expected) = mine.row(block, row), other.row(block, row)
            assert sequence.key == expected_sequence.key
            assert torch.equal(captured.top.ids_NK, expected.top.ids_NK)
            assert torch.equal(captured.entropy_N, expected.entropy_N)


def test_a_timestamp_is_recorded_in_the_stream_of_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = fake_gpu.install(monkeypatch)
    for gpu in ("cuda:0", "cuda:1"):
        teacher.timestamp(torch.device(gpu))
        assert cuda.log[-1].endswith(f"in the stream of {gpu}")


@pytest.mark.gpu(devices=2)
def test_a_copy_from_the_second_gpu_waits_for_its_forward() -> None:
    """Also in a process whose current device is the first one."""
    bind_device(0)
    device = torch.device("cuda", 1)
    busy_HH = torch.randn(8192, 8192, device=device)
    values_N = torch.zeros(1000, device=device)
    torch.cuda.synchronize(device)
    started = teacher.timestamp(device)
    for _ in range(50):
        busy_HH = busy_HH @ busy_HH / 8192
    values_N += 3 + 0 * busy_HH[0, 0].nan_to_num()
    ids_NK = values_N.long()[:, None]
    top = TopK(ids_NK=ids_NK, relative_logits_NK=ids_NK.half(), log_tail_NC=ids_NK.float(), temperatures=(1.0,))
    captured = Captured(top=top, next_log_prob_N=values_N.half(), entropy_N=values_N.half())
    pending = teacher.start_copy([], captured, started)
    pending.copied.synchronize()
    assert (pending.captured.entropy_N == 3).all()
    assert pending.started.elapsed_time(pending.ended) > 0
