"""The benchmarks measure what they claim, and write their figures under stable keys."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from pipeline.bench import cli as bench
from pipeline.bench import fidelity as bench_fidelity
from pipeline.bench import loss as bench_loss
from pipeline.bench import loss_implementations, loss_precision
from pipeline.bench import read as bench_read
from pipeline.bench.fidelity import Outputs, Scheme, bytes_per_token, full_logit_gradients, head_gradient, renormalised
from pipeline.bench.loss_implementations import Case
from pipeline.bench.timing import Figure, format_figure, ratios, run_in_turns, summarize, table
from pipeline.cache import shards
from pipeline.core.types import UNKNOWN_TARGET
from pipeline.data.packing import Segment, make_sequence
from support.commands import ROOT


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The tensors of these tests are small: with more threads, most of the time is spent on waiting for a core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("warm_up", [True, False])
def test_measurements_take_turns_and_the_warm_up_round_is_not_counted(warm_up: bool) -> None:
    calls: list[str] = []

    def measure(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    values = run_in_turns({name: partial(measure, name) for name in "abc"}, runs=5, warm_up=warm_up)
    rounds = [calls[first : first + 3] for first in range(0, len(calls), 3)]
    skipped = 1 if warm_up else 0
    assert [sorted(order) for order in rounds] == [["a", "b", "c"]] * (5 + skipped)
    assert len({order[0] for order in rounds}) > 1  # the order differs between rounds
    assert values["b"] == [1.0 + 3 * turn + order.index("b") for turn, order in enumerate(rounds)][skipped:]


def test_figures_are_medians_with_their_range() -> None:
    assert summarize([3.0, 1.0, 2.0]) == Figure(median=2.0, min=1.0, max=3.0, runs=3)
    assert ratios([3.0, 5.0], [4.0, 6.0]) == summarize([0.75, 5 / 6])
    assert format_figure(summarize([3.0, 1.0, 2.5])) == "2.5 (1 to 3, 3 runs)"


def test_a_table_is_aligned() -> None:
    assert table("title", [["a", "bb"], ["ccc", "d"]]) == "title\n  a    bb\n  ccc  d"


@pytest.fixture(scope="module")
def outputs() -> Outputs:
    """A vocabulary of 400 tokens and a hidden size of 12; the student's logits are the teacher's plus noise."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(400, (301,), generator=generator).tolist()
    targets = tuple((s, ids[s + 1]) for s in range(300))
    sequence = make_sequence([Segment(record_id=0, ids=tuple(ids), targets=targets)])
    teacher_NV = torch.randn(300, 400, generator=generator) * 3
    return Outputs(
        sequences=[sequence],
        targets_N=sequence.target_ids_N,
        hidden_NH=torch.randn(300, 12, generator=generator),
        student_NV=teacher_NV + torch.randn(300, 400, generator=generator),
        teacher_NV=teacher_NV,
    )


def test_the_gradient_approaches_the_full_one_as_k_grows_and_equals_it_for_all_entries(outputs: Outputs) -> None:
    full_VH = head_gradient(outputs, full_logit_gradients(outputs, 1.0))
    rows = [bench_fidelity.measure(Scheme(name=str(k), k=k), outputs, full_VH) for k in (4, 40, 400)]
    angles = [float(row["angle_degrees"]) for row in rows]
    assert angles[0] > angles[1] > angles[2]
    assert angles[2] < 0.2  # rounding to fp16
    assert float(rows[2]["norm_ratio"]) == pytest.approx(1, abs=1e-3)
    without_tail = Scheme(name="renormalised", k=4, read=renormalised)
    assert float(bench_fidelity.measure(without_tail, outputs, full_VH)["angle_degrees"]) > angles[0]


def test_random_draws_have_deviation_and_no_bias(outputs: Outputs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_fidelity, "NUM_TRIALS", 40)
    full_VH = head_gradient(outputs, full_logit_gradients(outputs, 1.0))
    row = bench_fidelity.measure(Scheme(name="sampled", kind="sampled", draws=10), outputs, full_VH)
    assert float(row["deviation_fraction"]) > 0.3
    assert float(row["bias_fraction"]) < 0.2 * float(row["deviation_fraction"])


