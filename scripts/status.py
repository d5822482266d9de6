#!/usr/bin/env python
"""What runs and captures do: at work, silent, failed, stopped, waiting, finished. Only their folders are read.

python scripts/status.py study=demo                                  all runs and captures of a study
python scripts/status.py 'runs=[runs/*]' 'caches=[caches/*]'
python scripts/status.py study=demo watch=30                         again every 30 seconds, until all are finished
python scripts/status.py study=demo json=true                        one JSON object a line

Nothing is written. Exit codes: 0 all are finished, 1 something failed, is silent or cannot be read, 2 an option is
wrong or nothing was found, 3 something is not finished and nothing failed.
"""

import sys

from pipeline.config.cli import hydra_main
from pipeline.config.commands import StatusConfig


def main(config: StatusConfig) -> None:
    from pipeline.status.commands import run  # here, so that --help and a wrong option need it not

    codes.append(run(config))


if __name__ == "__main__":
    codes: list[int] = []
    hydra_main("status", __doc__ or "", main)
    sys.exit(max(codes, default=0))
