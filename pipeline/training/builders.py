"""From the options of a training run to its values: mixture, order, terms, gate, weights, learning rate."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from pipeline.cache.downloads import Downloads
from pipeline.cache.sequence_files import MappedSequences
from pipeline.cache.shards import ShardReader
from pipeline.config.options import identity_options
from pipeline.config.schema import (
    Control,
    GateBy,
    GoldFractionOf,
    KdConfig,
    LossConfig,
    OptimizerConfig,
    Shape,
    TrainConfig,
    WeightBy,
)
from pipeline.core.folds import parse_fold
from pipeline.core.object_store import one_location
from pipeline.core.progress import log
from pipeline.core.topk import label_smoothed
from pipeline.core.types import Captured, InputError, TopK
from pipeline.data.curriculum import Curriculum
from pipeline.data.mixture import Mixture
from pipeline.data.sampler import SHUFFLE_BLOCKS, BatchSampler, CacheStream, exact_fraction, fraction_of_sequences
from pipeline.objective.gates import Gate, Thresholds, class_thresholds, threshold, top_probability, top_token
from pipeline.objective.terms import TERMS, TermOptions
from pipeline.objective.trust import PositionWeight, TrustScore, measure
from pipeline.training import schedules
from pipeline.training.streams import CorpusCache, open_corpus, open_gold

SAMPLE_BLOCKS = (
    32  # maximum row groups from which a gate's threshold is computed: evenly spaced, a function of the cache
)


def open_mixture(config: TrainConfig, gold_text: MappedSequences | None) -> Mixture:
    """The two streams of a run: gold as given, or from its own capture, and the caches."""
    gold_reader, addresses = None, []
    if config.gold_fraction > 0 and config.gold_cache is not None:
        gold_reader = open_reader(config, config.gold_cache, "gold_cache")
    fold = None if config.leave_out is None else parse_fold(config.leave_out, "leave_out")
    gold, gold_targets = open_gold(gold_text, gold_reader, fold)
    if config.cache is not None and config.gold_fraction < 1:
        addresses = [config.cache, *config.more_caches]
    readers = [open_reader(config, address, "cache") for address in addresses]
    caches = [open_corpus(reader, fold, curriculum_parts=config.curriculum_parts) for reader in readers]
    any_reader = next(iter(readers), gold_reader)
    return Mixture(
        order=open_order(config, caches, num_gold=len(gold), gold_targets=gold_targets),
        gold=gold,
        readers=readers,
        curriculum=[cache.curriculum for cache in caches],
        smooth_over=any_reader.manifest.vocabulary_size
        if any_reader and config.loss.kd.control is Control.smoothed
        else None,
    )


def open_order(config: TrainConfig, caches: Sequence[CorpusCache], *, num_gold: int, gold_targets: int) -> BatchSampler:
    """The sampler that decides which sequences each step reads."""
    weights = (
        [exact_fraction(weight) for weight in config.cache_weights]
        if config.cache_weights
        else [Fraction(cache.num_rows) for cache in caches]
    )
    corpora = tuple(
        CacheStream(weight=weight / sum(weights), parts=cache.parts)
        for weight, cache in zip(weights, caches, strict=True)
    )
    fraction = exact_fraction(config.gold_fraction)
    if config.gold_fraction_of is GoldFractionOf.targets and 0 < fraction < 1:
        corpus = sum(one.weight * cache.mean_targets for one, cache in zip(corpora, caches, strict=True))
        of_gold = Fraction(gold_targets, num_gold)
        fraction = fraction_of_sequences(fraction, gold=of_gold, corpus=Fraction(corpus))
        log.info("gold_fraction=%g of targets is %.4f of sequences", config.gold_fraction, fraction)
    return BatchSampler(
        seed=config.seed,
        global_batch=config.global_batch,
        gold_fraction=fraction,
        num_gold=num_gold,
        corpora=corpora,
        max_gold=None if config.gold_epochs is None else math.ceil(exact_fraction(config.gold_epochs) * num_gold),
    )


def open_reader(config: TrainConfig, address: str, what: str) -> ShardReader:
    """A reader of one cache with this run's options."""
    return ShardReader(
        one_location(address, what),
        k=config.k,
        downloads=Downloads(folder=Path(config.downloads.dir), limit_bytes=config.downloads.bytes),
        shuffle_seed=config.seed if config.loss.kd.control is Control.shuffled else None,
        cached_blocks=SHUFFLE_BLOCKS + 1,  # those that are shuffled together, and the first of the next
    )


