"""The health of a training run: speed, data wait, memory, model FLOPs, exploding or non-finite gradients."""

from __future__ import annotations

import math
import resource
import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.core.progress import log
from pipeline.core.runtime import Ranks, full_numel
from pipeline.core.types import Batch

# Dense bf16 FLOP/s from NVIDIA's data sheets, by the exact device name that the driver reports: a variant with other
# clocks (PCIe, NVL) or a slice of a device (MIG) has another name and no entry.
PEAK_BF16 = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
}

MAX_NORMS = 100  # the median is over this many of the last gradient norms
MIN_NORMS = 10  # with fewer, there is no median yet


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """The numbers that a model's FLOPs depend on."""

    body: int
    """Parameters used for every token; input embeddings are only looked up and are not counted."""
    head: int
    """Parameters of the output layer, tied or not: used at supervised positions only."""
    attention: int
    """Layers * heads * size of a head."""
    frozen_body: int = 0
    """The parameters of `body` that are not trained: their gradient is not computed."""
    frozen_head: int = 0


def model_size(student: Any) -> ModelSize:
    """The size of a model, as `model_flops` needs it."""
    text = student.config.get_text_config()
    head, embedding = student.get_output_embeddings().weight, student.get_input_embeddings().weight
    body = [p for p in student.parameters() if p is not head and p is not embedding]
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return ModelSize(
        body=sum(map(full_numel, body)),
        head=full_numel(head),
        attention=text.num_hidden_layers * text.num_attention_heads * head_size,
        frozen_body=sum(full_numel(p) for p in body if not p.requires_grad),
        frozen_head=0 if head.requires_grad else full_numel(head),
    )


def model_flops(size: ModelSize, *, tokens: int, supervised: int, window: int) -> float:
    """FLOPs of a forward and a backward: 6 N + 12 L H Q T for each token.

    Chowdhery et al., PaLM (2022), appendix B: N parameters, L layers of H heads of size Q, a window of T tokens.
    Recomputation is not counted, and masked attention counts in full. PaLM applies its head at every token; ours is
    applied at supervised positions only, so body and head are counted apart. A frozen parameter costs 4, not 6: the
    product for its gradient is left out.
    """
    not_computed = 2.0 * (size.frozen_body * tokens + size.frozen_head * supervised)
    return 6.0 * (size.body * tokens + size.head * supervised) + 12.0 * size.attention * window * tokens - not_computed


def peak_flops(device: torch.device, dtype: str) -> float | None:
    """Peak dense bf16 FLOP/s of a device; None if it is not known, or if the run is in float32."""
    if device.type != "cuda" or dtype == "float32":
        return None
    return PEAK_BF16.get(torch.cuda.get_device_name(device))


def peak_memory(device: torch.device) -> int:
    """Peak memory since the start, in bytes: of tensors on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux reports KiB


def step_totals(ranks: Ranks, batches: Sequence[Batch], size: ModelSize) -> dict[str, Any]:
    """Tokens and FLOPs of a step over all ranks, and the largest peak memory of a rank, with one all-reduce."""
    # [tokens, FLOPs, peak of rank 0, peak of rank 1, ...]: each rank fills in its own peak, and the sum has all of them
    values = torch.zeros(2 + ranks.world_size, dtype=torch.float64)
    for batch in batches:
        tokens, window = batch.input_ids_BS.numel(), batch.input_ids_BS.shape[1]
        supervised = len(batch.flat_positions_N)
        values[0] += tokens
        values[1] += model_flops(size, tokens=tokens, supervised=supervised, window=window)
    values[2 + ranks.rank] = peak_memory(ranks.device)
    tokens_sum, flops, *peaks = ranks.all_reduce(values.to(ranks.device)).tolist()
    return {"tokens": int(tokens_sum), "model_flops": flops, "peak_memory_bytes": int(max(peaks))}


def throughput(figures: dict[str, Any], *, world_size: int, peak: float | None) -> dict[str, float]:
    """Speed and data wait of a step, measured on the first rank; `mfu` only if the peak FLOP/s of a device is known."""
    seconds = figures["seconds"] + figures["data_wait_seconds"]
    result = {
        "tokens_per_second": figures["tokens"] / seconds,
        "data_wait_fraction": figures["data_wait_seconds"] / seconds,
    }
    if peak is not None:
        result["mfu"] = figures["model_flops"] / (seconds * world_size * peak)
    return result


class GradientMonitor:
    """Checks the gradient norm of each step: ends a run that cannot learn any more, warns once of an exploding norm."""

    def __init__(
        self,
        *,
        max_skipped_steps: int,
        warn_grad_norm: float,
        rows: Iterable[dict[str, Any]] = (),
        skipped_steps: int = 0,
    ) -> None:
        self._max_skipped, self._warn_factor = max_skipped_steps, warn_grad_norm
        self._norms: deque[float] = deque(maxlen=MAX_NORMS)
        self._skipped_before = self._skipped_in_a_row = self._explosions = 0
        self._warned = False
        for row in rows:  # a resumed run continues with the norms and the count that it had
            self._note(row["grad_norm"], row["skipped_steps"])
            self._explosions = row["exploding_steps"]
        self._skipped_before = skipped_steps

    def check(self, figures: dict[str, Any]) -> dict[str, int]:
        """Add a step; FloatingPointError if its gradient is not finite, or too many steps in a row were skipped."""
        step, norm = figures["step"], figures["grad_norm"]
        median = statistics.median(self._norms) if len(self._norms) >= MIN_NORMS else None
        was_skipped = self._note(norm, figures["skipped_steps"])
        if not was_skipped and not 0 <= norm < math.inf:  # DeepSpeed returns -1 for a norm that is not finite
            raise FloatingPointError(
                f"step {step}: expected a finite gradient norm, found {norm}; lower the learning rate, or "
                "continue from a checkpoint with dtype=float32"
            )
        if self._skipped_in_a_row >= self._max_skipped:
            raise FloatingPointError(
                f"step {step}: expected fewer than {self._max_skipped} optimizer steps in a row to be skipped, found "
                f"{self._skipped_in_a_row}, because gradients overflow; lower the learning rate or use dtype=float32"
            )
        if median is not None and norm > self._warn_factor * median:
            self._explosions += 1
            self._warn(step, norm, median)
        return {"exploding_steps": self._explosions}

    def _note(self, norm: float, skipped: int) -> bool:
        was_skipped = skipped > self._skipped_before
        self._skipped_before = skipped
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if was_skipped else 0
        if not was_skipped:
            self._norms.append(norm)
        return was_skipped

    def _warn(self, step: int, norm: float, median: float) -> None:
        if not self._warned:
            log.warning(
                "step %d: expected a gradient norm of at most %g times its recent median %.3g, found %.3g; look at the "
                "data of that step or lower the learning rate (counted in exploding_steps, logged once)",
                *(step, self._warn_factor, median, norm),
            )
        self._warned = True
