"""How true a cache is for its size: the gradient a student gets from what is kept, against the full distribution's.

The gradient of the KD term on the head's weight is (q - p)^T H summed over positions. Its angle to the full
distribution's says how far a step goes astray; its norm ratio, how long the step is.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pipeline import manifest as manifests
from pipeline import models
from pipeline.bench_capture import CORPUS, MODEL
from pipeline.bench_read import manifest_of
from pipeline.config import Dtype, ModelConfig, Targets, TextConfig
from pipeline.corpus import collate_inputs, sequences
from pipeline.losses import forward_kl
from pipeline.measure import Findings, table
from pipeline.runtime import compute_device, keep_memory
from pipeline.shards import shard_writer
from pipeline.text import Rejections, all_records, open_text
from pipeline.topk import hybrid, join, sampled, top_k
from pipeline.types import Captured, TokenSequence, TopK

POSITIONS = 256  # positions at once: bounds [N, V]
TRIALS = 3  # repeats of the draws


def run(quick: bool) -> Findings:
    """Angle and norm ratio of the head's gradient, and bytes a token on disk, for each way to keep a distribution.

    Teacher: SmolLM2-135M. Student: the same after some steps on titles and topics, so that it is near, as a student in
    training is. Text: descriptions of the demo's corpus.
    """
    keep_memory()
    packed, hidden_NH, teacher_NH, head_VH, teacher_head_VH = _states(quick)
    full_VH, bytes_of = torch.zeros_like(head_VH), {}
    rows: list[dict[str, str | float]] = []
    full_VH = _gradient(lambda p_NV: (p_NV, None), hidden_NH, teacher_NH, head_VH, teacher_head_VH)
    for name, keep, kind in WAYS:
        trials = TRIALS if kind in ("sampled", "hybrid") else 1
        grads = [
            _gradient(lambda p_NV, trial=trial: keep(p_NV, trial), hidden_NH, teacher_NH, head_VH, teacher_head_VH)
            for trial in range(trials)
        ]
        mean_VH = torch.stack(grads).mean(0)
        spread = sum(float((g - mean_VH).norm() ** 2) for g in grads) / max(trials - 1, 1)
        angles = [_angle(g, full_VH) for g in grads]
        bytes_of[name] = _bytes(packed, keep, teacher_NH, teacher_head_VH, kind)
        rows.append(
            {
                "kind": name,
                "bytes_per_token": round(bytes_of[name], 1),
                "angle_degrees": round(sum(angles) / trials, 2),
                "norm_ratio": round(float(grads[0].norm() / full_VH.norm()), 4),
                # the variance of the mean of `trials` draws is in the mean's distance too: taken off
                "bias_fraction": round(
                    math.sqrt(max(float((mean_VH - full_VH).norm() ** 2) - spread / trials, 0.0))
                    / float(full_VH.norm()),
                    4,
                ),
                "deviation_fraction": round(math.sqrt(spread) / float(full_VH.norm()), 4),
            }
        )
    head = ["kind", "bytes a token", "angle (degrees)", "norm ratio", "bias", "deviation"]
    shown = [head, *([str(value) for value in row.values()] for row in rows)]
    title = f"fidelity: head gradient against the full distribution's, {len(hidden_NH)} tokens"
    print(table(title, shown))
    print("  bias, deviation: of the gradient, as fractions of its norm; deviation over repeats of the draws")
    return {"fidelity": rows}