def steps_of(config: TrainConfig, mixture: Mixture) -> int:
    """Number of optimizer steps: as given, or computed from the epochs."""
    if config.steps is not None:
        return config.steps
    assert config.epochs is not None
    order = mixture.order
    if not order.corpora:
        return max(math.ceil(config.epochs * len(mixture.gold) / config.global_batch), 1)
    wanted = exact_fraction(config.epochs) * sum(sum(map(sum, corpus.parts)) for corpus in order.corpora)
    steps = wanted / (order.global_batch * (1 - order.gold_fraction))
    if order.max_gold is not None:  # gold ends, and the corpus fills the batches alone
        steps = min(steps, (wanted + order.max_gold) / order.global_batch)
    return max(math.ceil(steps), 1)


# ------------------------------------------------------------------------------------ the objective


def class_ids(choices: list[str] | None, tokenizer: Any) -> tuple[int, ...]:
    """The different first tokens of the completions; InputError where there is only one."""
    firsts = [tokenizer(choice, add_special_tokens=False)["input_ids"][0] for choice in choices or ()]
    ids = tuple(dict.fromkeys(firsts))
    if choices is not None and len(ids) < 2:
        raise InputError(
            f"loss.confidence.choices: expected completions with two or more different first tokens, found {choices} "
            f"-> {firsts}; give such, or use choices=null"
        )
    return ids


def term_options(loss: LossConfig, gate: Gate, class_ids: tuple[int, ...] = ()) -> dict[str, TermOptions]:
    """The terms of the objective with a weight above 0, with their options."""
    by_term: dict[str, dict[str, Any]] = {
        "kd": {
            "temperature": loss.kd.temperature,
            "temperature_squared": loss.kd.temperature_squared,
            "divergence": loss.kd.divergence.name,
            "beta": loss.kd.beta,
            "tail_weight": loss.kd.tail_weight,
            "gate": gate,
        },
        "hard": {"take": loss.hard.take.name},
        "confidence": {"gate": gate, "class_ids": class_ids},
    }
    active = {name: getattr(loss, name) for name in TERMS if getattr(loss, name).weight > 0}
    return {
        name: TermOptions(on=tuple(source.name for source in term.on), **by_term.get(name, {}))
        for name, term in active.items()
    }


def open_gate(
    kd: KdConfig,
    readers: Sequence[ShardReader],
    curriculum: Sequence[Curriculum | None] = (),
    score: TrustScore | None = None,
) -> Gate:
    """The gate of a run; `keep_fraction` becomes the thresholds that keep this fraction of positions.

    `curriculum`: of each cache the rows that the run reads; None or nothing: all. `score`: what by=learnt measures by.
    """
    gate = Gate(
        min_confidence=kd.gate.min_confidence,
        max_entropy=math.inf if kd.gate.max_entropy is None else kd.gate.max_entropy,
        drop_wrong=kd.gate.drop_wrong,
    )
    if kd.gate.keep_fraction == 1.0:
        return gate
    if kd.gate.per_class or kd.gate.by not in (GateBy.confidence, GateBy.entropy):
        return dataclasses.replace(gate, thresholds=open_thresholds(kd, readers, curriculum, score))
    (reader,) = readers  # checked with the options
    rows = [captured for rows in captured_rows(kd, reader, next(iter(curriculum), None)) for captured in rows]
    if kd.gate.by is GateBy.confidence:
        least = threshold(torch.cat([top_probability(c.top) for c in rows]), kd.gate.keep_fraction, largest=True)
        gate = dataclasses.replace(gate, min_confidence=max(gate.min_confidence, least))
    else:
        most = threshold(torch.cat([c.entropy_N for c in rows]).float(), kd.gate.keep_fraction, largest=False)
        gate = dataclasses.replace(gate, max_entropy=min(gate.max_entropy, most))
    log.info("gate: a fraction of %g of the positions passes %s", kd.gate.keep_fraction, gate)
    return gate


