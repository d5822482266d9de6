"""One rank that takes the same two steps under many engines, one after another: starting torchrun once saves minutes.

    torchrun --nproc-per-node=RANKS gradient_worker.py OUT DTYPE

writes OUT/{ranks}-{layout}-zero{stage}-accumulation{n}.pt: the student's weights after the steps.
"""

import copy
import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.config.schema import TrainConfig
from pipeline.core.files import RunPaths
from pipeline.core.progress import start_logging
from pipeline.core.runtime import Ranks, StopRequest, exit_rank, ranks_from_environment
from pipeline.core.topk import top_k_and_entropy
from pipeline.core.types import Captured, TokenSequence
from pipeline.data.mixture import collate
from pipeline.data.packing import Segment, make_sequence
from pipeline.objective.gates import Gate
from pipeline.training import engine as engines
from pipeline.training.builders import term_options
from pipeline.training.partition import student_weights
from pipeline.training.run import Run, TrainState
from pipeline.training.steps import take_step
from support.commands import composed

VOCABULARY, GLOBAL_BATCH, STEPS = 50, 8, 2
Row = tuple[TokenSequence, Captured | None]


def rows() -> list[Row]:
    """Two steps' sequences, half of them gold; ragged: from one target to all, some without any."""
    generator, made = torch.Generator().manual_seed(0), []
    for number in range(STEPS * GLOBAL_BATCH):
        length = 4 + 3 * (number % 4)
        ids = tuple(torch.randint(VOCABULARY, (length,), generator=generator).tolist())
        num_targets = (length - 1, 1, 0, length // 2)[number % 4]
        targets = tuple((s, ids[s + 1]) for s in range(length - 1 - num_targets, length - 1))
        one, captured = make_sequence([Segment(record_id=number, ids=ids, targets=targets)]), None
        if number % 2 == 1:
            top = top_k_and_entropy(
                torch.randn(num_targets, VOCABULARY, generator=generator) * 2, k=6, temperatures=(1.0, 2.0)
            )[0]
            empty_N = torch.zeros(num_targets, dtype=torch.float16)
            captured = Captured(top=top, next_log_prob_N=empty_N, entropy_N=empty_N)
        made.append((one, captured))
    return made


def mine(step: int, layout: str, rank: int, world_size: int) -> list[Row]:
    """A rank's part of a global batch: every other sequence, or gold alone and corpus alone."""
    part = rows()[step * GLOBAL_BATCH : (step + 1) * GLOBAL_BATCH]
    if layout == "apart" and world_size == 2:
        return [row for row in part if (row[1] is not None) == (rank == 1)]
    return part[rank::world_size]


def student(*, tied: bool, dtype: str) -> LlamaForCausalLM:
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=VOCABULARY + 7, tie_word_embeddings=tied, initializer_range=0.3, **sizes)
    config.use_cache = False
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():  # not its rotary frequencies, which stay in fp32 wherever a model is loaded
        parameter.data = parameter.data.to(getattr(torch, dtype))
    return model


@functools.cache
def options(dtype: str) -> TrainConfig:
    return composed("train", "study=demo", "experiment=combined", "loss.kd.temperature=2", f"student.dtype={dtype}")


def weights_after(ranks, layout: str, stage: int, *how: Any) -> dict[str, torch.Tensor] | None:
    return student_weights(run_after(ranks, layout, stage, *how).engine)


def run_after(
    ranks,
    layout: str,
    stage: int,
    accumulation: int,
    dtype: str,
    changed: Callable[[TrainConfig], TrainConfig] = lambda config: config,
) -> Run:
    config = copy.deepcopy(options(dtype))
    # a large epsilon makes AdamW's update proportional to the gradient
    changes = {"learning_rate": 1.0, "epsilon": 1.0, "warmup_fraction": 0.0, "max_grad_norm": 0.5}
    config.optimizer = dataclasses.replace(config.optimizer, **changes)
    overrides = {"fp16": {"initial_scale_power": 10}} if dtype == "float16" else {}  # else the first steps overflow
    config.deepspeed = dataclasses.replace(config.deepspeed, zero_stage=stage, overrides=overrides)
    config = changed(config)
    terms = term_options(config.loss, Gate())
    size = GLOBAL_BATCH // ranks.world_size // accumulation
    module = engines.StudentWithLoss(
        student(tied=layout == "striped", dtype=dtype), vocabulary_size=VOCABULARY, terms=terms
    )
    run = run_of(config, ranks, engines.build(module, config, micro_batch=size, accumulation=accumulation), size)
    for step in range(STEPS):
        part = mine(step, layout, ranks.rank, ranks.world_size)
        groups = [part[i : i + size] for i in range(0, len(part), size)]
        batches = [collate(group, [captured is None for _, captured in group]) for group in groups]
        figures = take_step(run, TrainState(step=step), batches)
        assert figures["skipped_steps"] == 0
    return run


def run_of(config: TrainConfig, ranks: Ranks, engine: Any, micro_batch: int) -> Run:
    """A run of ten steps whose batches are made by hand."""
    return Run(
        config=config,
        paths=RunPaths(folder=Path()),
        ranks=ranks,
        stop=StopRequest(Path("stop")),
        engine=engine,
        mixture=None,
        terms=engine.module.terms,
        num_steps=10,
        micro_batch=micro_batch,
        model_size=None,
        dev=None,
    )


def check_that_steps_of_no_number_are_skipped(ranks, stage: int) -> None:
    """An infinite gradient in one weight: no weight moves, and the step counts as skipped."""
    run = run_after(ranks, "striped", stage, 1, "bfloat16")
    engine = run.engine
    before = {name: weight.clone() for name, weight in student_weights(engine).items()}
    part = mine(0, "striped", ranks.rank, ranks.world_size)
    batches = [collate(part, [captured is None for _, captured in part])]

    def step_and_see() -> tuple[dict[str, Any], bool]:
        figures = take_step(run, TrainState(step=0), batches)
        after = student_weights(engine)
        return figures, all(torch.equal(after[name], weight) for name, weight in before.items())

    hook = next(iter(engine.module.parameters())).register_hook(lambda gradient: gradient * torch.inf)
    for skipped in (1, 2):
        figures, stayed = step_and_see()
        assert stayed, figures
        assert figures["skipped_steps"] == skipped, figures
    hook.remove()
    figures, stayed = step_and_see()
    assert not stayed, figures
    assert figures["skipped_steps"] == 2, figures


if __name__ == "__main__":
    start_logging()
    out, dtype = Path(sys.argv[1]), sys.argv[2]
    if dtype == "float16":  # DeepSpeed refuses it where it is slow
        get_accelerator().is_fp16_supported = lambda: True
    with ranks_from_environment() as ranks:
        for layout in ("striped", "apart"):
            torch.save(student(tied=layout == "striped", dtype=dtype).state_dict(), out / f"{layout}.start")
            for stage in range(1 if dtype == "float16" else 0, 4):
                for accumulation in (1, 2, 4) if dtype != "float16" else (2,):
                    weights = weights_after(ranks, layout, stage, accumulation, dtype)
                    if ranks.rank == 0:
                        name = f"{ranks.world_size}-{layout}-zero{stage}-accumulation{accumulation}.pt"
                        torch.save(weights, out / name)
                    ranks.barrier()
            if dtype == "bfloat16" and layout == "striped" and ranks.world_size == 1:
                for stage in (0, 1, 2):
                    check_that_steps_of_no_number_are_skipped(ranks, stage)
            if dtype == "float16":
                torch.save(weights_after(ranks, layout, 1, 2, "float32"), out / f"{layout}.reference")
    exit_rank()
