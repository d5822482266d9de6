"""The teacher's forward on a GPU: events and copies belong to the stream of the forward, on whichever GPU it runs."""

from __future__ import annotations

import pytest
import torch

from pipeline.capture import teacher
from pipeline.core.runtime import bind_device
from pipeline.core.types import Captured, TopK


class Event:
    """A CUDA event that remembers its stream."""

    def __init__(self, *, enable_timing: bool) -> None:
        self.stream: str | None = None

    def record(self, stream: str | None = None) -> None:
        self.stream = stream or "the current stream of the current device"


def test_a_timestamp_is_recorded_in_the_stream_of_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the current stream of {device}")
    for gpu in ("cuda:0", "cuda:1"):
        assert teacher.timestamp(torch.device(gpu)).stream == f"the current stream of {gpu}"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_copy_from_the_second_gpu_waits_for_its_forward() -> None:
    """Also in a process whose current device is the first one."""
    bind_device(0)
    device = torch.device("cuda", 1)
    busy_HH = torch.randn(8192, 8192, device=device)
    values_N = torch.zeros(1000, device=device)
    torch.cuda.synchronize(device)
    started = teacher.timestamp(device)
    for _ in range(50):
        busy_HH = busy_HH @ busy_HH / 8192
    values_N += 3 + 0 * busy_HH[0, 0].nan_to_num()
    ids_NK = values_N.long()[:, None]
    top = TopK(ids_NK=ids_NK, relative_logits_NK=ids_NK.half(), log_tail_NC=ids_NK.float(), temperatures=(1.0,))
    captured = Captured(top=top, next_log_prob_N=values_N.half(), entropy_N=values_N.half())
    pending = teacher.start_copy([], captured, started)
    pending.copied.synchronize()
    assert (pending.captured.entropy_N == 3).all()
    assert pending.started.elapsed_time(pending.ended) > 0
