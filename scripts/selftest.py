#!/usr/bin/env python
"""Does what this pipeline relies on hold on this machine? A table: check, PASS or FAIL or SKIPPED, figures, seconds.

python scripts/selftest.py                                 all checks: under five minutes, nothing is downloaded
python scripts/selftest.py checks=[copies,zero_3]          only these
python scripts/selftest.py out=selftest.json               the rows as JSON, too

Capture on each GPU, copies to host memory, attention kernels, the fused head, NCCL, ZeRO stages with offload and
resume, export, speed, memory. What a machine lacks is SKIPPED with the reason. Exit code 1 if a check failed.
"""

import sys

from pipeline.config.cli import hydra_main
from pipeline.config.commands import SelftestConfig


def main(config: SelftestConfig) -> None:
    from pipeline.selftest.commands import run  # here, so that --help and a wrong option need it not

    codes.append(run(config))


if __name__ == "__main__":
    codes: list[int] = []
    hydra_main("selftest", __doc__ or "", main)
    sys.exit(max(codes, default=0))
