"""From the options of a training run to its values: mixture, order, terms, gate, weights, learning rate."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from pipeline.cache.downloads import Downloads
from pipeline.cache.shards import ShardReader
from pipeline.config.options import identity_options
from pipeline.config.schema import Control, GateBy, GoldFractionOf, KdConfig, LossConfig, OptimizerConfig, TrainConfig
from pipeline.core.object_store import one_location
from pipeline.core.progress import log
from pipeline.core.types import Captured, InputError, TokenSequence
from pipeline.data.curriculum import Curriculum, by_entropy
from pipeline.data.mixture import Mixture
from pipeline.data.sampler import SHUFFLE_BLOCKS, BatchSampler, CacheStream, exact_fraction, fraction_of_sequences
from pipeline.objective.gates import Gate, threshold, top_probability
from pipeline.objective.terms import TERMS, TermOptions
from pipeline.training import schedules

SAMPLE_BLOCKS = (
    32  # maximum row groups from which a gate's threshold is computed: evenly spaced, a function of the cache
)


def open_mixture(config: TrainConfig, gold_sequences: Sequence[TokenSequence]) -> Mixture:
    """The two streams of a run: gold as given, or from its own capture, and the caches."""
    gold: list[tuple[TokenSequence, Captured | None]] = [(sequence, None) for sequence in gold_sequences]
    gold_reader, addresses = None, []
    if config.gold_fraction > 0 and config.gold_cache is not None:
        gold_reader = open_reader(config, config.gold_cache, "gold_cache")
        gold = [gold_reader.row(block, row) for block, size in enumerate(gold_reader.blocks) for row in range(size)]
    if config.cache is not None and config.gold_fraction < 1:
        addresses = [config.cache, *config.more_caches]
    readers = [open_reader(config, address, "cache") for address in addresses]
    parts = config.curriculum_parts
    curriculum = [by_entropy(reader.mean_entropies(), parts) if parts > 1 else None for reader in readers]
    any_reader = next(iter(readers), gold_reader)
    return Mixture(
        order=open_order(config, [sequence for sequence, _ in gold], readers, curriculum),
        gold=gold,
        readers=readers,
        curriculum=curriculum,
        smooth_over=any_reader.manifest.vocabulary_size
        if any_reader and config.loss.kd.control is Control.smoothed
        else None,
    )


def open_order(
    config: TrainConfig,
    gold: Sequence[TokenSequence],
    readers: Sequence[ShardReader],
    curriculum: Sequence[Curriculum | None],
) -> BatchSampler:
    """The sampler that decides which sequences each step reads."""
    sizes = [sum(reader.blocks) for reader in readers]
    weights = (
        [exact_fraction(weight) for weight in config.cache_weights]
        if config.cache_weights
        else [Fraction(n) for n in sizes]
    )
    corpora = tuple(
        CacheStream(weight=weight / sum(weights), parts=(reader.blocks,) if parts is None else parts.sizes)
        for weight, reader, parts in zip(weights, readers, curriculum, strict=True)
    )
    fraction = exact_fraction(config.gold_fraction)
    if config.gold_fraction_of is GoldFractionOf.targets and 0 < fraction < 1:
        corpus = sum(one.weight * reader.mean_targets for one, reader in zip(corpora, readers, strict=True))
        of_gold = Fraction(sum(len(sequence.target_ids_N) for sequence in gold), len(gold))
        fraction = fraction_of_sequences(fraction, gold=of_gold, corpus=Fraction(corpus))
        log.info("gold_fraction=%g of targets is %.4f of sequences", config.gold_fraction, fraction)
    return BatchSampler(
        seed=config.seed,
        global_batch=config.global_batch,
        gold_fraction=fraction,
        num_gold=len(gold),
        corpora=corpora,
        max_gold=None if config.gold_epochs is None else math.ceil(exact_fraction(config.gold_epochs) * len(gold)),
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
    wanted = exact_fraction(config.epochs) * sum(sum(reader.blocks) for reader in mixture.readers)
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


def open_gate(kd: KdConfig, readers: Sequence[ShardReader]) -> Gate:
    """The gate of a run; `keep_fraction` becomes the threshold that keeps this fraction of positions."""
    gate = Gate(
        min_confidence=kd.gate.min_confidence,
        max_entropy=math.inf if kd.gate.max_entropy is None else kd.gate.max_entropy,
        drop_wrong=kd.gate.drop_wrong,
    )
    if kd.gate.keep_fraction == 1.0:
        return gate
    (reader,) = readers  # checked with the options
    step = math.ceil(len(reader.blocks) / SAMPLE_BLOCKS)
    blocks = range(0, len(reader.blocks), step)
    rows = [reader.row(block, row)[1] for block in blocks for row in range(reader.blocks[block])]
    if kd.gate.by is GateBy.confidence:
        least = threshold(torch.cat([top_probability(c.top) for c in rows]), kd.gate.keep_fraction, largest=True)
        gate = dataclasses.replace(gate, min_confidence=max(gate.min_confidence, least))
    else:
        most = threshold(torch.cat([c.entropy_N for c in rows]).float(), kd.gate.keep_fraction, largest=False)
        gate = dataclasses.replace(gate, max_entropy=min(gate.max_entropy, most))
    log.info("gate: a fraction of %g of the positions passes %s", kd.gate.keep_fraction, gate)
    return gate


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
    return schedules.learning_rate(
        step,
        num_steps=num_steps,
        peak=optimizer.learning_rate,
        warmup_fraction=optimizer.warmup_fraction,
        shape=optimizer.schedule.name,
        final_fraction=optimizer.final_fraction,
        decay_fraction=optimizer.decay_fraction,
    )
