"""What the combined objective costs, beside cross entropy and the usual KD + CE: forward and backward of the head."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.bench.timing import Findings, figure, in_turn, ratios, seconds, shown, table
from pipeline.core.runtime import compute_device, has_fast_matmul, keep_allocator_memory
from pipeline.core.topk import top_k_and_entropy
from pipeline.core.types import UNKNOWN_TARGET, Batch, TopK
from pipeline.objective.fused_head import combined_loss
from pipeline.objective.terms import StepInputs, TermOptions
from pipeline.training.driver import ALLOCATOR_SETTINGS

HIDDEN, VOCABULARY, K = 576, 49_152, 64  # SmolLM2-135M's
TERMS = {"lm": TermOptions(on=("corpus",)), "kd": TermOptions(on=("corpus",))}


class Head(nn.Module):
    """A linear head as a model has it."""

    def __init__(self, vocabulary: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.lm_head = nn.Linear(HIDDEN, vocabulary, bias=False, device=device, dtype=dtype)
        nn.init.normal_(self.lm_head.weight, std=0.05)
        self.config = SimpleNamespace()

    def get_output_embeddings(self) -> nn.Linear:
        """The head."""
        return self.lm_head


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Case:
    """Positions of which all, or a fraction, have a known target and a captured distribution."""

    head: Head
    hidden_NH: Tensor
    batch: Batch


def make_case(num: int, *, vocabulary: int = VOCABULARY, k: int = K, dtype: torch.dtype, fraction: float = 1.0) -> Case:
    """Random numbers in the shapes of a training step."""
    torch.manual_seed(0)
    device = compute_device()
    target_N = torch.randint(vocabulary, (num,))
    targets = num if fraction == 1.0 else int(num * fraction)
    has_N = torch.arange(num) < targets
    tops = [random_top(min(256, targets - first), vocabulary, k) for first in range(0, targets, 256)]
    batch = Batch(
        input_ids_BS=target_N[None],
        position_ids_BS=target_N[None],
        flat_positions_N=torch.arange(num),
        target_ids_N=torch.where(has_N, target_N, UNKNOWN_TARGET),
        gold_N=torch.zeros(num, dtype=torch.bool),
        weak_N=has_N,
        weak_ids_N=torch.full((num,), UNKNOWN_TARGET),
        teacher=TopK.cat(tops),
        entropy_M=None,
        keys_B=torch.zeros(1, dtype=torch.int64),
    )
    hidden_NH = torch.randn(num, HIDDEN, device=device, dtype=dtype)
    return Case(head=Head(vocabulary, dtype, device), hidden_NH=hidden_NH, batch=batch.to(device))


def random_top(num: int, vocabulary: int, k: int) -> TopK:
    """Distributions that fall off as a language model's do, spread over the vocabulary."""
    top, _, _ = top_k_and_entropy(torch.randn(num, 4 * k) * 4, k=k, temperatures=(1.0,))
    return dataclasses.replace(top, ids_NK=top.ids_NK * (vocabulary // (4 * k)))


# ---------------------------------------------------------------------------------------- the ways


def ours(case: Case, hidden_NH: Tensor, *, fused: bool = True) -> Tensor:
    """Both terms in one pass."""
    factors, vocabulary_size = {name: 1.0 / len(hidden_NH) for name in TERMS}, len(case.head.lm_head.weight)
    return combined_loss(
        case.head,
        hidden_NH,
        case.batch,
        TERMS,
        StepInputs(coefficients=factors),
        vocabulary_size=vocabulary_size,
        fused=fused,
    )[0]


def cross_entropy(case: Case, hidden_NH: Tensor) -> Tensor:
    """PyTorch's, on full logits."""
    return functional.cross_entropy(case.head.lm_head(hidden_NH), case.batch.target_ids_N)


def linear_cross_entropy(case: Case, hidden_NH: Tensor, **options: Any) -> Tensor:
    """PyTorch's own chunked pass, with its default options if none are given."""
    weight_VH, target_N = case.head.lm_head.weight, case.batch.target_ids_N
    found = torch.nn.LinearCrossEntropyOptions(**options)
    return functional.linear_cross_entropy(hidden_NH, weight_VH, target_N, options=found)


def plain_kd(case: Case, hidden_NH: Tensor) -> Tensor:
    """What one writes: cross entropy, and KL on the kept entries of a full fp32 log-softmax."""
    logits_NV, top = case.head.lm_head(hidden_NH), case.batch.teacher
    assert top is not None
    lm = functional.cross_entropy(logits_NV.float(), case.batch.target_ids_N)
    log_q_NK = torch.log_softmax(logits_NV.float(), dim=1).gather(1, top.ids_NK)
    log_p_NK = torch.log_softmax(top.relative_logits_NK.float(), dim=1)
    return lm + functional.kl_div(log_q_NK, log_p_NK, log_target=True, reduction="batchmean")


WAYS: dict[str, Callable[[Case, Tensor], Tensor]] = {
    "ours": ours,
    "cross entropy": cross_entropy,
    "linear_cross_entropy": linear_cross_entropy,
    "the same in chunks of 1,024": functools.partial(
        linear_cross_entropy, batch_chunk_size=1024, chunking_method=None, acc_policy="balanced"
    ),
    "KD + CE": plain_kd,
}
MEMORY = ("ours", "KD + CE")
KEPT = "_with_kept_memory"
KEYS = {  # of the ratios to ours
    "cross entropy": "cross_entropy",
    "linear_cross_entropy": "linear_cross_entropy",
    "the same in chunks of 1,024": "chunked_linear_cross_entropy",
    "KD + CE": "plain_kd",
}


def once(name: str, case: Case) -> float:
    """Seconds of one forward and backward, to gradients of hidden states and weight."""

    def run() -> None:
        case.head.zero_grad()
        hidden_NH = case.hidden_NH.detach().requires_grad_()
        WAYS[name](case, hidden_NH).backward()
        assert hidden_NH.grad is not None
        hidden_NH.grad.flatten()[0].item()  # a GPU has answered when a number is here

    return seconds(run)


# ----------------------------------------------------------------------------------------- the part


def run(quick: bool) -> Findings:
    """All ways at 2,048 and 8,192 positions; memory; a tenth of the targets; larger vocabularies and K."""
    fast = has_fast_matmul(torch.bfloat16, compute_device())
    dtype = torch.bfloat16 if fast else torch.float32
    sizes, runs = ([256], 2) if quick else ([2048, 8192], 5)
    shape = f"{dtype}, H {HIDDEN}, V {VOCABULARY}, K {K}"
    print(f"loss: forward and backward of the head in seconds, {shape}")
    findings = side_by_side(sizes, dtype, runs)
    keep_allocator_memory()  # as training's ranks do
    return findings | precision(dtype) | proportion(sizes[0], dtype, runs) | growth(sizes[0], dtype, runs, quick)


def side_by_side(sizes: Sequence[int], dtype: torch.dtype, runs: int) -> Findings:
    """Every way in one process that runs nothing else, once as PyTorch comes and once as our ranks keep their memory.

    On a CPU that decides as much as arithmetic does: left to itself, glibc maps a matrix of logits anew each time and
    has it faulted in page by page.
    """
    findings: Findings = {}
    settings: dict[str, tuple[dict[str, str], Sequence[int]]] = {"": ({}, sizes), KEPT: (ALLOCATOR_SETTINGS, sizes[:1])}
    for title, (environment, nums) in settings.items():
        rows = [["positions", *WAYS]]
        for num in nums:
            found = in_child(environment, "time", str(num), name_of(dtype), str(runs))
            over = {name: ratios(found["ours"], found[name]) for name in KEYS}
            rows.append([str(num), *(shown(figure(found[name])) for name in WAYS)])
            rows.append(["  ours over it", "", *(shown(ratio) for ratio in over.values())])
            if num == sizes[0]:
                findings |= {f"loss.time_ratio_to_{KEYS[name]}{title}": ratio for name, ratio in over.items()}
        print(table("  with memory kept, as ranks have it" if title else "  as PyTorch comes", rows))
    for num in sizes:
        found = in_turn({name: functools.partial(child_bytes, name, num, dtype) for name in MEMORY}, runs=3)
        mine, theirs = (figure([count / 1e6 for count in found[name]]) for name in MEMORY)
        if num == sizes[0]:
            findings["loss.memory_ratio"] = ratios(*(found[name] for name in MEMORY))
        print(f"  MB of memory, {num} positions: {shown(mine)}; KD + CE {shown(theirs)}")
    return findings


def precision(dtype: torch.dtype) -> Findings:
    """How far each way's gradients are from fp64's."""
    case = make_case(256, dtype=dtype)
    rows = [["relative error of the gradient of", "hidden states", "weight"]]
    findings: Findings = {}
    for name in ("ours", "linear_cross_entropy", "cross entropy"):
        exact_way = functools.partial(ours, fused=False) if name == "ours" else cross_entropy
        pairs = zip(gradients(WAYS[name], case), gradients(exact_way, double(case)), strict=True)
        errors = [float((found.double() - exact).norm() / exact.norm()) for found, exact in pairs]
        rows.append([name, *(f"{error:.1e}" for error in errors)])
        findings[f"loss.weight_gradient_error.{name.replace(' ', '_')}"] = figure([errors[1]])
    print(table(f"precision against fp64, {dtype}, 256 positions", rows))
    return findings


def double(case: Case) -> Case:
    """The same numbers in float64."""
    head = Head(VOCABULARY, torch.float64, case.hidden_NH.device)
    head.lm_head.weight.data.copy_(case.head.lm_head.weight.data)
    return dataclasses.replace(case, head=head, hidden_NH=case.hidden_NH.double())


def gradients(way: Callable[[Case, Tensor], Tensor], case: Case) -> tuple[Tensor, Tensor]:
    """Of hidden states and weight."""
    hidden_NH = case.hidden_NH.detach().clone().requires_grad_()
    case.head.zero_grad()
    way(case, hidden_NH).backward()
    assert hidden_NH.grad is not None
    assert case.head.lm_head.weight.grad is not None
    return hidden_NH.grad, case.head.lm_head.weight.grad.clone()


def proportion(num: int, dtype: torch.dtype, runs: int) -> Findings:
    """The head's time where a tenth of the positions have a target, over that where all have one."""
    cases = {"all": make_case(num, dtype=dtype), "a tenth": make_case(num, dtype=dtype, fraction=0.1)}
    found = in_turn({name: lambda case=case: once("ours", case) for name, case in cases.items()}, runs=runs)  # type: ignore[misc]
    share = ratios(found["a tenth"], found["all"])
    print(f"  a tenth of the positions has targets: {shown(share)} of the time")
    return {"loss.time_fraction_at_a_tenth": share}


def growth(num: int, dtype: torch.dtype, runs: int, quick: bool) -> Findings:
    """Time over vocabulary and over K."""
    vocabularies = [32_768, 49_152] if quick else [32_768, 65_536, 131_072, 262_144]
    kept = [8, 64] if quick else [8, 32, 128, 256]
    rows: list[dict[str, str | float]] = []
    for vocabulary, k in [*((v, K) for v in vocabularies), *((VOCABULARY, k) for k in kept)]:
        case = make_case(num // 2, vocabulary=vocabulary, k=k, dtype=dtype)
        median = figure(in_turn({"": lambda case=case: once("ours", case)}, runs=min(runs, 3))[""]).median  # type: ignore[misc]
        rows.append({"vocabulary": vocabulary, "k": k, "positions": num // 2, "seconds": median})
    told = [["V", "K", "seconds", "ns a logit"]]
    told += [[f"{r['vocabulary']:,}", str(r["k"]), f"{r['seconds']:.3g}", f"{per_logit(r):.1f}"] for r in rows]
    print(table(f"growth: {num // 2} positions", told))
    return {"loss.growth": rows}


def per_logit(row: dict[str, Any]) -> float:
    """Nanoseconds a logit."""
    return row["seconds"] / row["positions"] / row["vocabulary"] * 1e9


# ------------------------------------------------------------------------- in processes of their own


def in_child(environment: dict[str, str], *arguments: str) -> dict[str, Any]:
    """What `python -m pipeline.bench.loss` prints, with these variables where the user's environment has none."""
    command = [sys.executable, "-m", "pipeline.bench.loss", *arguments]
    done = subprocess.run(command, env=environment | os.environ, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def child_bytes(name: str, num: int, dtype: torch.dtype) -> float:
    """The memory that a way takes."""
    return float(in_child({}, "memory", str(num), name_of(dtype), name)["bytes"])


def as_child(what: str, num: str, dtype: str, which: str) -> dict[str, Any]:
    """`time` N DTYPE RUNS: the seconds of every way in turn; `memory` N DTYPE WAY: the bytes that one takes."""
    if what == "memory":
        return {"bytes": measure_memory(which, int(num), getattr(torch, dtype))}
    case = make_case(int(num), dtype=getattr(torch, dtype))
    return in_turn({name: functools.partial(once, name, case) for name in WAYS}, runs=int(which))


def name_of(dtype: torch.dtype) -> str:
    """As torch has it among its names."""
    return str(dtype).removeprefix("torch.")


def measure_memory(name: str, num: int, dtype: torch.dtype) -> float:
    """The most over what the inputs take, gradients included, of the second run: the first loads libraries."""
    once(name, make_case(64, dtype=dtype))
    case = make_case(num, dtype=dtype)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = float(torch.cuda.memory_allocated())
        once(name, case)
        return torch.cuda.max_memory_allocated() - before
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    once(name, case)
    return _status("VmHWM") - before


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) * 1024 for line in lines if line.startswith(name))


if __name__ == "__main__":
    print(json.dumps(as_child(*sys.argv[1:])))
