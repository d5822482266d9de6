"""The time of training, compared with a simple torch loop of the same model, loss and batches.

The difference is the cost of the engine, of reading and of metrics.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pipeline.bench.capture import CORPUS, MODEL
from pipeline.bench.read import make_manifest
from pipeline.bench.step import GOLD, SEQUENCES, TEACHER_LAYERS, TERMS, WINDOW, K, captured_rows, windows
from pipeline.bench.timing import Results, format_figure, ratios, run_in_turns, seconds, summarize, table
from pipeline.cache import manifest as manifests
from pipeline.cache.shards import ShardReader, shard_writer
from pipeline.config.schema import DeepspeedConfig, Dtype, OptimizerConfig, StudentConfig, TrainConfig
from pipeline.core.files import RunPaths
from pipeline.core.runtime import Ranks, StopRequest, keep_allocator_memory, ranks_from_environment
from pipeline.core.types import Batch
from pipeline.data.mixture import Mixture, prefetch
from pipeline.data.sampler import SHUFFLE_BLOCKS, BatchSampler, CacheStream
from pipeline.models.forward import hidden_states
from pipeline.models.loading import open_model, resolve_dtype
from pipeline.models.tokenizer import open_tokenizer, vocabulary_size
from pipeline.monitoring import health
from pipeline.monitoring.metrics import MetricsFile
from pipeline.objective.fused_head import combined_loss
from pipeline.objective.terms import StepInputs, count_positions
from pipeline.training import engine as engines
from pipeline.training.run import Run, TrainState
from pipeline.training.steps import take_steps

LEARNING_RATE, MAX_GRAD_NORM, BETAS, EPSILON = 1e-6, 1.0, (0.9, 0.999), 1e-8
ONE_RANK = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29541"}


def run(quick: bool) -> Results:
    """Several optimizer steps in a row by `take_steps` of training, on one rank at ZeRO 0, and by the simple loop."""
    keep_allocator_memory()  # as the ranks of a training run do
    for name, value in ONE_RANK.items():
        os.environ.setdefault(name, value)
    with ranks_from_environment() as ranks, tempfile.TemporaryDirectory() as name:
        return compare(ranks, Path(name), quick)


def compare(ranks: Ranks, folder: Path, quick: bool) -> Results:
    """Run both loops in turns over the same steps; the data wait is that of steps whose batches could be prefetched."""
    model = resolve_dtype(StudentConfig(path=str(MODEL), dtype=Dtype.auto, num_layers=4 if quick else None))
    num_steps = 50 if ranks.device.type == "cuda" else 3  # in one measurement
    mixture = small_mixture(model, ranks, folder / "cache")
    _, tokenizer = open_tokenizer(model)
    vocabulary = vocabulary_size(tokenizer)
    ours = Ours(model, mixture, ranks, folder, vocabulary)
    loops = {"ours": ours.steps, "bare loop": Bare(model, mixture, ranks, vocabulary).steps}
    if model.dtype is not Dtype.float32:
        loops["without float32 state"] = Bare(model, mixture, ranks, vocabulary, in_float32=False).steps
    measurements = {name: partial(seconds_per_step, steps, num_steps) for name, steps in loops.items()}
    times = run_in_turns(measurements, runs=2 if quick else 5)
    ratio_to = {name: ratios(times["ours"], values) for name, values in times.items() if name != "ours"}
    waits = [row["data_wait_fraction"] for row in ours.rows]
    rows = [["", "seconds per step", "ratio of ours to it"], ["ours", format_figure(summarize(times["ours"])), ""]]
    rows += [[name, format_figure(summarize(times[name])), format_figure(ratio)] for name, ratio in ratio_to.items()]
    rows += [["ours, fraction of the time that waits for data", format_figure(summarize(waits)), ""]]
    print(table(f"train: SmolLM2-135M in {model.dtype.name}, {SEQUENCES * WINDOW} tokens a step, ZeRO 0", rows))
    results: Results = {
        "train.time_ratio_to_bare_loop": ratio_to["bare loop"],
        "train.data_wait_fraction": summarize(waits),
        "train.seconds": summarize(times["ours"]),
    }
    if "without float32 state" in ratio_to:
        results["train.time_ratio_to_all_bfloat16"] = ratio_to["without float32 state"]
    return results


def seconds_per_step(steps: Callable[[int], None], count: int) -> float:
    """Mean seconds per step over `count` steps in a row."""
    return seconds(lambda: steps(count)) / count


class Ours:
    """Training as `scripts/train.py` does it, in portions of a few steps."""

    def __init__(self, config: StudentConfig, mixture: Mixture, ranks: Ranks, folder: Path, vocabulary: int) -> None:
        paths = RunPaths(folder=folder)
        train_config = TrainConfig(
            name="bench",
            student=config,
            gold_fraction=float(mixture.order.gold_fraction),
            optimizer=OptimizerConfig(learning_rate=LEARNING_RATE, warmup_fraction=0.0, max_grad_norm=MAX_GRAD_NORM),
            deepspeed=DeepspeedConfig(zero_stage=0),
        )
        student = open_model(config, ranks.device).train()
        module = engines.StudentWithLoss(student, vocabulary_size=vocabulary, terms=TERMS)
        self._run = Run(
            config=train_config,
            paths=paths,
            ranks=ranks,
            stop=StopRequest(paths.stop),
            engine=engines.build(module, train_config, micro_batch=SEQUENCES, accumulation=1),
            mixture=mixture,
            terms=TERMS,
            num_steps=0,
            micro_batch=SEQUENCES,
            model_size=health.model_size(student),
            dev=None,
        )
        self._state = TrainState()
        self.rows: list[dict[str, Any]] = []

    def steps(self, count: int) -> None:
        """Take the next `count` optimizer steps; each writes its line in metrics.jsonl."""
        self._run = dataclasses.replace(self._run, num_steps=self._state.step + count)
        self._state = take_steps(self._run, self._state)
        self.rows += MetricsFile.read(self._run.paths.metrics)[1 - count :]


class Bare:
    """A simple training loop: forward, loss, backward, clip, AdamW.

    The model computes in bfloat16 and AdamW keeps weights and moments in float32, as training does, because bfloat16
    rounds away an update below 1/256 of a weight. `in_float32=False` keeps everything in bfloat16: less work, and
    small updates are lost.
    """

    def __init__(
        self, config: StudentConfig, mixture: Mixture, ranks: Ranks, vocabulary: int, *, in_float32: bool = True
    ) -> None:
        self._student = open_model(config, ranks.device).train()
        self._weights = list(self._student.parameters())
        has_copy = in_float32 and config.dtype is not Dtype.float32
        self._stepped = [torch.nn.Parameter(p.detach().float()) for p in self._weights] if has_copy else self._weights
        rates: dict[str, Any] = {"lr": LEARNING_RATE, "betas": BETAS, "eps": EPSILON, "weight_decay": 0.0}
        self._optimizer = torch.optim.AdamW(self._stepped, fused=True, **rates)
        self._vocabulary, self._step = vocabulary, 0
        self._mixture, self._ranks = mixture, ranks

    def steps(self, count: int) -> None:
        """Take the next `count` optimizer steps, on batches that are read in the same way as in training."""
        place = {"rank": 0, "world_size": 1, "micro_batch": SEQUENCES}
        for _, batches in prefetch(self._mixture, range(self._step, self._step + count), **place):
            self._take(batches[0].to(self._ranks.device))
        self._step += count

    def _take(self, batch: Batch) -> None:
        counts = dict(zip(TERMS, count_positions(batch, TERMS).tolist(), strict=True))
        factors = {name: 1.0 / max(count, 1) for name, count in counts.items()}
        hidden_BSH = hidden_states(self._student, batch.input_ids_BS, batch.position_ids_BS)
        hidden_NH = hidden_BSH.flatten(0, 1)[batch.flat_positions_N]
        loss = combined_loss(
            self._student, hidden_NH, batch, TERMS, StepInputs(coefficients=factors), vocabulary_size=self._vocabulary
        )[0]
        loss.backward()
        if self._stepped is not self._weights:
            for stepped, weight in zip(self._stepped, self._weights, strict=True):
                stepped.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self._stepped, MAX_GRAD_NORM)
        self._optimizer.step()
        self._optimizer.zero_grad()
        if self._stepped is not self._weights:
            with torch.no_grad():
                torch._foreach_copy_(self._weights, self._stepped)
        loss.item()


def small_mixture(config: StudentConfig, ranks: Ranks, cache: Path) -> Mixture:
    """A real cache of the demo's text, captured from a teacher of few layers, and gold sequences of the same text."""
    _, tokenizer = open_tokenizer(config)
    teacher = open_model(dataclasses.replace(config, num_layers=TEACHER_LAYERS), ranks.device)
    prose = " ".join(json.loads(line)["prompt"] for line in CORPUS.read_text().splitlines()[:1000])
    rows = captured_rows(teacher, list(windows(tokenizer(prose)["input_ids"])), vocabulary_size(tokenizer))
    gold, corpus = rows[:GOLD], rows[GOLD:]
    manifest = make_manifest(1, len(corpus), k=K, window=WINDOW, vocabulary=vocabulary_size(tokenizer))
    manifests.create_cache(cache, manifest)
    with shard_writer(cache, manifest, 0) as writer:
        for sequence, captured in corpus:
            assert captured is not None
            writer.write(sequence, captured)
        writer.commit(num_skipped=0)
    manifests.finalize_cache(cache, manifest, stale_seconds=60)
    reader = ShardReader(cache, cached_blocks=SHUFFLE_BLOCKS + 1)
    stream = CacheStream(weight=Fraction(1), parts=(reader.blocks,))
    fraction = Fraction(GOLD, SEQUENCES)
    order = BatchSampler(seed=1, global_batch=SEQUENCES, gold_fraction=fraction, num_gold=len(gold), corpora=(stream,))
    return Mixture(order=order, gold=gold, readers=[reader])
