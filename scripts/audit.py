#!/usr/bin/env python
"""Look into a cache: is it whole, what lies in it, does the teacher still say so?

    python scripts/audit.py plan    corpus.files=[DATA] k=32      what a capture with these options would take
    python scripts/audit.py verify  'cache=caches/demo/demo-*'    every byte and row against the manifest
    python scripts/audit.py summary 'cache=caches/demo/demo-*' out=audit
    python scripts/audit.py replay  'cache=caches/demo/demo-*' teacher.path='runs/demo/teacher-*/model'
    python scripts/audit.py show    'cache=caches/demo/demo-*' teacher.path='runs/demo/teacher-*/model' record=7

plan     a short probe of the teacher, then bytes, shards and hours; its options are those of scripts/capture.py
verify   hash every shard and check what every row says; each finding is one line with what to do
summary  tokens, bytes, retained mass, entropy, perplexity of the teacher; out=FOLDER adds JSON and a picture
replay   run the teacher again on random sequences and compare; the control is the noise of this machine
show     the text read so far, the known target, and the teacher's top entries with their probabilities

Nothing is ever written into the cache. Exit codes: 0 all is well, 1 something is wrong with the cache, 2 it cannot be
read at all or an option is wrong.
"""

import sys

from pipeline.config.cli import hydra_main, pop_action
from pipeline.config.schema import AuditConfig, CaptureConfig

ACTIONS = {
    line.split(maxsplit=1)[0]: line.split(maxsplit=1)[1]
    for line in (__doc__ or "").splitlines()
    if line.startswith(("plan ", "verify ", "summary ", "replay ", "show "))
}


def main(config: AuditConfig | CaptureConfig) -> None:
    from pipeline.audit import commands as audit
    from pipeline.capture import estimate as probe  # here, so that a wrong option is refused before torch has loaded

    codes.append(probe.run(config) if isinstance(config, CaptureConfig) else audit.run(action, config))


if __name__ == "__main__":
    action = pop_action(ACTIONS, __doc__ or "")
    root = "capture" if action == "plan" else "audit"
    names = {word.split("=")[0] for word in sys.argv}
    if root == "audit" and "model@teacher" not in names and any(name.startswith("teacher.") for name in names):
        sys.argv.insert(1, "model@teacher=own")  # teacher.path alone is enough: there is no other default to keep
    codes: list[int] = []
    hydra_main(root, __doc__ or "", main)
    sys.exit(max(codes, default=0))
