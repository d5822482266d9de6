#!/usr/bin/env python
"""Choose options of a study's combined run by its score on dev: a search with Optuna, which resumes.

    python scripts/search.py study=mine trials=20                     weight, temperature, gold fraction, learning rate
    python scripts/search.py study=mine search=ours --config-dir .    the options of search/ours.yaml
    python scripts/search.py study=mine seeds=1,2,3                   the mean of three seeds decides

The teacher and the capture are made first where they are missing. The same command again continues; several at once,
on machines that share the folder of the runs, share the settings to try. test is never read.
"""

from pipeline.config.cli import hydra_main
from pipeline.config.commands import SearchConfig


def main(config: SearchConfig) -> None:
    from pipeline.study.search import run  # here, so that a wrong option is refused before torch has loaded

    run(config)


if __name__ == "__main__":
    hydra_main("search", __doc__, main)
