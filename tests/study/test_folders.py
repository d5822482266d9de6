"""Which runs of a study's folder its report reads."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pipeline.study.driver import folders_of


def make_run(folder: Path, role: str) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text(f"name: {role}\nrole: {role}\nan_option_of_yesterday: 3\n")
    (folder / "identity.json").write_text(json.dumps({}))
    (folder / "result.json").write_text("{}")
    return folder


def test_the_report_is_of_one_teacher_and_one_ceiling_whatever_version_wrote_its_runs(tmp_path: Path) -> None:
    """An option that no longer exists does not end a study after all its runs."""
    names = ("teacher-a", "teacher-b", "gold_only-a", "ceiling-a", "ceiling-b")
    runs = {name: make_run(tmp_path / name, name[:-2]) for name in names}
    study: Any = SimpleNamespace(file=SimpleNamespace(runs_dir=str(tmp_path)))

    def found(*made: str) -> list[str]:
        return [folder.name for folder in folders_of(study, [runs[name] for name in made], None)]

    assert found("teacher-b") == ["ceiling-a", "ceiling-b", "gold_only-a", "teacher-b"]
    assert found("teacher-b", "ceiling-a") == ["ceiling-a", "gold_only-a", "teacher-b"]
