"""One rank that makes one update in bfloat16 from 64 micro-batches, at each ZeRO stage.

    torchrun --nproc-per-node=RANKS accumulation_worker.py OUT

writes OUT/{ranks}-{stage}.json: the distance of the update from that of the exact sum of the micro-batches' gradients,
and from that of one batch, each divided by the length of the update.
"""

import dataclasses
import json
import sys
from pathlib import Path

import deepspeed
import torch

from pipeline.config.schema import TrainConfig
from pipeline.core.progress import start_logging
from pipeline.core.runtime import exit_rank, ranks_from_environment
from pipeline.core.types import Batch
from pipeline.data.mixture import collate
from pipeline.objective.terms import StepInputs, count_positions
from pipeline.training.builders import weights_at
from pipeline.training.run import Run
from support import gradient_worker

MICRO_BATCHES = 64  # on each rank
gradient_worker.STEPS = 1


def without_clipping(config: TrainConfig) -> TrainConfig:
    return dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, max_grad_norm=0.0))


def updated(ranks, stage: int, accumulation: int) -> torch.Tensor:
    """The float32 weights after the step, as one vector."""
    run = gradient_worker.run_after(ranks, "every other", stage, accumulation, "bfloat16", without_clipping)
    optimizer, named = run.engine.optimizer, sorted(run.engine.module.named_parameters())
    if stage > 0:
        weights = [deepspeed.utils.safe_get_full_fp32_param(parameter) for _, parameter in named]
    else:  # DeepSpeed keeps them in groups beside the model's
        groups = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        of = {id(half): weight for pair in groups for half, weight in zip(*pair, strict=True)}
        weights = [of[id(parameter)] for _, parameter in named]
    return torch.cat([weight.detach().flatten() for weight in weights])


def exactly_updated(ranks) -> torch.Tensor:
    """The same by autograd: each micro-batch's own gradient in bfloat16, their sum in float64, then torch's AdamW."""
    run: Run = gradient_worker.run_after(ranks, "every other", 0, MICRO_BATCHES, "bfloat16", lambda config: config)
    config = run.config
    module = type(run.engine.module)(
        gradient_worker.student(tied=False, dtype="bfloat16"),
        vocabulary_size=gradient_worker.VOCABULARY,
        terms=run.terms,
    )
    rows = gradient_worker.rows()
    batches: list[Batch] = [collate([row], [row[1] is None]) for row in rows]
    counts = dict(zip(run.terms, sum(count_positions(batch, run.terms) for batch in batches).tolist(), strict=True))
    weights = weights_at(config.loss, tuple(run.terms), 0, run.num_steps, kd_factor=1.0)
    inputs = StepInputs(
        coefficients={name: weights[name] / counts[name] for name in run.terms},
        diagnose=False,
        thresholds=(),
        loss_scale=1.0,
    )
    named = sorted(("student." + name, p) for name, p in module.student.named_parameters())
    sums = [torch.zeros_like(p, dtype=torch.float64) for _, p in named]
    for batch in batches:
        loss, _ = module(batch, inputs)
        found = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True, materialize_grads=True)
        for total, gradient in zip(sums, found, strict=True):
            total += gradient.double()
    masters = [torch.nn.Parameter(p.detach().double()) for _, p in named]
    for master, total in zip(masters, sums, strict=True):
        master.grad = total
    torch.optim.AdamW(masters, lr=1.0, eps=1.0, weight_decay=0.0).step()
    return torch.cat([master.detach().flatten() for master in masters])


if __name__ == "__main__":
    start_logging()
    out = Path(sys.argv[1])
    with ranks_from_environment() as ranks:
        gradient_worker.GLOBAL_BATCH = MICRO_BATCHES * ranks.world_size
        named = sorted(gradient_worker.student(tied=False, dtype="bfloat16").named_parameters())
        start = torch.cat([parameter.detach().double().flatten() for _, parameter in named])
        exact = exactly_updated(ranks) - start
        for stage in range(4):
            many, one = (updated(ranks, stage, n).double() - start for n in (MICRO_BATCHES, 1))
            distances = {"exact": float((many - exact).norm()), "one batch": float((many - one).norm())}
            if ranks.rank == 0:
                found = {name: distance / float(exact.norm()) for name, distance in distances.items()}
                (out / f"{ranks.world_size}-{stage}.json").write_text(json.dumps(found))
    exit_rank()
