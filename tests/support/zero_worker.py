"""Several run folders one after another in one process group: starting torchrun once saves half a minute.

A run that is asked to stop does so after its first step; it goes on at once where its folder's name says so.
"""

import sys
from pathlib import Path

from pipeline.config.options import load_config
from pipeline.config.schema import TrainConfig
from pipeline.core.files import RunPaths
from pipeline.core.progress import start_logging
from pipeline.core.runtime import StopRequest, exit_rank, ranks_from_environment
from pipeline.training.worker import train

if __name__ == "__main__":
    start_logging()
    with ranks_from_environment() as ranks:
        for folder in sys.argv[1:]:
            paths = RunPaths(folder=Path(folder))
            config, asked_to_stop = load_config(paths.config, TrainConfig), paths.stop.exists()
            assert train(config, paths, ranks, StopRequest(paths.stop)) is not asked_to_stop
            ranks.barrier()
            if asked_to_stop and "resumed" in folder:
                paths.stop.unlink(missing_ok=True)
                assert train(config, paths, ranks, StopRequest(paths.stop))
    exit_rank()
