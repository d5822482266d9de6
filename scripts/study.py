#!/usr/bin/env python
"""A whole study: teacher, capture, students, report. It prints its plan and its cost first, and resumes.

    python scripts/study.py init                                    write a study's file, from a few answers
    python scripts/study.py study=demo seeds=1,2,3                  run what is missing, end with the report
    python scripts/study.py study=demo grid=kd_weight:0,0.3,1,3     compare settings of combined
    python scripts/study.py study=demo controls=shuffled            is it the teacher's knowledge that helps?
    python scripts/study.py study=demo dry_run=true                 the plan and its cost alone

Options of scripts/train.py, such as loss.kd.weight=0.3, apply to every student. The same command again does only what
is missing.
"""

import sys

from pipeline.config.cli import hydra_main
from pipeline.config.commands import StudyConfig


def main(config: StudyConfig) -> None:
    from pipeline.study.driver import run  # here, so that a wrong option is refused before torch has loaded

    run(config)


if __name__ == "__main__":
    if sys.argv[1:2] == ["init"]:
        from pipeline.declare.init import main as init

        init(sys.argv[2:])
    else:
        hydra_main("study", __doc__, main)
