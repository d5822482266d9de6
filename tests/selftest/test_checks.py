"""Each check of the self-test passes where all is right and fails where something is wrong, also on fake GPUs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pipeline.capture import teacher
from pipeline.config.schema import Dtype
from pipeline.core.files import RunPaths
from pipeline.core.types import Captured, InputError
from pipeline.models.compatibility import check_packing
from pipeline.selftest import capture_checks, model_checks, speed_checks, training_checks
from pipeline.selftest.memory import RunSize, forecast
from pipeline.selftest.outcomes import Finding, Outcome
from pipeline.selftest.place import Place, missing_gpus, open_place_model
from support import fake_gpu

PASS, FAIL, SKIPPED = Outcome.PASS, Outcome.FAIL, Outcome.SKIPPED
CPU = torch.device("cpu")


@pytest.fixture
def two_gpus(place: Place, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Two GPUs that are not there; what happens on them, in order."""
    loaded = open_place_model(place, CPU, Dtype.float32)
    cuda = fake_gpu.install(monkeypatch)

    def opened(place: Place, device: torch.device, dtype: Dtype, *, attention: str | None = None) -> Any:
        if device.type == "cpu":
            return open_place_model(place, device, dtype, attention=attention)
        return fake_gpu.on_gpu(loaded, device)

    monkeypatch.setattr(capture_checks, "open_place_model", opened)
    monkeypatch.setattr(capture_checks, "BUSY_SIZE", 8)
    capture_checks.captured_on.cache_clear()
    expected = capture_checks.captured_on(place, CPU, Dtype.float32)
    monkeypatch.setattr(capture_checks, "captured_on", remembered(capture_checks.captured_on, expected))
    with fake_gpu.FakeGpus(cuda.log):
        yield cuda.log


def remembered(captured_on: Any, on_cpu: Captured) -> Any:
    """A model cannot be loaded among fake GPUs, so what the CPU captures is known before."""
    return lambda place, device, dtype: on_cpu if device.type == "cpu" else captured_on(place, device, dtype)


# ------------------------------------------------------------------------------------------ stage one


def test_a_second_gpu_is_compared_with_the_cpu(place: Place, two_gpus: list[str]) -> None:
    finding = capture_checks.other_gpu(place, Dtype.float32)
    assert finding.outcome is PASS, finding.figures
    assert "copy to cuda:1" in two_gpus
    assert not [line for line in two_gpus if "cuda:0" in line]


