"""What a run reads: which texts and caches, and which options decide its result."""

from __future__ import annotations

from typing import Any

from pipeline.cache import manifest as manifests
from pipeline.config.options import identity_options
from pipeline.config.schema import Optimizer, OptimizerConfig, Shape, TrainConfig
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


def options_read(config: TrainConfig) -> dict[str, Any]:
    """The options that decide the result. Those that nothing reads in this run are as by default: no other run."""
    options = identity_options(config)
    if not is_hub_name(config.student.path):
        options["student"]["revision"] = None
    if all(manifests.load_manifest(one_location(address, what)).k == config.k for what, address in caches_read(config)):
        options["k"] = None  # all kept entries, as by default; or there is no cache
    unread = [] if config.optimizer.name is Optimizer.muon else ["muon_learning_rate", "muon_momentum"]
    unread += [] if config.optimizer.schedule is Shape.wsd else ["decay_fraction"]
    defaults = identity_options(OptimizerConfig())
    options["optimizer"] |= {name: defaults[name] for name in unread}
    return options
