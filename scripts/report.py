#!/usr/bin/env python
"""What finished runs found: a verdict, paired differences with intervals, tables, and the page report.html.

python scripts/report.py study=demo                     all runs of a study, into its report folder
python scripts/report.py 'runs=[runs/demo/*]' out=report
python scripts/report.py 'runs=[runs/demo/*]'           prints only
"""

from pipeline.config.cli import hydra_main
from pipeline.config.commands import ReportConfig


def main(config: ReportConfig) -> None:
    from pipeline.report.commands import run  # here, so that a wrong option is refused before torch has loaded

    run(config)


if __name__ == "__main__":
    hydra_main("report", __doc__, main)