def test_one_row_of_another_batch_is_found(place: Place, two_gpus: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """All but one of some ten thousand positions are right: ids and mean are within their limits."""
    right = capture_checks.captured_on

    def stale(place: Place, device: torch.device, dtype: Dtype) -> Captured:
        captured = right(place, device, dtype)
        if device.type == "cpu":
            return captured
        wrong_N = captured.next_log_prob_N.clone()
        wrong_N[100] = wrong_N[100] - 3
        return dataclasses.replace(captured, next_log_prob_N=wrong_N)

    monkeypatch.setattr(capture_checks, "captured_on", stale)
    finding = capture_checks.gpu(place, Dtype.bfloat16)
    assert finding.outcome is FAIL
    assert "3 at most (1)" in finding.figures


def test_copies_beside_the_next_forward_are_compared_to_the_last_bit(
    place: Place, two_gpus: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    finding = capture_checks.copies(place)
    num_batches = len(list(place.batches()))
    assert finding == Finding(outcome=PASS, figures=f"cuda:1: 0 of {num_batches} batches differ (0)")
    assert sum(line.startswith("wait for event") for line in two_gpus) == num_batches
    first_wait = next(i for i, line in enumerate(two_gpus) if line.startswith("wait for event"))
    assert two_gpus[:first_wait].count("enter the copy stream of cuda:1") == num_batches  # no wait between batches

    def unchanged(column: torch.Tensor, *, stream: Any) -> torch.Tensor:
        return torch.zeros(column.shape, dtype=column.dtype)

    monkeypatch.setattr(teacher, "_copy_to_pinned", unchanged)  # a host that reads before the copy
    assert capture_checks.copies(place).outcome is FAIL


def test_the_cpu_in_bfloat16_is_near_itself(place: Place) -> None:
    finding = capture_checks.cpu(place)
    assert finding.outcome is PASS, finding.figures


# ------------------------------------------------------------------------------------------ the model


@pytest.mark.parametrize("kernel", [None, model_checks.EAGER, model_checks.SDPA])
def test_segments_that_read_each_other_are_found(
    kernel: str | None, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = model_checks.hidden_states
    finding = model_checks.packing(place, kernel)
    assert finding.outcome is PASS, finding.figures

    def leaking(model: Any, ids_BS: torch.Tensor, positions_BS: torch.Tensor) -> torch.Tensor:
        return right(model, ids_BS, torch.arange(ids_BS.shape[1]).expand(positions_BS.shape))  # as one text

    monkeypatch.setattr(model_checks, "hidden_states", leaking)
    assert model_checks.packing(place, kernel).outcome is FAIL


def test_the_projects_own_check_of_packing_is_asked(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(model_checks, "check_packing", lambda model: asked.append(check_packing(model)))
    model_checks.packing(place, model_checks.SDPA)
    assert asked == [None]


def test_a_fused_head_with_a_wrong_gradient_is_found(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    finding = model_checks.fused_head(place, Dtype.float32)
    assert finding.outcome is PASS, finding.figures
    right = model_checks.combined_loss

    def wrong(*arguments: Any, fused: bool, **options: Any) -> Any:
        loss, sums = right(*arguments, fused=fused, **options)
        return (loss + 1e-3 * (loss - loss.detach()) if fused else loss), sums

    monkeypatch.setattr(model_checks, "combined_loss", wrong)  # the loss is right
    assert model_checks.fused_head(place, Dtype.float32).outcome is FAIL


# ------------------------------------------------------------------------------------------ stage two


def runs(folder: Path, **losses: list[float]) -> Any:
    """Stands in for `trained`: run folders by ZeRO stage, with these losses."""
    found = {}
    for name, values in losses.items():
        paths = RunPaths(folder=folder / name)
        paths.model.mkdir(parents=True)
        paths.metrics.write_text("".join(json.dumps({"step": i, "loss": loss}) + "\n" for i, loss in enumerate(values)))
        found[int(name.removeprefix("zero"))] = paths
    return lambda place, stage, offload=None: found[stage]


def test_a_zero_stage_with_other_losses_is_found(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = runs(tmp_path, zero0=[2.0, 1.0], zero1=[2.0, 1.00001], zero3=[2.0, 1.001])
    monkeypatch.setattr(training_checks, "trained", trained)
    assert training_checks.zero(place, 1).outcome is PASS
    assert training_checks.zero(place, 3).outcome is FAIL


def test_a_head_that_is_exported_twice_is_found(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = runs(tmp_path, zero0=[1.0], zero1=[1.0], zero2=[1.0], zero3=[1.0])
    monkeypatch.setattr(training_checks, "trained", trained)
    matrices = {"embed": torch.zeros(9, 4), "layer": torch.zeros(4, 4)}
    for stage in (0, 1, 2, 3):
        save_file(matrices, trained(place, stage).model / "model.safetensors")
    assert training_checks.tied_head(place).outcome is PASS
    save_file(matrices | {"lm_head": torch.zeros(9, 4)}, trained(place, 3).model / "model.safetensors")
    finding = training_checks.tied_head(place)
    assert finding.outcome is FAIL
    assert "ZeRO 3: 2 times" in finding.figures


@pytest.mark.parametrize(("error", "code", "outcome"), [(0, 0, PASS), (1, 0, FAIL), (0, 1, FAIL)])
def test_a_wrong_sum_or_a_rank_that_ends_is_found(
    error: float, code: int, outcome: Outcome, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = json.dumps({"error": error, "bytes_per_second": 1e9}) + "\n"
    done = SimpleNamespace(returncode=code, stdout=output, stderr="NCCL failed")
    monkeypatch.setattr(training_checks.subprocess, "run", lambda *_, **__: done)
    monkeypatch.setattr(training_checks, "missing_gpus", lambda needed: None)
    finding = training_checks.all_reduce(place)
    assert finding.outcome is outcome
    assert ("NCCL failed" in finding.figures) == bool(code)


@pytest.mark.slow(minutes=1)
def test_two_processes_sum(place: Place) -> None:
    finding = training_checks.all_reduce(place)
    assert finding.outcome is PASS, finding.figures


@pytest.mark.parametrize(
    ("speed", "mfu", "outcome"), [(5.0, 0.4, PASS), (5.0, None, PASS), (5.0, 1.2, FAIL), (0.0, None, FAIL)]
)
def test_a_speed_above_the_peak_is_an_error(speed: float, mfu: float | None, outcome: Outcome, place: Place) -> None:
    assert speed_checks.shown(speed, mfu, place, CPU).outcome is outcome


# ------------------------------------------------------------------------------------------ memory


def run_size(**changes: Any) -> RunSize:
    nothing_else: dict[str, Any] = {"tokens": 0, "hidden": 0, "layers": 0, "head_bytes": 0}
    nothing_else |= {"offloads": False, "accumulates": False}
    return RunSize(**{"parameters": 1000, "zero_stage": 0, "ranks": 4, "is_half": True, **nothing_else, **changes})


def test_the_forecast_is_the_papers() -> None:
    """Rajbhandari et al., figure 1: 16 bytes a parameter at first; 4 + 12 / N, 2 + 14 / N, 16 / N at ZeRO 1, 2, 3."""
    by_stage = [forecast(run_size(zero_stage=stage)) for stage in (1, 2, 3)]
    assert by_stage == [4000 + 12_000 // 4, 2000 + 14_000 // 4, 16_000 // 4]
    assert forecast(run_size(zero_stage=1, ranks=1)) == 16_000
    assert forecast(run_size(zero_stage=2, accumulates=True)) == 2000 + 14_000 // 4 + 4000 // 4  # sums in float32
    assert forecast(run_size(is_half=False)) == 16_000  # 4 + 4 + 8: no second copy of the weights


def test_offload_leaves_weights_and_gradients() -> None:
    assert forecast(run_size(zero_stage=2, offloads=True)) == 2000 + 500
    assert forecast(run_size(zero_stage=3, offloads=True)) == 500


def test_activations_and_head_are_added() -> None:
    more = forecast(run_size(tokens=100, hidden=8, layers=2, head_bytes=7)) - forecast(run_size())
    assert more == 34 * 100 * 8 * 2 + 7


def test_a_peak_far_from_the_forecast_fails(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = forecast(speed_checks.run_size(place, zero_stage=1))
    monkeypatch.setattr(speed_checks, "missing_gpus", lambda needed: None)
    monkeypatch.setattr(speed_checks, "larger", lambda place: place)
    monkeypatch.setattr(speed_checks, "trained", lambda place, stage: None)
    for factor, outcome in ((1.5, PASS), (2.5, FAIL), (0.4, FAIL)):
        rows = [{"peak_memory_bytes": expected * factor}]
        monkeypatch.setattr(speed_checks, "steps_of", lambda _, rows=rows: rows)
        assert speed_checks.memory(place).outcome is outcome


# ------------------------------------------------------------------------------------------ reasons


def test_what_a_machine_lacks_is_the_reason(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert (missing_gpus(1), missing_gpus(2)) == ("no GPU", "no GPU")
    skipping = [capture_checks.copies, speed_checks.memory]
    assert [check(place).outcome for check in skipping] == [SKIPPED] * 2
    assert model_checks.why_not(model_checks.FLASH) == "no GPU"
    assert model_checks.why_not(model_checks.SDPA) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert (missing_gpus(1), missing_gpus(2)) == (None, "one GPU")
    assert capture_checks.other_gpu(place, Dtype.bfloat16) == Finding(outcome=SKIPPED, figures="one GPU")
    assert training_checks.all_reduce(place) == Finding(outcome=SKIPPED, figures="one GPU")
    monkeypatch.setattr(model_checks.importlib.util, "find_spec", lambda name: None)
    assert model_checks.why_not(model_checks.FLASH) == "package flash_attn is not installed"
    assert model_checks.why_not(model_checks.FLEX) is None


def test_a_leak_that_the_projects_check_finds_is_an_input_error(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(model: Any) -> None:
        raise InputError("segments attend to each other")

    monkeypatch.setattr(model_checks, "check_packing", refuses)
    with pytest.raises(InputError):  # which `row_of` makes a FAIL
        model_checks.packing(place, model_checks.SDPA)
