"""The script train with another body, in this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from pipeline.config.cli import hydra_main, no_check

Train = Callable[..., tuple[int, list[int]]]


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Train:
    """Run the script train with another body; its exit code, and the seeds of the runs that began."""

    def command(
        body: Callable[[int], float | None], *arguments: str, check: Callable[[Any], None] = no_check
    ) -> tuple[int, list[int]]:
        begun = []

        def run(config: Any) -> float | None:
            begun.append(config.seed)
            return body(config.seed)

        # without the demo's files, which check_files would miss
        monkeypatch.setattr("sys.argv", ["train", "study=demo", "experiment=gold_only", *arguments])
        monkeypatch.setattr("pipeline.config.sweeps.check_files", lambda config: None)
        monkeypatch.chdir(tmp_path)
        try:
            hydra_main("train", "A story.", run, check)
        except SystemExit as ended:
            return int(ended.code or 0), begun
        finally:
            GlobalHydra.instance().clear()
            HydraConfig.instance().cfg = None
        return 0, begun

    return command
