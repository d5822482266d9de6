#!/usr/bin/env python
"""Score any model folder on held-out text: likelihood, accuracy over choices, agreement with a teacher.

python scripts/evaluate.py model.path=runs/demo/RUN/model out=scores/RUN
"""

from pipeline.config.cli import hydra_main
from pipeline.config.commands import EvaluateConfig


def main(config: EvaluateConfig) -> None:
    from pipeline.evaluation.scoring import run  # here, so that a wrong option is refused before torch has loaded

    run(config)


if __name__ == "__main__":
    hydra_main("evaluate", __doc__, main)
