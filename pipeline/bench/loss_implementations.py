"""The implementations that the loss benchmarks compare (combined loss, cross entropy, KD + CE), and their inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.core.runtime import compute_device
from pipeline.core.topk import top_k_and_entropy
from pipeline.core.types import UNKNOWN_TARGET, Batch, TopK
from pipeline.objective.fused_head import combined_loss
from pipeline.objective.terms import StepInputs, TermOptions

HIDDEN, VOCABULARY, K = 576, 49_152, 64  # SmolLM2-135M's
TERMS = {"lm": TermOptions(on=("corpus",)), "kd": TermOptions(on=("corpus",))}


class Head(nn.Module):
    """A model that has only its linear output head."""

    def __init__(self, vocabulary: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.lm_head = nn.Linear(HIDDEN, vocabulary, bias=False, device=device, dtype=dtype)
        nn.init.normal_(self.lm_head.weight, std=0.05)
        self.config = SimpleNamespace()

    def get_output_embeddings(self) -> nn.Linear:
        """The head, under the name that transformers gives this method."""
        return self.lm_head


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Case:
    """The inputs of one forward and backward of the head."""

    head: Head
    hidden_NH: Tensor
    batch: Batch


def make_case(
    num_positions: int,
    *,
    vocabulary: int = VOCABULARY,
    k: int = K,
    dtype: torch.dtype,
    fraction: float = 1.0,
) -> Case:
    """Random values in the shapes of a training step.

    The first `fraction` of the positions have a known target and a captured distribution, the others neither.
    """
    torch.manual_seed(0)
    device = compute_device()
    target_N = torch.randint(vocabulary, (num_positions,))
    num_targets = num_positions if fraction == 1.0 else int(num_positions * fraction)
    has_target_N = torch.arange(num_positions) < num_targets
    tops = [random_top(min(256, num_targets - first), vocabulary, k) for first in range(0, num_targets, 256)]
    batch = Batch(
        input_ids_BS=target_N[None],
        position_ids_BS=target_N[None],
        flat_positions_N=torch.arange(num_positions),
        target_ids_N=torch.where(has_target_N, target_N, UNKNOWN_TARGET),
        gold_N=torch.zeros(num_positions, dtype=torch.bool),
        weak_N=has_target_N,
        weak_ids_N=torch.full((num_positions,), UNKNOWN_TARGET),
        weights_N=torch.ones(num_positions),
        depths_N=torch.zeros(num_positions, dtype=torch.int64),
        teacher=TopK.cat(tops),
        entropy_M=None,
        keys_B=torch.zeros(1, dtype=torch.int64),
    )
    hidden_NH = torch.randn(num_positions, HIDDEN, device=device, dtype=dtype)
    return Case(head=Head(vocabulary, dtype, device), hidden_NH=hidden_NH, batch=batch.to(device))


def random_top(num_positions: int, vocabulary: int, k: int) -> TopK:
    """Distributions that decrease as those of a language model do, with ids from all parts of the vocabulary."""
    top, _, _ = top_k_and_entropy(torch.randn(num_positions, 4 * k) * 4, k=k, temperatures=(1.0,))
    return dataclasses.replace(top, ids_NK=top.ids_NK * (vocabulary // (4 * k)))


def ours(case: Case, hidden_NH: Tensor, *, fused: bool = True) -> Tensor:
    """This pipeline's combined loss: both terms in one pass over the head."""
    return combined_loss(
        case.head,
        hidden_NH,
        case.batch,
        TERMS,
        StepInputs(coefficients={name: 1.0 / len(hidden_NH) for name in TERMS}),
        vocabulary_size=len(case.head.lm_head.weight),
        fused=fused,
    )[0]


def cross_entropy(case: Case, hidden_NH: Tensor) -> Tensor:
    """PyTorch's cross entropy on the full logits."""
    return functional.cross_entropy(case.head.lm_head(hidden_NH), case.batch.target_ids_N)


def linear_cross_entropy(
    case: Case, hidden_NH: Tensor, options: torch.nn.LinearCrossEntropyOptions | None = None
) -> Tensor:
    """PyTorch's fused head and cross entropy; without `options`, with its defaults."""
    return functional.linear_cross_entropy(
        hidden_NH,
        case.head.lm_head.weight,
        case.batch.target_ids_N,
        options=torch.nn.LinearCrossEntropyOptions() if options is None else options,
    )


def chunked_linear_cross_entropy(case: Case, hidden_NH: Tensor) -> Tensor:
    """PyTorch's fused head and cross entropy in chunks of 1,024 positions."""
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=1024, chunking_method=None, acc_policy="balanced")
    return linear_cross_entropy(case, hidden_NH, options)


def plain_kd(case: Case, hidden_NH: Tensor) -> Tensor:
    """The usual KD + CE: cross entropy, and KL on the kept entries, both from a full fp32 log-softmax."""
    logits_NV, top = case.head.lm_head(hidden_NH), case.batch.teacher
    assert top is not None
    lm = functional.cross_entropy(logits_NV.float(), case.batch.target_ids_N)
    log_q_NK = torch.log_softmax(logits_NV.float(), dim=1).gather(1, top.ids_NK)
    log_p_NK = torch.log_softmax(top.relative_logits_NK.float(), dim=1)
    return lm + functional.kl_div(log_q_NK, log_p_NK, log_target=True, reduction="batchmean")


IMPLEMENTATIONS: dict[str, Callable[[Case, Tensor], Tensor]] = {
    "ours": ours,
    "cross entropy": cross_entropy,
    "linear_cross_entropy": linear_cross_entropy,
    "the same in chunks of 1,024": chunked_linear_cross_entropy,
    "KD + CE": plain_kd,
}
