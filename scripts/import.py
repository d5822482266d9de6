#!/usr/bin/env python
"""Instead of stage one: convert the teacher outputs that another project has stored into a cache.

    python scripts/import.py name=theirs source=FOLDER format=distillkit tokenizer=TEACHER
    python scripts/import.py name=theirs 'source=FOLDER/*.parquet' format=axolotl_prepared alignment=current \\
        tokenizer=TEACHER

Prints the cache folder; the same command again continues where it stopped, or does nothing.
"""

from pipeline.config.cli import hydra_main
from pipeline.config.schema import ImportConfig


def main(config: ImportConfig) -> None:
    from pipeline.importers.convert import run  # here, so that a wrong option stops the script before torch is loaded

    print(run(config))


if __name__ == "__main__":
    hydra_main("import", __doc__, main)
