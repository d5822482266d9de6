"""What a run reads: which texts and caches, and which options decide its result."""

from __future__ import annotations

import dataclasses
from typing import Any

from pipeline.cache import manifest as manifests
from pipeline.config.options import identity_options
from pipeline.config.schema import (
    AdaptiveWeightConfig,
    ConfidenceConfig,
    Control,
    Divergence,
    EarlyStoppingConfig,
    ExportConfig,
    ExportedStep,
    GateBy,
    GateConfig,
    GoldFractionOf,
    HardConfig,
    KdConfig,
    LmConfig,
    LossConfig,
    Optimizer,
    OptimizerConfig,
    PositionWeightConfig,
    RampConfig,
    ScoringConfig,
    Shape,
    Source,
    StudentConfig,
    TrainConfig,
    WeightBy,
)
from pipeline.core.files import is_hub_name
from pipeline.core.object_store import one_location


def reads_corpus(config: TrainConfig) -> bool:
    """Whether the run trains on the captured corpus."""
    return config.steps != 0 and config.cache is not None and config.gold_fraction < 1


def reads_gold(config: TrainConfig) -> bool:
    """Whether the run trains on gold, as text or as a capture of it."""
    return config.steps != 0 and config.gold_fraction > 0


def reads_gold_text(config: TrainConfig) -> bool:
    """Whether the run trains on gold as text."""
    return reads_gold(config) and config.gold is not None and config.gold_cache is None


def caches_read(config: TrainConfig) -> list[tuple[str, str]]:
    """The caches that a run reads: the option that names each, and its address."""
    caches = []
    if reads_corpus(config):
        assert config.cache is not None
        caches += [("cache", config.cache), *(("more_caches", address) for address in config.more_caches)]
    if config.gold_cache is not None and reads_gold(config):
        caches.append(("gold_cache", config.gold_cache))
    return caches


def sources_read(config: TrainConfig, name: str) -> list[Source]:
    """The texts of which a term reads positions: with its weight above 0, those of its `on` that carry what it needs.

    The targets of `lm` stand in both texts; what the other terms read of the teacher is in a cache alone.
    """
    term = getattr(config.loss, name)
    of_gold = reads_gold(config) and (name == "lm" or config.gold_cache is not None)
    is_read = {Source.gold: of_gold, Source.corpus: reads_corpus(config)}
    return [source for source in Source if term.weight > 0 and source in term.on and is_read[source]]


def gates_teacher(config: TrainConfig) -> bool:
    """Whether a term reads the teacher through the gate."""
    return bool(sources_read(config, "kd") or sources_read(config, "confidence"))


def weights_positions(config: TrainConfig) -> bool:
    """Whether a term reads the teacher at positions that are weighted by trust."""
    return config.loss.kd.position_weight.by is not WeightBy.none and (
        gates_teacher(config) or bool(sources_read(config, "hard"))
    )


def measures_read(config: TrainConfig) -> set[str]:
    """The measures of trust that a run reads: those of `keep_fraction` and of position weights."""
    kd = config.loss.kd
    of_gate = {kd.gate.by.name} if kd.gate.keep_fraction < 1 and gates_teacher(config) else set()
    return of_gate | ({kd.position_weight.by.name} if weights_positions(config) else set())


def trust_source(config: TrainConfig) -> str | None:
    """The capture of gold on which trust in the teacher is learnt; None where it is not."""
    return config.loss.kd.gate.learn_on or config.gold_cache if GateBy.learnt.name in measures_read(config) else None


def decides_on_dev(config: TrainConfig) -> bool:
    """Whether scores on dev change what is trained or exported; where they are only logged, any dev trains alike."""
    evaluates = config.steps != 0 and config.evaluate_every_steps > 0
    chooses = evaluates and (config.early_stopping.patience > 0 or config.export.what is ExportedStep.best)
    return config.dev is not None and (chooses or adapts_weight(config))


def adapts_weight(config: TrainConfig) -> bool:
    """Whether the KD weight follows the scores on dev."""
    return config.loss.kd.adaptive_weight.every_steps > 0 and bool(sources_read(config, "kd"))


# --------------------------------------------------------------------------- as by default where unread


