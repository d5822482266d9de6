"""Time and memory of the combined loss, compared with cross entropy and the usual KD + CE: forward and backward."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pipeline.bench.loss_implementations import HIDDEN, IMPLEMENTATIONS, VOCABULARY, Case, K, make_case
from pipeline.bench.loss_precision import measure_precision
from pipeline.bench.timing import Results, format_figure, ratios, run_in_turns, seconds, summarize, table
from pipeline.core.runtime import compute_device, has_fast_matmul, keep_allocator_memory, module_command
from pipeline.training.launch import ALLOCATOR_SETTINGS

IN_MEMORY_COMPARISON = ("ours", "KD + CE")
KEPT_MEMORY_SUFFIX = "_with_kept_memory"
KEY_ENDINGS = {  # implementation -> the end of its key in the results
    "cross entropy": "cross_entropy",
    "linear_cross_entropy": "linear_cross_entropy",
    "the same in chunks of 1,024": "chunked_linear_cross_entropy",
    "KD + CE": "plain_kd",
}


def run(quick: bool) -> Results:
    """Time at 2,048 and 8,192 positions, memory, precision, a tenth of the targets, and growth with V and K."""
    fast = has_fast_matmul(torch.bfloat16, compute_device())
    dtype = torch.bfloat16 if fast else torch.float32
    sizes, runs = ([256], 2) if quick else ([2048, 8192], 5)
    shape = f"{dtype}, H {HIDDEN}, V {VOCABULARY}, K {K}"
    print(f"loss: forward and backward of the head in seconds, {shape}")
    results = compare_time("  default allocator", {}, sizes, dtype, runs)
    results |= compare_time(
        "  allocator keeps memory, as in a training run",
        ALLOCATOR_SETTINGS,
        sizes[:1],
        dtype,
        runs,
        key_suffix=KEPT_MEMORY_SUFFIX,
    )
    results |= compare_memory(sizes, dtype)
    keep_allocator_memory()  # as the ranks of a training run do
    results |= measure_precision(dtype)
    results |= measure_a_tenth_of_targets(sizes[0], dtype, runs)
    results |= measure_growth(sizes[0], dtype, runs, quick)
    return results


def compare_time(
    title: str,
    environment: Mapping[str, str],
    sizes: Sequence[int],
    dtype: torch.dtype,
    runs: int,
    *,
    key_suffix: str = "",
) -> Results:
    """Seconds of every implementation, in a process of its own with these environment variables.

    On a CPU the allocator matters as much as the arithmetic: with its default settings glibc maps the memory of every
    matrix of logits anew, and the kernel faults in each page.
    """
    results: Results = {}
    rows = [["positions", *IMPLEMENTATIONS]]
    for num_positions in sizes:
        times = run_in_child(environment, "time", str(num_positions), dtype_name(dtype), str(runs))
        ratio_to = {name: ratios(times["ours"], times[name]) for name in KEY_ENDINGS}
        rows.append([str(num_positions), *(format_figure(summarize(times[name])) for name in IMPLEMENTATIONS)])
        rows.append(["  ratio of ours", "", *(format_figure(ratio) for ratio in ratio_to.values())])
        if num_positions == sizes[0]:
            for name, ratio in ratio_to.items():
                results[f"loss.time_ratio_to_{KEY_ENDINGS[name]}{key_suffix}"] = ratio
    print(table(title, rows))
    return results


def compare_memory(sizes: Sequence[int], dtype: torch.dtype) -> Results:
    """Peak memory of our loss and of KD + CE, each measured in a process of its own."""
    results: Results = {}
    for num_positions in sizes:
        measurements = {
            name: functools.partial(peak_bytes_in_child, name, num_positions, dtype) for name in IN_MEMORY_COMPARISON
        }
        peaks = run_in_turns(measurements, runs=3)
        megabytes = {name: summarize([peak / 1e6 for peak in values]) for name, values in peaks.items()}
        if num_positions == sizes[0]:
            results["loss.memory_ratio"] = ratios(peaks["ours"], peaks["KD + CE"])
        ours, plain_kd = format_figure(megabytes["ours"]), format_figure(megabytes["KD + CE"])
        print(f"  MB of memory, {num_positions} positions: {ours}; KD + CE {plain_kd}")
    return results


def measure_a_tenth_of_targets(num_positions: int, dtype: torch.dtype, runs: int) -> Results:
    """Time with targets at a tenth of the positions, as a fraction of the time with targets at all positions."""
    cases = {
        "all": make_case(num_positions, dtype=dtype),
        "a tenth": make_case(num_positions, dtype=dtype, fraction=0.1),
    }
    measurements = {name: functools.partial(time_forward_backward, "ours", case) for name, case in cases.items()}
    times = run_in_turns(measurements, runs=runs)
    fraction = ratios(times["a tenth"], times["all"])
    print(f"  targets at a tenth of the positions: {format_figure(fraction)} of the time")
    return {"loss.time_fraction_at_a_tenth": fraction}


def measure_growth(num_positions: int, dtype: torch.dtype, runs: int, quick: bool) -> Results:
    """Time as a function of the vocabulary size and of K, at half of the positions."""
    vocabularies = [32_768, 49_152] if quick else [32_768, 65_536, 131_072, 262_144]
    kept = [8, 64] if quick else [8, 32, 128, 256]
    num_positions //= 2
    results: list[dict[str, str | float]] = []
    rows = [["V", "K", "seconds", "ns per logit"]]
    for vocabulary, k in [*((v, K) for v in vocabularies), *((VOCABULARY, k) for k in kept)]:
        case = make_case(num_positions, vocabulary=vocabulary, k=k, dtype=dtype)
        measurement = functools.partial(time_forward_backward, "ours", case)
        median = summarize(run_in_turns({"ours": measurement}, runs=min(runs, 3))["ours"]).median
        results.append({"vocabulary": vocabulary, "k": k, "positions": num_positions, "seconds": median})
        nanoseconds_per_logit = median / num_positions / vocabulary * 1e9
        rows.append([f"{vocabulary:,}", str(k), f"{median:.3g}", f"{nanoseconds_per_logit:.1f}"])
    print(table(f"growth: {num_positions} positions", rows))
    return {"loss.growth": results}


def time_forward_backward(name: str, case: Case) -> float:
    """Seconds of one forward and backward of an implementation, with gradients of hidden states and weight."""

    def forward_backward() -> None:
        case.head.zero_grad()
        hidden_NH = case.hidden_NH.detach().requires_grad_()
        IMPLEMENTATIONS[name](case, hidden_NH).backward()
        assert hidden_NH.grad is not None
        hidden_NH.grad.flatten()[0].item()  # copying one number to the CPU waits until the GPU has finished

    return seconds(forward_backward)


# --------------------------------------------------------------------------- measurements in a child process


def run_in_child(environment: Mapping[str, str], *arguments: str) -> dict[str, Any]:
    """The output of this module, run with ARGUMENTS; the user's own variables override `environment`."""
    command = module_command("pipeline.bench.loss", *arguments)
    variables = {**environment, **os.environ}
    done = subprocess.run(command, env=variables, stdout=subprocess.PIPE, text=True, check=True)
    output: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return output


