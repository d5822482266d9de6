"""The same update however a global batch is split: accumulation, ranks, ZeRO stages, gold and corpus on ranks apart."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from support.commands import ROOT


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_one_update_however_it_is_split(dtype: str, tmp_path: Path) -> None:
    """Accumulation 1, 2, 4 x ranks 1, 2 x ZeRO 0 to 3 x two ways to deal the sequences; ragged, some without targets.

    fp32: 2e-5 of the update, the order of sums. bf16: each weight within one unit in the last place of its tensor's
    largest, 2^-7, because one rounding may fall the other way, and all together within half a unit, 2^-9 of their size.
    """
    found = updates(tmp_path, dtype, 1) | updates(tmp_path, dtype, 2)
    assert len(found) == 2 * 2 * 4 * 3
    for layout in ("striped", "apart"):
        start = torch.load(tmp_path / f"{layout}.start", weights_only=True)
        reference = found[f"1-{layout}-zero0-accumulation1"]
        update = max(norm(reference[name], start[name]) for name in start)
        assert update > 0.1  # something was learnt
        for case in [case for case in found if f"-{layout}-" in case]:
            for name, weight in reference.items():
                if dtype == "float32":
                    assert norm(found[case][name], weight) <= 2e-5 * update, (case, name)
                else:
                    most = 2**-7 * float(weight.abs().max())
                    assert float((found[case][name] - weight).abs().max()) <= most, (case, name)
            together = norm(flat(found[case]), flat(reference))
            assert together <= 2**-9 * float(flat(reference).norm()) < 0.1 * norm(flat(reference), flat(start)), case


def test_float16_takes_the_steps_of_float32(tmp_path: Path) -> None:
    """ZeRO 1 to 3, loss scaled by 1,024: within 1 % of the update and half a unit in the last place of the weights.

    Without the scale the smallest gradients of the head would vanish: in float16 what is under 6e-8 is 0.
    """
    half = updates(tmp_path, "float16", 1)
    assert len(half) == 2 * 3
    for case, weights in half.items():
        layout = case.split("-")[1]
        start, expected = (flat(torch.load(tmp_path / f"{layout}.{name}")) for name in ("start", "reference"))
        found = flat(weights)
        assert norm(found, expected) < 0.01 * norm(expected, start) + 2**-11 * norm(expected, torch.zeros(())), case


@pytest.mark.slow
def test_micro_batches_are_summed_in_float32(tmp_path: Path) -> None:
    """64 micro-batches in bfloat16: the update of their gradients' exact sum.

    Summed in bfloat16 it was off by 0.7 % (0.8 % at ZeRO 2 and 3 with two ranks). These two stages reduce after each
    micro-batch, in bfloat16: with several ranks each sum over ranks is rounded. One batch's own gradient is as well.
    """
    for ranks in (1, 2):
        torchrun(ranks, "accumulation_worker.py", str(tmp_path))
    found = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert len(found) == 2 * 4
    for case, distance in found.items():
        assert distance["exact"] < (2e-3 if case in ("2-2", "2-3") else 2e-6), case
        assert distance["one batch"] < 2**-8, case


def updates(folder: Path, dtype: str, ranks: int) -> dict[str, dict[str, torch.Tensor]]:
    """The weights after gradient_worker.py's two steps, by case."""
    torchrun(ranks, "gradient_worker.py", str(folder), dtype)
    return {path.stem: torch.load(path, weights_only=True) for path in folder.glob(f"{ranks}-*.pt")}


def torchrun(ranks: int, worker: str, *arguments: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += [str(ROOT / "tests" / "support" / worker), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-5000:]


def norm(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.float() - other.float()).norm())


def flat(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([weights[name].float().flatten() for name in sorted(weights)])
