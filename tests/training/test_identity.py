"""What names a run: the content of the student and its code; a student that cannot be used is refused for it."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from pipeline.core.types import InputError
from pipeline.training.driver import prepare
from pipeline.training.identity import identity_of
from support.commands import composed, train_arguments


def identity_with(student: Path, data: Path, cache: Path, **changes: Any) -> dict[str, Any]:
    return identity_of(composed("train", *train_arguments(student, data, str(cache), **changes)))[0]


def test_code_is_part_of_the_identity_where_it_is_run(student: Path, data: Path, cache: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(student, tmp_path / "student"))
    plain = identity_with(folder, data, cache)
    assert plain.keys() == {"options", "student", "cache", "gold", "dev", "test"}  # runs of before keep their names
    (folder / "code.py").write_text("a = 1")
    assert identity_with(folder, data, cache) == plain
    one = identity_with(folder, data, cache, student__trust_remote_code=True)
    (folder / "code.py").write_text("a = 2")
    other = identity_with(folder, data, cache, student__trust_remote_code=True)
    assert one.keys() == plain.keys() | {"remote_code"}
    assert one["remote_code"] != other["remote_code"]


def test_a_student_with_a_token_for_padding_learns_from_the_teachers_cache(
    student: Path, data: Path, cache: Path, tmp_path: Path, tokenizer: Any
) -> None:
    folder = Path(shutil.copytree(student, tmp_path / "student"))
    padded = copy.deepcopy(tokenizer)
    padded.add_special_tokens({"pad_token": "<pad>"})
    padded.save_pretrained(folder)
    assert identity_with(folder, data, cache)["cache"] == identity_with(student, data, cache)["cache"]


def test_a_student_that_cannot_be_used_is_refused(student: Path, data: Path, cache: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(student, tmp_path / "run" / "model"))
    with pytest.raises(InputError, match=f"expected a tokenizer .* found none; give {folder}"):
        identity_with(folder.parent, data, cache)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(InputError, match="bytes, as its header describes, found"):
        identity_with(folder, data, cache)


def test_the_ranks_read_the_commit_that_was_hashed(
    student: Path, data: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name of the run is the one that the same content has under another path and revision."""
    commit = "c" * 40
    folder = shutil.copytree(student, tmp_path / "snapshots" / commit)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *arguments, **options: str(folder))
    monkeypatch.chdir(tmp_path)
    of_name = prepare(composed("train", *train_arguments(Path("owner/moving"), data, str(cache))))
    of_folder = prepare(composed("train", *train_arguments(student, data, str(cache))))
    assert of_name.config.student.revision == commit
    assert json.dumps(of_name.identity) == json.dumps(of_folder.identity)
    assert of_name.paths.folder == of_folder.paths.folder
