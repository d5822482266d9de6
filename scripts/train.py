#!/usr/bin/env python
"""Stage two: train the student on a cache and a gold set under the combined loss, then score it.

    python scripts/train.py study=demo experiment=combined
    python scripts/train.py study=demo -m experiment=combined loss.kd.weight=0,0.5,1 seed=1,2,3

Each run has a folder named by what decides its result. The same command again skips what is finished and goes
on with what is not. Ctrl-C saves a checkpoint and leaves with exit code 75.
"""

from pipeline.config.cli import hydra_main
from pipeline.config.outcomes import Outcome
from pipeline.config.schema import TrainConfig


def main(config: TrainConfig) -> Outcome:
    from pipeline.training.job import run  # here, so that a wrong option is refused before torch has loaded

    return run(config)


def check_job(config: TrainConfig) -> None:
    from pipeline.training.job import check

    check(config)


if __name__ == "__main__":
    hydra_main("train", __doc__, main, check_job)
