#!/usr/bin/env python
"""Inspect a cache: check it, print its figures, compare it with its teacher, print it as text.

    python scripts/audit.py plan    corpus.files=[DATA] k=32      what this capture would cost
    python scripts/audit.py verify  'cache=caches/demo/demo-*'    is every byte and row correct?
    python scripts/audit.py summary 'cache=caches/demo/demo-*' out=audit
    python scripts/audit.py replay  'cache=caches/demo/demo-*' teacher.path='runs/demo/teacher-*/model'
    python scripts/audit.py show    'cache=caches/demo/demo-*' teacher.path='runs/demo/teacher-*/model' record=7

plan     run the teacher briefly, then estimate bytes, shards and hours; the options are those of scripts/capture.py
verify   check the hash of every shard and the values of every row; each finding is one line with what to do
summary  tokens, bytes, retained mass, entropy, perplexity of the teacher; out=FOLDER adds JSON and pictures
replay   run the teacher again on random sequences and compare; a control measures the noise of this machine
show     the text before a position, the known target, and the teacher's top entries with their probabilities

No action writes into the cache. Exit codes: 0 nothing is wrong, 1 something is wrong with the cache, 2 the cache cannot
be read or an option is wrong.
"""

import sys

from pipeline.config.cli import hydra_main, pop_action
from pipeline.config.commands import AuditConfig
from pipeline.config.schema import CaptureConfig

ACTIONS = {
    line.split(maxsplit=1)[0]: line.split(maxsplit=1)[1]
    for line in (__doc__ or "").splitlines()
    if line.startswith(("plan ", "verify ", "summary ", "replay ", "show "))
}


def main(config: AuditConfig | CaptureConfig) -> None:
    # imported here, so that a wrong option is refused before torch is loaded
    from pipeline.audit import commands
    from pipeline.capture import estimate

    codes.append(estimate.run(config) if isinstance(config, CaptureConfig) else commands.run(action, config))


if __name__ == "__main__":
    action = pop_action(ACTIONS, __doc__ or "")
    root = "capture" if action == "plan" else "audit"
    codes: list[int] = []
    hydra_main(root, __doc__ or "", main)
    sys.exit(max(codes, default=0))
