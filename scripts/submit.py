#!/usr/bin/env python
"""A study as batch jobs of SLURM: teacher, capture, students, report, each waiting for the one before.

    python scripts/submit.py study=mine seeds=1,2,3 cluster.partition=gpu cluster.gpus_per_node=1 cluster.time=4:00:00
    python scripts/submit.py study=mine seeds=1,2,3 --print      show the files, and submit nothing
    python scripts/submit.py study=mine cluster=ours --config-dir conf-of-mine     options of cluster/ours.yaml

The options are those of scripts/study.py, but for rounds and launchers. The files are plain sbatch scripts; nothing has
to stay alive on this machine. The same command again continues with what is missing.
"""

import sys

from pipeline.config.cli import hydra_main
from pipeline.config.commands import SubmitConfig


def main(config: SubmitConfig) -> None:
    from pipeline.cluster.submit import run  # here, so that a wrong option is refused before torch has loaded

    run(config)


if __name__ == "__main__":
    sys.argv[1:] = ["dry_run=true" if argument == "--print" else argument for argument in sys.argv[1:]]
    hydra_main("submit", __doc__, main)
