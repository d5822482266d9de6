"""What training costs over a bare torch loop of the same model, loss and batches: our engine, reading and metrics."""

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
from pipeline.bench.read import manifest_of
from pipeline.bench.step import GOLD, SEQUENCES, TEACHER_LAYERS, TERMS, WINDOW, K, captured_rows, windows
from pipeline.bench.timing import Findings, figure, in_turn, ratios, seconds, shown, table
from pipeline.cache import manifest as manifests
from pipeline.cache.shards import ShardReader, shard_writer
from pipeline.config.schema import DeepspeedConfig, Dtype, OptimizerConfig, StudentConfig, TrainConfig
from pipeline.core.files import RunPaths
from pipeline.core.runtime import Ranks, StopRequest, keep_allocator_memory, ranks_from_environment
from pipeline.core.types import Batch, TrainState
from pipeline.data.mixture import Mixture, prefetch
from pipeline.data.sampler import SHUFFLE_BLOCKS, BatchSampler, CacheStream
from pipeline.models import loading as models
from pipeline.models.forward import hidden_states
from pipeline.models.tokenizer import open_tokenizer, vocabulary_size
from pipeline.monitoring import health
from pipeline.monitoring.metrics import MetricsFile
from pipeline.objective.fused_head import combined_loss
from pipeline.objective.terms import StepInputs, count_positions
from pipeline.training import engine as engines
from pipeline.training.run import Run
from pipeline.training.steps import take_steps

LEARNING_RATE, MAX_GRAD_NORM, BETAS, EPSILON = 1e-6, 1.0, (0.9, 0.999), 1e-8
ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29541"}


def run(quick: bool) -> Findings:
    """Some optimizer steps in a row by `steps.take_steps` on one rank at ZeRO 0, and the same ones by the bare loop."""
    keep_allocator_memory()  # as training's ranks do
    for name, value in ALONE.items():
        os.environ.setdefault(name, value)
    with ranks_from_environment() as ranks, tempfile.TemporaryDirectory() as name:
        return compare(ranks, Path(name), quick)


def compare(ranks: Ranks, folder: Path, quick: bool) -> Findings:
    """Both in turn over the same steps; the waiting is read off the steps that a prefetch could serve."""
    model = models.resolve_dtype(StudentConfig(path=str(MODEL), dtype=Dtype.auto, num_layers=4 if quick else None))
    together = 50 if ranks.device.type == "cuda" else 3  # steps that are timed as one
    mixture = small_mixture(model, ranks, folder / "cache")
    _, tokenizer = open_tokenizer(model)
    vocabulary = vocabulary_size(tokenizer)
    ours = Ours(model, mixture, ranks, folder, vocabulary)
    things = {"ours": ours.steps, "bare loop": Bare(model, mixture, ranks, vocabulary).steps}
    if model.dtype is not Dtype.float32:
        things["without float32 state"] = Bare(model, mixture, ranks, vocabulary, in_float32=False).steps
    timed = {name: partial(seconds_a_step, steps, together) for name, steps in things.items()}
    found = in_turn(timed, runs=2 if quick else 5)
    over = {name: ratios(found["ours"], times) for name, times in found.items() if name != "ours"}
    waits = [row["data_wait_fraction"] for row in ours.rows]
    rows = [["", "seconds a step", "ours over it"], ["ours", shown(figure(found["ours"])), ""]]
    rows += [[name, shown(figure(found[name])), shown(ratio)] for name, ratio in over.items()]
    rows += [["fraction of it that waits for data", shown(figure(waits)), ""]]
    print(table(f"train: SmolLM2-135M in {model.dtype.name}, {SEQUENCES * WINDOW} tokens a step, ZeRO 0", rows))
    findings: Findings = {
        "train.time_ratio_to_bare_loop": over["bare loop"],
        "train.data_wait_fraction": figure(waits),
        "train.seconds": figure(found["ours"]),
    }
    if "without float32 state" in over:
        findings["train.time_ratio_to_all_bfloat16"] = over["without float32 state"]
    return findings


