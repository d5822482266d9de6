"""Several run folders one after another in one process group: starting torchrun once saves half a minute."""

import sys
from pathlib import Path

from pipeline import config as configs
from pipeline.config import TrainConfig
from pipeline.files import RunPaths
from pipeline.progress import start_logging
from pipeline.runtime import StopRequest, leave, ranks_from_environment
from pipeline.train import train

if __name__ == "__main__":
    start_logging()
    with ranks_from_environment() as ranks:
        for folder in sys.argv[1:]:
            paths = RunPaths(folder=Path(folder))
            assert train(configs.load(paths.config, TrainConfig), paths, ranks, StopRequest(paths.stop))
    leave()
