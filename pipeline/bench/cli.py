"""scripts/bench [PART ...] [--quick] [--json FILE]: compare the cost of this pipeline with common alternatives.

The variants of a comparison take turns in this process on this machine, so that machine noise affects all of them
equally. Every figure is the median of several runs, printed with its range.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
from pathlib import Path

from pipeline.bench import capture as bench_capture
from pipeline.bench import fidelity as bench_fidelity
from pipeline.bench import loss as bench_loss
from pipeline.bench import pool as bench_pool
from pipeline.bench import read as bench_read
from pipeline.bench import rerun as bench_rerun
from pipeline.bench import step as bench_step
from pipeline.bench import train as bench_train
from pipeline.bench.timing import Figure, Results
from pipeline.config.cli import warn_of_another_checkout
from pipeline.core.files import write_json
from pipeline.core.progress import start_logging

PARTS = {
    "capture": bench_capture.run,
    "read": bench_read.run,
    "pool": bench_pool.run,
    "fidelity": bench_fidelity.run,
    "rerun": bench_rerun.run,
    "loss": bench_loss.run,
    "step": bench_step.run,
    "train": bench_train.run,
}


def main() -> None:
    """Run the parts that are named on the command line, or all parts."""
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__.split("\n\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"any of {', '.join(PARTS)}; default: all of them")
    parser.add_argument("--quick", action="store_true", help="small sizes and few runs, only to check that it works")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to this file, under stable keys")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.parts) - PARTS.keys())
    if unknown:
        parser.error(f"PART: expected any of {', '.join(PARTS)}, found {', '.join(unknown)}; correct the name")
    warn_of_another_checkout()
    start_logging(level=logging.WARNING)
    results: Results = {}
    for name in arguments.parts or PARTS:
        results |= PARTS[name](arguments.quick)
        print(flush=True)
        if arguments.json is not None:  # after each part, so that a later failure does not lose an hour of results
            write_json(arguments.json, to_plain_data(results))


def to_plain_data(results: Results) -> dict[str, object]:
    """Results with every Figure replaced by a dict, as JSON needs it."""
    return {name: dataclasses.asdict(value) if isinstance(value, Figure) else value for name, value in results.items()}


if __name__ == "__main__":
    main()