def test_bytes_grow_with_the_number_of_kept_entries(outputs: Outputs) -> None:
    sizes = [bytes_per_token(outputs, Scheme(name=str(k), k=k)) for k in (4, 16, 64)]
    assert sizes[0] < sizes[1] < sizes[2]
    assert 2 * 48 < sizes[2] - sizes[1] < 4.2 * 48


def test_the_implementations_of_the_loss_agree() -> None:
    """In fp64 the three cross entropies are equal, and so are ours with and without fusing; KD adds a positive term."""
    case = loss_precision.to_double(loss_implementations.make_case(32, vocabulary=2048, k=16, dtype=torch.float32))
    losses = loss_implementations.IMPLEMENTATIONS.items()
    values = {name: loss(case, case.hidden_NH).item() for name, loss in losses}
    assert values["linear_cross_entropy"] == pytest.approx(values["cross entropy"])
    assert values["the same in chunks of 1,024"] == pytest.approx(values["cross entropy"])
    unfused = loss_implementations.ours(case, case.hidden_NH, fused=False).item()
    assert values["ours"] == pytest.approx(unfused)
    assert min(values["ours"], values["KD + CE"]) > values["cross entropy"]


def test_the_loss_benchmark_writes_all_its_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """The complete part, in this process and with a vocabulary of 2,048 tokens."""

    def make_small_case(num_positions: int, *, dtype: torch.dtype, fraction: float = 1.0, **sizes: int) -> Case:
        return loss_implementations.make_case(num_positions, vocabulary=2048, k=16, dtype=dtype, fraction=fraction)

    def run_here(environment: dict[str, str], *arguments: str) -> dict[str, Any]:
        output = bench_loss.child_main(*arguments)
        if "bytes" in output:
            output["bytes"] = max(output["bytes"], 1.0)  # 0 in this process, which reuses freed memory
        return output

    monkeypatch.setattr(bench_loss, "make_case", make_small_case)
    monkeypatch.setattr(loss_precision, "make_case", make_small_case)
    monkeypatch.setattr(bench_loss, "run_in_child", run_here)
    monkeypatch.setattr(bench_loss, "keep_allocator_memory", lambda: None)  # it would last for the other tests
    results = bench_loss.run(quick=True)
    alternatives = ("cross_entropy", "linear_cross_entropy", "chunked_linear_cross_entropy", "plain_kd")
    assert results.keys() == {
        *(f"loss.time_ratio_to_{name}" for name in alternatives),
        *(f"loss.time_ratio_to_{name}_with_kept_memory" for name in alternatives),
        *(f"loss.weight_gradient_error.{name}" for name in ("ours", "linear_cross_entropy", "cross_entropy")),
        "loss.memory_ratio",
        "loss.time_fraction_at_a_tenth",
        "loss.growth",
    }
    error, growth = results["loss.weight_gradient_error.ours"], results["loss.growth"]
    assert isinstance(error, Figure)
    assert 0 < error.median < 2e-2
    assert isinstance(growth, list)
    assert [(row["vocabulary"], row["k"]) for row in growth] == [(32_768, 64), (49_152, 64), (49_152, 8), (49_152, 64)]


def test_only_the_given_fraction_of_the_positions_has_targets() -> None:
    batch = loss_implementations.make_case(40, dtype=torch.float32, fraction=0.1).batch
    assert (batch.target_ids_N != UNKNOWN_TARGET).tolist() == [True] * 4 + [False] * 36
    assert batch.weak_N.tolist() == [True] * 4 + [False] * 36
    assert batch.teacher is not None
    assert len(batch.teacher.ids_NK) == 4


