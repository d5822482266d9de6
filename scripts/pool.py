#!/usr/bin/env python
"""Between the stages: make one cache of several captures of a corpus, a pool of their distributions.

    python scripts/pool.py name=pool 'members=[caches/small-*,caches/other-*]' weights=[0.5,0.5]
    python scripts/pool.py name=fitted 'members=[caches/A-*,caches/B-*]' 'fit_on=[caches/gold-A-*,caches/gold-B-*]'
    python scripts/pool.py name=sharper 'members=[caches/small-*]' temperature=0.5

Prints the cache; the same command again continues where it stopped, or does nothing.
"""

from pipeline.config.cli import hydra_main
from pipeline.config.commands import PoolConfig


def main(config: PoolConfig) -> None:
    from pipeline.pooling.convert import run  # here, so that a wrong option stops the script before torch is loaded

    print(run(config))


if __name__ == "__main__":
    hydra_main("pool", __doc__, main)