def options_read(config: TrainConfig) -> dict[str, Any]:
    """The options that decide the result. Those that nothing reads in this run are as by default: no other run.

    An option counts as unread only where the exported weights are the same bit for bit whatever its value is; a term
    that reads nothing has the weight 0. Held-out texts are no part of it, except where dev decides: scores belong to a
    model and a text, and are made where they are missing.
    """
    if config.steps == 0:
        config = _without_training(config)
    decides = decides_on_dev(config)
    read = dataclasses.replace(
        config,
        student=_student_read(config.student),
        loss=_loss_read(config),
        optimizer=_optimizer_read(config.optimizer),
        dev=config.dev if decides else None,
        test=None,
        scoring=_scoring_read(config) if decides or config.steps == 0 else ScoringConfig(),
        **_streams_read(config),
    )
    if config.evaluate_every_steps == 0:
        read = dataclasses.replace(read, early_stopping=EarlyStoppingConfig(), export=ExportConfig())
    if read.export.what is ExportedStep.none:  # the same scores; `driver.check_weights_kept` tells them apart
        read = dataclasses.replace(read, export=dataclasses.replace(read.export, what=ExportedStep.last))
    options = identity_options(read)
    for text in (options["gold"], options["dev"]):
        if text is not None and text["take"] is None:  # an option that came later: runs keep their names
            del text["take"]
    if options["leave_out"] is None:  # it came later as well
        del options["leave_out"]
    if options["loss"]["kd"]["tail_weight"] == 1.0:  # so did these
        del options["loss"]["kd"]["tail_weight"]
    if config.optimizer.schedule is not Shape.step:  # they came later as well
        del options["optimizer"]["step_at_fractions"], options["optimizer"]["step_factor"]
    if not read.loss.kd.gate.per_class:
        del options["loss"]["kd"]["gate"]["per_class"]
    if read.loss.kd.position_weight.by is WeightBy.none:
        del options["loss"]["kd"]["position_weight"]
    return options


def _without_training(config: TrainConfig) -> TrainConfig:
    """The student, without an adapter that would be trained, and how it is scored."""
    student = dataclasses.replace(config.student, adapter=None)
    return TrainConfig(name=config.name, student=student, gold_fraction=0.0, steps=0, scoring=config.scoring)


def _scoring_read(config: TrainConfig) -> ScoringConfig:
    """The examples of few-shot scoring are part of a run's identity by their content."""
    return dataclasses.replace(config.scoring, few_shot_from=None)


def _student_read(student: StudentConfig) -> StudentConfig:
    return student if is_hub_name(student.path) else dataclasses.replace(student, revision=None)


def _streams_read(config: TrainConfig) -> dict[str, Any]:
    """The options of gold, of the caches and of how they are mixed."""
    read: dict[str, Any] = {}
    manifests_read = [manifests.load_manifest(one_location(address, what)) for what, address in caches_read(config)]
    if all(manifest.most_kept == config.k for manifest in manifests_read):
        read["k"] = None  # all kept entries, as by default; or there is no cache
    if not reads_corpus(config):
        read["curriculum_parts"] = 1
    if not (reads_corpus(config) and config.more_caches):  # the weights sum to 1
        read["cache_weights"] = None
    if not reads_gold_text(config):
        read |= {"gold": None, "window": TrainConfig.window}
    if not (reads_gold(config) and reads_corpus(config)):
        read |= {"gold_fraction_of": GoldFractionOf.sequences, "gold_epochs": None}
    return read


def _loss_read(config: TrainConfig) -> LossConfig:
    """The terms as they are read; the gate is shared by kd and confidence, the control by all that read a cache."""
    loss, kd = config.loss, config.loss.kd
    terms = {
        "lm": _term_read(config, "lm", LmConfig(weight=0.0)),
        "kd": _term_read(config, "kd", KdConfig(weight=0.0)),
        "hard": _term_read(config, "hard", HardConfig()),
        "confidence": _term_read(config, "confidence", ConfidenceConfig()),
    }
    kd_read = terms["kd"]
    if adapts_weight(config):
        kd_read = dataclasses.replace(kd_read, adaptive_weight=kd.adaptive_weight)
    else:
        kd_read = dataclasses.replace(kd_read, adaptive_weight=AdaptiveWeightConfig())
    if kd_read.temperature == 1.0:  # its square is 1
        kd_read = dataclasses.replace(kd_read, temperature_squared=True)
    if kd_read.divergence is not Divergence.jsd:
        kd_read = dataclasses.replace(kd_read, beta=KdConfig.beta)
    gate = kd.gate if gates_teacher(config) else GateConfig()
    if gate.keep_fraction == 1.0:
        gate = dataclasses.replace(gate, by=GateConfig.by, per_class=False)
    weight = kd.position_weight if weights_positions(config) else PositionWeightConfig()
    control = kd.control if caches_read(config) else Control.none
    terms["kd"] = dataclasses.replace(kd_read, gate=gate, position_weight=weight, control=control)
    return dataclasses.replace(loss, **terms)


def _term_read(config: TrainConfig, name: str, unread: Any) -> Any:
    """The options of a term; `unread` where it reads nothing."""
    term, sources = getattr(config.loss, name), sources_read(config, name)
    if not sources:
        return unread
    ramp = term.ramp
    if ramp.shape is Shape.constant:  # it stays at its start value
        ramp = RampConfig(start_value=ramp.start_value)
    return dataclasses.replace(term, on=sources, ramp=ramp)


def _optimizer_read(optimizer: OptimizerConfig) -> OptimizerConfig:
    unread = [] if optimizer.name is Optimizer.muon else ["muon_learning_rate", "muon_momentum"]
    unread += [] if optimizer.schedule is Shape.wsd else ["decay_fraction"]
    unread += ["final_fraction"] if optimizer.schedule in (Shape.constant, Shape.step) else []
    defaults = OptimizerConfig()
    return dataclasses.replace(optimizer, **{name: getattr(defaults, name) for name in unread})
