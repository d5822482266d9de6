"""A sum over ranks that is exact in float32: `torchrun -m pipeline.selftest.all_reduce BYTES` in each rank.

The first rank prints the largest error and the bandwidth as JSON.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time

import torch

from pipeline.core.processes import end_with
from pipeline.core.runtime import Ranks, exit_rank, ranks_from_environment

REPEATS = 5
VALUES = 1000  # the summands are integers below it: their sums are exact


def seconds_of(ranks: Ranks, values: torch.Tensor) -> float:
    """The wall-clock time of one all-reduce."""
    ranks.any(False)  # all ranks begin together, and the queue of a GPU is empty
    started = time.perf_counter()
    ranks.all_reduce(values)
    values[:1].tolist()  # waits for the GPU
    return time.perf_counter() - started


def run(num_bytes: int) -> None:
    """Sum, compare, and measure."""
    end_with(os.getppid())  # a hang is ended from outside, with torchrun alone
    with ranks_from_environment() as ranks:
        pattern = (torch.arange(num_bytes // 4, device=ranks.device) % VALUES).float()
        found = ranks.all_reduce(pattern * (ranks.rank + 1))
        expected = pattern * (ranks.world_size * (ranks.world_size + 1) // 2)
        error = float((found - expected).abs().max())
        seconds = statistics.median(seconds_of(ranks, pattern) for _ in range(REPEATS))
        if ranks.rank == 0:
            # each rank sends and receives 2 (W - 1) / W of the bytes: NVIDIA's "bus bandwidth"
            sent = num_bytes * 2 * (ranks.world_size - 1) / ranks.world_size
            print(json.dumps({"error": error, "bytes_per_second": sent / seconds}), flush=True)


if __name__ == "__main__":
    run(int(sys.argv[1]))
    exit_rank()