def test_reading_is_measured_over_every_target(tmp_path: Path) -> None:
    """An epoch reads each target once, and its distribution; 12 sequences are not a multiple of the batch size, 8."""
    num_targets = bench_read.write_cache(tmp_path / "cache", num_sequences=12)
    assert num_targets == 12 * 511
    assert bench_read.read_epoch(tmp_path / "cache") == num_targets


def test_memory_is_flat_over_epochs_of_random_access(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader keeps one decoded row group of about forty, so a third epoch needs no more memory than the first."""
    monkeypatch.setattr(shards, "ROW_GROUP_BYTES", 1 << 19)
    bench_read.write_cache(tmp_path / "cache", num_sequences=160)
    reader, chance = shards.ShardReader(tmp_path / "cache"), random.Random(0)
    places = [(block, row) for block, num_rows in enumerate(reader.blocks) for row in range(num_rows)]
    assert len(reader.blocks) > 30
    peaks = []
    for _ in range(3):
        blocks = chance.sample(range(len(reader.blocks)), len(reader.blocks))
        for block, row in sorted(places, key=lambda place: blocks[place[0]]):
            reader.row(block, row)
        peaks.append(psutil.Process().memory_info().rss)
    assert peaks[2] < peaks[0] + (16 << 20)  # one epoch that stayed in memory would be 31 MB


def test_parts_and_keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The command with two parts that do no work."""
    monkeypatch.setattr(
        bench, "PARTS", {"read": lambda quick: {"read.x": summarize([1.0, 2.0, 4.0])}, "b": lambda q: {"f": []}}
    )
    monkeypatch.setattr(sys, "argv", ["bench", "--quick", "--json", str(tmp_path / "b.json")])
    bench.main()
    assert json.loads((tmp_path / "b.json").read_text()) == {
        "read.x": {"median": 2.0, "min": 1.0, "max": 4.0, "runs": 3},
        "f": [],
    }


def test_an_unknown_part_is_rejected(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "reed"])
    with pytest.raises(SystemExit) as exit_info:
        bench.main()
    assert exit_info.value.code == 2
    message = "expected any of capture, read, pool, fidelity, rerun, loss, step, train, found reed"
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
@pytest.mark.alone
def test_the_quick_bench_of_real_models(tmp_path: Path) -> None:
    """The command on SmolLM2 and real text; the bounds are loose, so that a noisy machine does not break them."""
    out = tmp_path / "bench.json"
    subprocess.run([str(ROOT / "scripts" / "bench"), "--quick", "--json", str(out)], check=True, timeout=900)
    results = json.loads(out.read_text())
    keys = ["capture.ratio_to_forward", "capture.ratio_to_plain_script", "read.tokens_per_second", "rerun.seconds"]
    keys += ["pool.logarithmic.memory.tokens_per_second", "pool.linear.command.tokens_per_second"]
    keys += [f"loss.time_ratio_to_{other}" for other in ("cross_entropy", "linear_cross_entropy", "plain_kd")]
    keys += ["loss.memory_ratio", "step.time_ratio_to_lm", "step.time_ratio_to_online"]
    keys += ["train.time_ratio_to_bare_loop", "train.data_wait_fraction"]
    for key in keys:
        assert results[key]["min"] <= results[key]["median"] <= results[key]["max"]
    assert results["capture.ratio_to_forward"]["median"] > 0.75
    assert results["capture.ratio_to_plain_script"]["median"] > 1
    assert results["rerun.seconds"]["median"] < 4
    assert results["loss.time_fraction_at_a_tenth"]["median"] < 0.5
    assert results["loss.weight_gradient_error.ours"]["median"] < 2e-2
    assert results["step.time_ratio_to_lm"]["median"] < 1.3
    assert results["train.time_ratio_to_bare_loop"]["median"] < 1.25
    assert results["train.data_wait_fraction"]["median"] < 0.05
    angles = {row["kind"]: row["angle_degrees"] for row in results["fidelity"]}
    assert angles["topk 8"] > angles["topk 32"] > angles["topk 64"]
    assert angles["peers: top 64 renormalised"] > 5 * angles["topk 64"]
