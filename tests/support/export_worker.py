"""One rank that trains two steps under several engines and exports each.

    torchrun --nproc-per-node=RANKS export_worker.py OUT

writes OUT/{dtype}-zero{stage}/: the exported `model`, and `logits.pt`, what the engine's own module says of INPUT_IDS.
"""

import dataclasses
import sys
from pathlib import Path

import torch

from pipeline.core.files import RunPaths
from pipeline.core.progress import start_logging
from pipeline.core.runtime import exit_rank, ranks_from_environment
from pipeline.training.export import export
from support.gradient_worker import run_after
from support.tiny import make_tokenizer

INPUT_IDS_BS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [27, 18, 28, 18, 28, 45, 9, 0]])

if __name__ == "__main__":
    start_logging()
    with ranks_from_environment() as ranks:
        for dtype in ("float32", "bfloat16"):
            for stage in (0, 1, 3):
                run = run_after(ranks, "striped", stage, 1, dtype)
                student = run.engine.module.student
                student.generation_config.top_k = 7
                with torch.no_grad():
                    logits_BSV = student.eval()(input_ids=INPUT_IDS_BS).logits
                paths = RunPaths(folder=Path(sys.argv[1]) / f"{dtype}-zero{stage}")
                paths.folder.mkdir(exist_ok=True)
                export(dataclasses.replace(run, paths=paths), make_tokenizer())
                if ranks.rank == 0:
                    torch.save(logits_BSV, paths.folder / "logits.pt")
                ranks.barrier()
    exit_rank()
