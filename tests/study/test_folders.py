"""Which runs of a study's folder its report reads."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pipeline.study.driver import Teacher, folders_of


def test_the_report_is_of_one_teacher_whatever_version_wrote_its_runs(tmp_path: Path) -> None:
    """An option that no longer exists does not end a study after all its runs."""
    for name, role in (("teacher-a", "teacher"), ("teacher-b", "teacher"), ("gold_only-a", "gold_only")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.yaml").write_text(f"name: {role}\nrole: {role}\nan_option_of_yesterday: 3\n")
        (folder / "identity.json").write_text(json.dumps({}))
        (folder / "result.json").write_text("{}")
    study: Any = SimpleNamespace(file=SimpleNamespace(runs_dir=str(tmp_path)))
    teacher = Teacher(model="weak", folder=tmp_path / "teacher-b")
    assert [folder.name for folder in folders_of(study, teacher, None)] == ["gold_only-a", "teacher-b"]
