"""One rank that takes the same two steps with Muon under every ZeRO stage.

    torchrun --nproc-per-node=RANKS muon_worker.py OUT

writes OUT/{ranks}-{dtype}-zero{stage}.pt: the student's weights after the steps.
"""

import dataclasses
import sys
from pathlib import Path

import torch

from pipeline.config.schema import Optimizer, TrainConfig
from pipeline.core.progress import start_logging
from pipeline.core.runtime import exit_rank, ranks_from_environment
from support import gradient_worker

# a large epsilon makes AdamW's update proportional to the gradient
OPTIONS = {"learning_rate": 1.0, "epsilon": 1.0, "warmup_fraction": 0.0, "max_grad_norm": 0.0}


def changed(config: TrainConfig) -> TrainConfig:
    """With Muon in AdamW's place."""
    options = dataclasses.replace(config.optimizer, name=Optimizer.muon, muon_learning_rate=0.02, **OPTIONS)
    return dataclasses.replace(config, optimizer=options)


if __name__ == "__main__":
    start_logging()
    with ranks_from_environment() as ranks:
        for dtype in ("float32", "bfloat16"):
            for stage in range(4):
                weights = gradient_worker.weights_after(ranks, "striped", stage, 2, dtype, changed)
                if ranks.rank == 0:
                    torch.save(weights, Path(sys.argv[1]) / f"{ranks.world_size}-{dtype}-zero{stage}.pt")
                ranks.barrier()
    exit_rank()
