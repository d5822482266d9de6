"""scripts/bench [PART ...] [--quick] [--json FILE]: what this costs beside what one would otherwise run, side by side.

The runs of a comparison take turns, so that a machine's moods hit all alike; a figure is the median of its runs, and
beside it stands the range. Every run is timed whole, in this process, on this machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from pipeline.bench import capture as bench_capture
from pipeline.bench import fidelity as bench_fidelity
from pipeline.bench import loss as bench_loss
from pipeline.bench import read as bench_read
from pipeline.bench import rerun as bench_rerun
from pipeline.bench import step as bench_step
from pipeline.bench import train as bench_train
from pipeline.bench.timing import Figure, Findings
from pipeline.core.files import write_atomically
from pipeline.core.progress import start_logging

PARTS = {
    "capture": bench_capture.run,
    "read": bench_read.run,
    "fidelity": bench_fidelity.run,
    "rerun": bench_rerun.run,
    "loss": bench_loss.run,
    "step": bench_step.run,
    "train": bench_train.run,
}


def main() -> None:
    """Run the parts that are asked for, or all."""
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__.split("\n\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; none: all of them")
    parser.add_argument("--quick", action="store_true", help="less of everything, to see that it runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there, under stable keys")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.parts) - PARTS.keys())
    if unknown:
        parser.error(f"PART: expected some of {', '.join(PARTS)}, found {', '.join(unknown)}")
    start_logging(level=30)
    findings: Findings = {}
    for name in arguments.parts or PARTS:
        findings |= PARTS[name](arguments.quick)
        print(flush=True)
        if arguments.json is not None:  # after each part: an hour's work does not hang on the last
            write_atomically(arguments.json, json.dumps(plain(findings), indent=2) + "\n")


def plain(findings: Findings) -> dict[str, object]:
    """Findings as JSON knows them."""
    return {name: dataclasses.asdict(value) if isinstance(value, Figure) else value for name, value in findings.items()}


if __name__ == "__main__":
    main()