def peak_bytes_in_child(name: str, num_positions: int, dtype: torch.dtype) -> float:
    """`measure_peak_bytes` of an implementation, in a child process."""
    return float(run_in_child({}, "memory", str(num_positions), dtype_name(dtype), name)["bytes"])


def child_main(measurement: str, num_positions: str, dtype: str, argument: str) -> dict[str, Any]:
    """`time` N DTYPE RUNS: {implementation: seconds of each run}. `memory` N DTYPE IMPLEMENTATION: {"bytes": peak}."""
    if measurement == "memory":
        return {"bytes": measure_peak_bytes(argument, int(num_positions), getattr(torch, dtype))}
    case = make_case(int(num_positions), dtype=getattr(torch, dtype))
    measurements = {name: functools.partial(time_forward_backward, name, case) for name in IMPLEMENTATIONS}
    return run_in_turns(measurements, runs=int(argument))


def dtype_name(dtype: torch.dtype) -> str:
    """For example "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def measure_peak_bytes(name: str, num_positions: int, dtype: torch.dtype) -> float:
    """Peak memory of one forward and backward, minus the memory before it (the inputs); gradients are included."""
    time_forward_backward(name, make_case(64, dtype=dtype))  # loads libraries, whose memory is not to be counted
    case = make_case(num_positions, dtype=dtype)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = float(torch.cuda.memory_allocated())
        time_forward_backward(name, case)
        return torch.cuda.max_memory_allocated() - before
    before = _memory_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, VmHWM
    time_forward_backward(name, case)
    return _memory_bytes("VmHWM") - before


def _memory_bytes(field: str) -> float:
    """VmRSS (memory now) or VmHWM (its peak) of this process, which Linux reports in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) * 1024 for line in lines if line.startswith(field))


if __name__ == "__main__":
    print(json.dumps(child_main(*sys.argv[1:])))
