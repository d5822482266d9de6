"""Scores without training, of a run that has no steps or is finished: `python -m pipeline.training.scorer RUN_FOLDER`.

A process of its own, as the ranks are: a sweep's driver loads no model. It loads no engine either: a model that needs
the devices of several ranks (ZeRO 3) is scored by `worker`.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from pipeline.config.options import load_config
from pipeline.config.schema import TrainConfig
from pipeline.core.files import RunPaths
from pipeline.core.progress import log, start_logging
from pipeline.core.runtime import StopRequest, alone
from pipeline.core.stopping import Stopped
from pipeline.models.loading import open_model
from pipeline.models.prepack import prepack
from pipeline.training.finish import finish, scored_model
from pipeline.training.run_lease import renewed_by_rank


def run(folder: Path) -> None:
    """Make the scores that a run folder lacks and write the result."""
    paths = RunPaths(folder=folder)
    config = load_config(paths.config, TrainConfig)
    start_logging(paths.log, quiet=config.launcher.quiet)
    try:
        with renewed_by_rank(paths):
            ranks = dataclasses.replace(alone(), stop=StopRequest(paths.stop))
            finish(config, paths, ranks, lambda: prepack(open_model(scored_model(config, paths), ranks.device)))
    except Stopped as stopped:
        log.info("%s", stopped)
    except Exception:
        log.exception("scoring failed")
        raise


if __name__ == "__main__":
    run(Path(sys.argv[1]))
