#!/usr/bin/env python
"""What finished runs found: a verdict with its evidence, scores with intervals, and what to run next.

    python scripts/report.py study=mine                    print; write the page and the tables into the study's folder
    python scripts/report.py runs=[runs/mine/*]            print only
    python scripts/report.py runs=[runs/mine/*] out=report
"""

from pipeline.config.cli import hydra_main
from pipeline.config.schema import ReportConfig


def main(config: ReportConfig) -> None:
    from pipeline.report.commands import run  # here, so that a wrong option is refused before torch has loaded

    run(config)


if __name__ == "__main__":
    hydra_main("report", __doc__, main)
