"""One rank that loads a model in parts (ZeRO 3), or whole, and measures its own memory.

    torchrun --nproc-per-node=RANKS load_worker.py MODEL_FOLDER WARM_UP_FOLDER OUT

writes OUT/load-RANK.json: bytes of anonymous memory (RssAnon) that were added, at the most, in parts and whole. Files
that are mapped into memory are not in it: all ranks of a machine share them.
"""

import gc
import json
import sys
import threading
from pathlib import Path

from pipeline.core.runtime import exit_rank, ranks_from_environment
from pipeline.models.loading import load_model
from pipeline.training.engine import deepspeed

PARTS = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}


def anonymous_bytes() -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024


def most_added(folder: Path, device, partition) -> int:
    """While the model is loaded, looked at every millisecond."""
    gc.collect()
    before, most, is_done = anonymous_bytes(), 0, threading.Event()

    def look() -> None:
        nonlocal most
        while not is_done.wait(0.001):
            most = max(most, anonymous_bytes() - before)

    thread = threading.Thread(target=look)
    thread.start()
    load_model(folder, dtype="float32", device=device, partition=partition)
    is_done.set()
    thread.join()
    return most


if __name__ == "__main__":
    folder, warm_up, out = map(Path, sys.argv[1:])
    assert deepspeed.__version__
    with ranks_from_environment() as ranks:
        for partition in (PARTS, None):  # imports and buffers of the communication
            load_model(warm_up, dtype="float32", device=ranks.device, partition=partition)
        added = {name: most_added(folder, ranks.device, how) for name, how in (("parts", PARTS), ("whole", None))}
        (out / f"load-{ranks.rank}.json").write_text(json.dumps(added))
        ranks.barrier()
    exit_rank()