def open_thresholds(
    kd: KdConfig,
    readers: Sequence[ShardReader],
    curriculum: Sequence[Curriculum | None],
    score: TrustScore | None,
) -> Thresholds:
    """What `keep_fraction` of the positions reach: of a sample of row groups, or with `per_class` of all caches."""
    gate, values, classes = kd.gate, [], []
    for reader, chosen in itertools.zip_longest(readers, curriculum):
        for rows in captured_rows(kd, reader, chosen, every_block=gate.per_class):
            top, entropy_N = TopK.cat([c.top for c in rows]), torch.cat([c.entropy_N for c in rows])
            values.append(measure(gate.by.name, top, entropy_N, score))
            classes.append(top_token(top).int())  # four bytes a position
    values_N, classes_N = torch.cat(values), torch.cat(classes)
    least = float(class_thresholds(values_N, torch.zeros_like(classes_N), gate.keep_fraction)[1])
    classes_L, least_L = torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.float64)
    if gate.per_class:
        classes_L, least_L = class_thresholds(values_N, classes_N, gate.keep_fraction)
    log.info(
        "gate: a fraction of %g of %d positions passes by %s%s",
        *(gate.keep_fraction, len(values_N), gate.by.name),
        f", in each of {len(classes_L)} classes" if gate.per_class else f": at least {least:g} nats",
    )
    return Thresholds(by=gate.by.name, least=least, classes_L=classes_L.long(), least_L=least_L, score=score)


def captured_rows(
    kd: KdConfig, reader: ShardReader, chosen: Curriculum | None, *, every_block: bool = False
) -> Iterator[list[Captured]]:
    """What the loss reads in the rows of a run, by row group: of all, or of a sample, a function of the cache."""
    rows_read = [list(range(n)) if chosen is None else chosen.rows_in(b).tolist() for b, n in enumerate(reader.blocks)]
    blocks = [block for block, rows_of_block in enumerate(rows_read) if rows_of_block]
    for block in blocks if every_block else blocks[:: math.ceil(len(blocks) / SAMPLE_BLOCKS)]:
        rows = [reader.row(block, row)[1] for row in rows_read[block]]
        yield [smoothed(row, reader) for row in rows] if kd.control is Control.smoothed else rows


def smoothed(captured: Captured, reader: ShardReader) -> Captured:
    """A row as the control smoothed has it."""
    top = label_smoothed(captured.top, captured.entropy_N, vocabulary_size=reader.manifest.vocabulary_size)
    return dataclasses.replace(captured, top=top)


def open_position_weight(kd: KdConfig, score: TrustScore | None) -> PositionWeight | None:
    """How each position is weighted where a term reads the teacher; None: by 1."""
    weight = kd.position_weight
    if weight.by is WeightBy.none:
        return None
    return PositionWeight(by=weight.by.name, power=weight.power, score=score)


def weights_at(
    loss: LossConfig, names: tuple[str, ...], step: int, num_steps: int, *, kd_factor: float
) -> dict[str, float]:
    """The weight of each term in a step."""
    weights = {}
    for name in names:
        term = getattr(loss, name)
        weights[name] = term.weight * schedules.ramp(step, num_steps=num_steps, **identity_options(term.ramp))
    if "kd" in weights:
        weights["kd"] *= kd_factor
    return weights


def learning_rate_at(optimizer: OptimizerConfig, step: int, num_steps: int) -> float:
    """The learning rate of a step."""
    peak, warmup_fraction = optimizer.learning_rate, optimizer.warmup_fraction
    if optimizer.schedule is Shape.step:
        return schedules.step_decay(
            step,
            num_steps=num_steps,
            peak=peak,
            warmup_fraction=warmup_fraction,
            at_fractions=optimizer.step_at_fractions,
            factor=optimizer.step_factor,
        )
    return schedules.learning_rate(
        step,
        num_steps=num_steps,
        peak=peak,
        warmup_fraction=warmup_fraction,
        shape=optimizer.schedule.name,
        final_fraction=optimizer.final_fraction,
        decay_fraction=optimizer.decay_fraction,
    )
