"""A machine with two GPUs that are not there: their tensors lie in host memory, and what happens to them is recorded.

Inside `FakeGpus` a tensor that is put on "cuda:1" keeps its values and only names that device. Streams, events, copies
and everything that makes the host wait for a GPU are written to `log`, in order. What no CPU can show is left out:
time, and kernels that run beside each other.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.capture import teacher

CPU = torch.device("cpu")
WAITS = ("_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "masked_select", "is_nonzero", "equal")
"""The operations of torch whose result the host has to know before it goes on."""


def gpu_of(value: Any) -> torch.device | None:
    """The GPU that a tensor is on; None for another one, and for what is no tensor."""
    return getattr(value, "fake_gpu", None)


def put(tensor: Tensor, device: torch.device | None) -> Tensor:
    """Name the device of a tensor."""
    if device is not None:
        tensor.fake_gpu = device  # type: ignore[attr-defined]
    return tensor


class Operations(TorchDispatchMode):
    """Every operation of torch below a function, by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        # reading a tensor by a mask looks for its true entries, by an operation that is not dispatched
        masks = name in ("index", "index_put_") and any(
            isinstance(one, Tensor) and one.dtype == torch.bool for one in args[1]
        )
        self.names.append("nonzero" if masks else name)
        return func(*args, **(kwargs or {}))


class FakeGpus(TorchFunctionMode):
    """While it is entered, and in this thread alone, tensors can be on a GPU."""

    def __init__(self, log: list[str]) -> None:
        super().__init__()
        self.log = log

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        gpu = next((found for leaf in inputs if (found := gpu_of(leaf)) is not None), None)
        if name == "__get__" and func in (Tensor.device.__get__, Tensor.is_cuda.__get__):  # type: ignore[attr-defined]
            is_device = func == Tensor.device.__get__  # type: ignore[attr-defined]
            return (gpu or CPU) if is_device else gpu is not None
        if name == "pin_memory":
            return args[0]
        if name in ("to", "cpu"):
            return self._moved(args[0], CPU if name == "cpu" else _device_in(args[1:], kwargs), func, args, kwargs)
        if name == "copy_" and gpu_of(args[0]) is None and gpu is not None:
            how = "" if kwargs.get("non_blocking") else ", blocking"
            self.log.append(f"copy to host{how}")
            return func(*args, **kwargs)
        kwargs.pop("pin_memory", None)
        if (named := kwargs.get("device")) is not None and torch.device(named).type == "cuda":
            kwargs["device"], gpu = CPU, torch.device(named)
        with Operations() as operations:
            result = func(*args, **kwargs)
        if gpu is not None:
            self.log += [f"wait: {one}" for one in operations.names if one in WAITS]
            if name == "tolist":
                self.log.append("wait: tolist")
        return _on(result, gpu)

    def _moved(self, tensor: Tensor, device: torch.device | None, func: Any, args: Any, kwargs: Any) -> Tensor:
        here = gpu_of(tensor)
        if device is None or (device.type != "cuda" and here is None):  # another dtype alone; or it is on no GPU
            return put(func(*args, **kwargs), here)
        if device.type == "cuda":
            if here is None:
                how = "" if kwargs.get("non_blocking") else ", blocking"
                self.log.append(f"copy to {device}{how}")
            return put(tensor.clone(), device)
        self.log.append("copy to host, blocking")
        return tensor.clone()


def _on(result: Any, gpu: torch.device | None) -> Any:
    if gpu is not None:
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                put(leaf, gpu)
    return result


def _device_in(args: Any, kwargs: Any) -> torch.device | None:
    found = kwargs.get("device", args[0] if args else None)
    if isinstance(found, (str, torch.device)):
        return torch.device(found)
    return found.device if isinstance(found, Tensor) else None


# --------------------------------------------------------------------------------- streams and events


@dataclass
class Stream:
    name: str
    log: list[str]

    def wait_event(self, event: Event) -> None:
        self.log.append(f"{self.name} waits for {event.name}")

    def record_event(self) -> Event:
        event = Event(log=self.log)
        event.record(self)
        return event


@dataclass
class Event:
    log: list[str]
    name: str = ""

    def record(self, stream: Stream) -> None:
        self.name = f"event {sum(line.startswith('record') for line in self.log)}"
        self.log.append(f"record {self.name} in {stream.name}")

    def synchronize(self) -> None:
        self.log.append(f"wait for {self.name}")

    def elapsed_time(self, end: Event) -> float:
        return 1.0


@dataclass
class Cuda:
    """What stands in for `torch.cuda`: two devices, of which each thread has one as its current one."""

    log: list[str] = field(default_factory=list)
    _local: threading.local = field(default_factory=threading.local)

    def current(self) -> torch.device:
        return torch.device("cuda", getattr(self._local, "index", 0))

    def set_device(self, device: torch.device) -> None:
        self._local.index = torch.device(device).index
        self.log.append(f"{threading.current_thread().name.split('_')[0]} binds {device}")

    def current_stream(self, device: torch.device | None = None) -> Stream:
        return Stream(f"the stream of {device or self.current()}", self.log)

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        self.log.append(f"enter {stream.name}")
        yield
        self.log.append(f"leave {stream.name}")


def install(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    """Put a machine with two GPUs in the place of this one's."""
    cuda = Cuda()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", cuda.set_device)
    monkeypatch.setattr(torch.cuda, "current_stream", cuda.current_stream)
    monkeypatch.setattr(torch.cuda, "stream", cuda.stream)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing=False: Event(log=cuda.log))
    # with a memory of its own: a stream of this machine must not be there on another one
    copy_stream = functools.lru_cache(teacher._copy_stream.__wrapped__)
    monkeypatch.setattr(teacher, "_copy_stream", copy_stream)
    keep = cuda.log.append
    monkeypatch.setattr(Tensor, "record_stream", lambda _, stream: keep(f"keep until {stream.name}"), raising=False)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(f"the copy stream of {device}", cuda.log))
    return cuda


def on_gpu(model: Any, device: torch.device) -> Any:
    """A model whose weights name a GPU."""
    for tensor in (*model.parameters(), *model.buffers()):
        put(tensor, device)
    return model
