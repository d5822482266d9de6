"""The place of the checks, made once, with a part of the records."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from pipeline.selftest import place as places
from pipeline.selftest.place import Place, build


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        if not torch.cuda.is_available():
            monkeypatch.setattr(places, "NUM_RECORDS", 60)
        yield build(tmp_path_factory.mktemp("selftest") / "place")
