#!/usr/bin/env python
"""A whole study: teacher, capture, students, report. It prints its plan and its cost first, and resumes.

    python scripts/study.py init                                    write a study's file, from a few answers
    python scripts/study.py preview study=demo                      rank recipes by linear students, in minutes
    python scripts/study.py study=demo seeds=1,2,3                  run what is missing, end with the report
    python scripts/study.py study=demo grid=kd_weight:0,0.3,1,3     compare settings of combined
    python scripts/study.py study=demo controls=shuffled            is it the teacher's knowledge that helps?
    python scripts/study.py study=demo experiments=combined,pooled  learn from a pool of teacher and students
    python scripts/study.py study=demo dry_run=true                 the plan and its cost alone

Options of scripts/train.py, such as loss.kd.weight=0.3, apply to every student. The same command again does only what
is missing.
"""

import sys

from pipeline.config.cli import hydra_main
from pipeline.config.commands import PreviewConfig, StudyConfig

PREVIEW = """Rank recipes (gold, gates, sharper targets, pools) in minutes on a CPU, before any student is trained.

    python scripts/study.py preview study=demo                      after the teacher and its capture

Linear students read the untrained student's hidden states, which are computed once. They learn from the teacher's cache
by each recipe and are scored on dev; test is never read. The recipes are printed, best first, with their real commands.
"""


def main(config: StudyConfig) -> None:
    from pipeline.study.driver import run  # here, so that a wrong option is refused before torch has loaded

    run(config)


def preview(config: PreviewConfig) -> None:
    from pipeline.preview.commands import run

    run(config)


if __name__ == "__main__":
    if sys.argv[1:2] == ["init"]:
        from pipeline.declare.init import main as init

        init(sys.argv[2:])
    elif sys.argv[1:2] == ["preview"]:
        del sys.argv[1]
        hydra_main("preview", PREVIEW, preview)
    else:
        hydra_main("study", __doc__, main)
