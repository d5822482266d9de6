"""The scripts as one command, for an installed package: weak-to-strong COMMAND ...

    weak-to-strong capture name=mine teacher.path=WEAK ...     the same as python scripts/capture.py name=mine ...

`weak-to-strong COMMAND --help` lists the options of a command.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from pipeline.config.cli import pop_action, warn_of_another_checkout

COMMANDS = {
    "study": "a whole study, from teacher to report; `study init` writes one, `study preview` ranks recipes",
    "search": "choose options of a study by scores on dev (Optuna)",
    "submit": "a whole study as batch jobs of SLURM",
    "capture": "stage one: the teacher's top-k logits over a corpus, as Parquet shards",
    "train": "stage two: train a student on a cache and a gold set, then score it",
    "evaluate": "score any model folder on held-out text",
    "report": "what finished runs found: a verdict, tables, report.html",
    "status": "runs and captures: what works, what hangs, what failed, what is finished",
    "selftest": "does this machine, with its GPUs, do what the pipeline relies on",
    "audit": "inspect a cache: verify, summary, replay, show, plan",
    "pool": "make one cache of several captures of a corpus: a pool of their distributions",
    "import": "convert the teacher outputs of another project into a cache",
}


def main() -> None:
    """Run one of the scripts; without a command, or with --help alone, list them."""
    if sys.argv[1:] in (["--help"], ["-h"]):
        print(__doc__)
        print("\n".join(f"  {name:<10} {sentence}" for name, sentence in COMMANDS.items()))
        return
    warn_of_another_checkout()
    name = pop_action(COMMANDS, __doc__ or "")
    runpy.run_path(str(Path(__file__).resolve().parent / "scripts" / f"{name}.py"), run_name="__main__")


if __name__ == "__main__":
    main()
