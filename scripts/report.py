#!/usr/bin/env python
"""A table over finished runs: weak score, floor, combined, ceiling and the performance gap recovered.

python scripts/report.py runs=[runs/demo/*] out=runs/demo
"""

from pipeline.config.cli import hydra_main
from pipeline.config.schema import ReportConfig


def main(config: ReportConfig) -> None:
    from pipeline.report.commands import run  # here, so that a wrong option is refused before torch has loaded

    run(config)


if __name__ == "__main__":
    hydra_main("report", __doc__, main)
