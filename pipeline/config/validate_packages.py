"""Reject a run whose packages are missing or too old, before any rank starts."""

from __future__ import annotations

import importlib.util
import re

from pipeline.config.schema import Tracker
from pipeline.core.types import InputError

OLDEST_DEEPSPEED = (0, 19, 8)  # as in setup.cfg; docs/decisions.md has what earlier releases do

TRACKER_PACKAGES = {  # what is imported, what pip calls it
    Tracker.tensorboard: ("tensorboard", "tensorboard"),
    Tracker.wandb: ("wandb", "wandb"),
    Tracker.mlflow: ("mlflow", "mlflow-skinny"),
}


def check_deepspeed(found: str) -> None:
    """InputError for a release of DeepSpeed before OLDEST_DEEPSPEED, which an environment may hold all the same."""
    if tuple(int(number) for number in re.findall(r"\d+", found)[:3]) < OLDEST_DEEPSPEED:
        oldest = ".".join(map(str, OLDEST_DEEPSPEED))
        raise InputError(
            f"deepspeed: expected release {oldest} or later, because earlier ones sum gradients wrongly, found "
            f'{found}; pip install "deepspeed>={oldest},<0.20"'
        )


def check_trackers(trackers: list[Tracker]) -> None:
    """Reject a tracker whose package is not installed, before any rank starts."""
    for tracker in trackers:
        module, package = TRACKER_PACKAGES[tracker]
        if importlib.util.find_spec(module) is None:
            raise InputError(
                f"trackers: expected the package {module} for {tracker.name}, found none; pip install {package}"
            )
