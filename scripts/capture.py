#!/usr/bin/env python
"""Stage one: run the teacher over the corpus once and write its top-k logits as Parquet shards.

    python scripts/capture.py study=demo                       the demo's teacher and corpus
    python scripts/capture.py teacher.path=MODEL corpus.files=[DATA.jsonl] name=mine k=64

Prints the cache folder. The same command again resumes a stopped capture; on a finished cache it does nothing.
"""

from pipeline.config.cli import hydra_main
from pipeline.config.schema import CaptureConfig
from pipeline.config.validate import check_capture


def main(config: CaptureConfig) -> None:
    from pipeline.capture.driver import run  # here, so that a wrong option is rejected before torch is imported

    print(run(config))


if __name__ == "__main__":
    hydra_main("capture", __doc__, main, check_capture)
