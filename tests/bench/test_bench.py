"""The bench measures what it says, and its figures stand under the names that others read."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch

from pipeline.bench import cli as bench
from pipeline.bench import fidelity as bench_fidelity
from pipeline.bench import read as bench_read
from pipeline.bench.fidelity import Scene, Way, bytes_a_token, gradient, renormalised, row_of
from pipeline.bench.timing import Figure, figure, in_turn, ratios, table
from pipeline.cache import shards
from pipeline.data.packing import Segment, make_sequence
from support.commands import ROOT


def test_things_take_turns_and_the_first_round_is_not_counted() -> None:
    seen: list[str] = []

    def thing(name: str) -> float:
        seen.append(name)
        return float(len(seen))

    found = in_turn({name: partial(thing, name) for name in "abc"}, runs=5)
    rounds = [seen[first : first + 3] for first in range(0, len(seen), 3)]
    assert [sorted(one) for one in rounds] == [["a", "b", "c"]] * 6
    assert len({one[0] for one in rounds}) > 1  # nobody always follows the same one
    assert found["b"] == [1.0 + 3 * turn + one.index("b") for turn, one in enumerate(rounds)][1:]
    assert ratios([3.0, 5.0], [4.0, 6.0]) == figure([0.75, 5 / 6])
    assert figure([3.0, 1.0, 2.0]) == Figure(median=2.0, min=1.0, max=3.0, runs=3)


def test_a_table_is_aligned() -> None:
    assert table("title", [["a", "bb"], ["ccc", "d"]]) == "title\n  a    bb\n  ccc  d"


@pytest.fixture(scope="module")
def scene() -> Scene:
    """A head of 400 tokens over 12 hidden numbers; the student's logits are the teacher's and some noise."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(400, (301,), generator=generator).tolist()
    one = make_sequence([Segment(record_id=0, ids=tuple(ids), targets=tuple((s, ids[s + 1]) for s in range(300)))])
    teacher_NV = torch.randn(300, 400, generator=generator) * 3
    return Scene(
        sequences=[one],
        targets_N=one.target_ids_N,
        hidden_NH=torch.randn(300, 12, generator=generator),
        student_NV=teacher_NV + torch.randn(300, 400, generator=generator),
        teacher_NV=teacher_NV,
    )


def test_all_entries_give_the_full_gradient_and_fewer_come_near_as_k_grows(scene: Scene) -> None:
    full_VH = gradient(scene, bench_fidelity.full_differences(scene, 1.0))
    rows = [row_of(Way(name=str(k), k=k), scene, full_VH) for k in (4, 40, 400)]
    angles = [float(row["angle_degrees"]) for row in rows]
    assert angles[0] > angles[1] > angles[2]
    assert angles[2] < 0.2  # what fp16 rounds away
    assert float(rows[2]["norm_ratio"]) == pytest.approx(1, abs=1e-3)
    assert float(row_of(Way(name="p", k=4, read=renormalised), scene, full_VH)["angle_degrees"]) > angles[0]


def test_draws_deviate_and_are_not_biased(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_fidelity, "TRIALS", 40)
    full_VH = gradient(scene, bench_fidelity.full_differences(scene, 1.0))
    row = row_of(Way(name="sampled", kind="sampled", draws=10), scene, full_VH)
    assert float(row["deviation_fraction"]) > 0.3
    assert float(row["bias_fraction"]) < 0.2 * float(row["deviation_fraction"])


def test_bytes_grow_with_what_is_kept(scene: Scene) -> None:
    sizes = [bytes_a_token(scene, Way(name=str(k), k=k)) for k in (4, 16, 64)]
    assert sizes[0] < sizes[1] < sizes[2]
    assert 2 * 48 < sizes[2] - sizes[1] < 4.2 * 48


def test_reading_is_measured_over_every_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bench_read.write_cache(tmp_path / "cache", num_sequences=4) == 4 * 511
    bench_read.read_epoch(tmp_path / "cache")


def test_memory_is_flat_over_epochs_of_random_access(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forty row groups, of which a few are held: a third epoch in any order needs no more than the first."""
    monkeypatch.setattr(shards, "ROW_GROUP_BYTES", 2 << 20)
    bench_read.write_cache(tmp_path / "cache", num_sequences=600)
    reader, chance = shards.ShardReader(tmp_path / "cache"), random.Random(0)
    places = [(block, row) for block, size in enumerate(reader.blocks) for row in range(size)]
    assert len(reader.blocks) > 30
    peaks = []
    for _ in range(3):
        blocks = chance.sample(range(len(reader.blocks)), len(reader.blocks))
        for block, row in sorted(places, key=lambda place: blocks[place[0]]):
            reader.row(block, row)
        peaks.append(psutil.Process().memory_info().rss)
    assert peaks[2] < peaks[0] + (16 << 20)


def test_parts_and_keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two parts that cost nothing, through the command; then a part that does not exist."""
    monkeypatch.setattr(
        bench, "PARTS", {"read": lambda quick: {"read.x": figure([1.0, 2.0, 4.0])}, "b": lambda q: {"f": []}}
    )
    monkeypatch.setattr(sys, "argv", ["bench", "--quick", "--json", str(tmp_path / "b.json")])
    bench.main()
    assert json.loads((tmp_path / "b.json").read_text()) == {
        "read.x": {"median": 2.0, "min": 1.0, "max": 4.0, "runs": 3},
        "f": [],
    }


def test_an_unknown_part_is_refused() -> None:
    command = [sys.executable, "-m", "pipeline.bench.cli", "reed"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "expected some of capture, read, fidelity, rerun, loss, step, train, found reed" in done.stderr


@pytest.mark.slow
@pytest.mark.alone
def test_the_quick_bench_of_real_models(tmp_path: Path) -> None:
    """The command on SmolLM2 and real text; the bounds hold with room, so that a noisy machine does not break them."""
    out = tmp_path / "bench.json"
    subprocess.run([str(ROOT / "scripts" / "bench"), "--quick", "--json", str(out)], check=True, timeout=900)
    found = json.loads(out.read_text())
    keys = ["capture.ratio_to_forward", "capture.ratio_to_plain_script", "read.tokens_per_second", "rerun.seconds"]
    keys += [f"loss.time_ratio_to_{other}" for other in ("cross_entropy", "linear_cross_entropy", "plain_kd")]
    keys += ["loss.memory_ratio", "step.time_ratio_to_lm", "step.time_ratio_to_online"]
    keys += ["train.time_ratio_to_bare_loop", "train.data_wait_fraction"]
    for key in keys:
        assert found[key]["min"] <= found[key]["median"] <= found[key]["max"]
    assert found["capture.ratio_to_forward"]["median"] > 0.75
    assert found["capture.ratio_to_plain_script"]["median"] > 1
    assert found["rerun.seconds"]["median"] < 4
    assert found["loss.time_fraction_at_a_tenth"]["median"] < 0.5
    assert found["loss.weight_gradient_error.ours"]["median"] < 2e-2
    assert found["step.time_ratio_to_lm"]["median"] < 1.3
    assert found["train.time_ratio_to_bare_loop"]["median"] < 1.25
    assert found["train.data_wait_fraction"]["median"] < 0.05
    angles = {row["kind"]: row["angle_degrees"] for row in found["fidelity"]}
    assert angles["topk 8"] > angles["topk 32"] > angles["topk 64"]
    assert angles["peers: top 64 renormalised"] > 5 * angles["topk 64"]
