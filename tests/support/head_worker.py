"""One process whose model ZeRO 3 partitions: its head in float32 gives the bits of the whole model's.

LOCAL_RANK=0 python head_worker.py MODEL_FOLDER
"""

import sys
from pathlib import Path

import torch

from pipeline.models.head_float32 import logits_float32
from pipeline.models.loading import load_model
from pipeline.training.engine import deepspeed

if __name__ == "__main__":
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    options = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}}
    options |= {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    folder, cpu = Path(sys.argv[1]), torch.device("cpu")
    whole = load_model(folder, dtype="bfloat16", device=cpu)
    model = load_model(folder, dtype="bfloat16", device=cpu, partition=options)
    deepspeed.initialize(model=model, config=options)
    assert model.lm_head.weight.numel() == 0
    hidden_NH = torch.randn(5, model.config.hidden_size).bfloat16()
    with torch.inference_mode():
        assert torch.equal(logits_float32(model, hidden_NH, 300), logits_float32(whole, hidden_NH, 300))
    assert model.lm_head.weight.numel() == 0