def seconds_a_step(steps: Callable[[int], None], count: int) -> float:
    """The time of some steps in a row, over their number."""
    return seconds(lambda: steps(count)) / count


class Ours:
    """Training as `scripts/train.py` does it, a few steps at a time."""

    def __init__(self, config: StudentConfig, mixture: Mixture, ranks: Ranks, folder: Path, vocabulary: int) -> None:
        paths = RunPaths(folder=folder)
        train_config = TrainConfig(
            name="bench",
            student=config,
            gold_fraction=float(mixture.order.gold_fraction),
            optimizer=OptimizerConfig(learning_rate=LEARNING_RATE, warmup_fraction=0.0, max_grad_norm=MAX_GRAD_NORM),
            deepspeed=DeepspeedConfig(zero_stage=0),
        )
        student = models.open_model(config, ranks.device).train()
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
        """The next optimizer steps, with their line in metrics.jsonl each."""
        self._run = dataclasses.replace(self._run, num_steps=self._state.step + count)
        self._state = take_steps(self._run, self._state)
        self.rows += MetricsFile.read(self._run.paths.metrics)[1 - count :]


class Bare:
    """The loop one would write: forward, loss, backward, clip, AdamW.

    In bfloat16, like ours, with weights and moments in float32 behind it (an update of a 256th of a weight is rounded
    away in bfloat16); `in_float32=False` does without, which is less work and learns less.
    """

    def __init__(
        self, config: StudentConfig, mixture: Mixture, ranks: Ranks, vocabulary: int, *, in_float32: bool = True
    ) -> None:
        self._student = models.open_model(config, ranks.device).train()
        self._weights = list(self._student.parameters())
        behind = in_float32 and config.dtype is not Dtype.float32
        self._stepped = [torch.nn.Parameter(p.detach().float()) for p in self._weights] if behind else self._weights
        rates: dict[str, Any] = {"lr": LEARNING_RATE, "betas": BETAS, "eps": EPSILON, "weight_decay": 0.0}
        self._optimizer = torch.optim.AdamW(self._stepped, fused=True, **rates)
        self._vocabulary, self._step = vocabulary, 0
        self._mixture, self._ranks = mixture, ranks

    def steps(self, count: int) -> None:
        """The next optimizer steps, over batches that are read just as ours are."""
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
    """A real cache of the demo's text as a teacher of few layers sees it, and gold of the same."""
    _, tokenizer = open_tokenizer(config)
    teacher = models.open_model(dataclasses.replace(config, num_layers=TEACHER_LAYERS), ranks.device)
    prose = " ".join(json.loads(line)["prompt"] for line in CORPUS.read_text().splitlines()[:1000])
    rows = captured_rows(teacher, list(windows(tokenizer(prose)["input_ids"])), vocabulary_size(tokenizer))
    gold, corpus = rows[:GOLD], rows[GOLD:]
    manifest = manifest_of(1, len(corpus), k=K, window=WINDOW, vocabulary=vocabulary_size(tokenizer))
    manifests.create_cache(cache, manifest)
    with shard_writer(cache, manifest, 0) as writer:
        for one, captured in corpus:
            assert captured is not None
            writer.write(one, captured)
        writer.commit(num_skipped=0)
    manifests.finalize_cache(cache, manifest, stale_seconds=60)
    reader = ShardReader(cache, cached_blocks=SHUFFLE_BLOCKS + 1)
    whole = CacheStream(weight=Fraction(1), parts=(reader.blocks,))
    fraction = Fraction(GOLD, SEQUENCES)
    order = BatchSampler(seed=1, global_batch=SEQUENCES, gold_fraction=fraction, num_gold=len(gold), corpora=(whole,))
    return Mixture(order=order, gold=gold, readers=[reader])
