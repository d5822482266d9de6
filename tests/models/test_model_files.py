"""Files of a model folder: an incomplete, truncated or foreign one ends in one line; hashes contain what decides."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import transformers

from pipeline.core.types import InputError
from pipeline.models.model_files import check_model_files, code_hash, weights_hash


@pytest.fixture
def folder(student: Path, tmp_path: Path) -> Path:
    """A copy of the student, to damage."""
    return Path(shutil.copytree(student, tmp_path / "student"))


@pytest.fixture
def sharded(student: Path, tmp_path: Path) -> Path:
    """The student with its weights in several files."""
    transformers.AutoModelForCausalLM.from_pretrained(student).save_pretrained(tmp_path / "s", max_shard_size=30_000)
    assert len(list((tmp_path / "s").glob("*.safetensors"))) > 1
    return tmp_path / "s"


def test_complete_folders_are_accepted(student: Path, sharded: Path) -> None:
    check_model_files(student)
    check_model_files(sharded)


def test_the_folder_of_a_run_names_its_model(folder: Path, tmp_path: Path) -> None:
    folder.rename(tmp_path / "model")
    with pytest.raises(InputError, match=f"found no config.json; give {tmp_path}/model"):
        check_model_files(tmp_path)


@pytest.mark.parametrize("missing_bytes", [1, 1000])
def test_a_truncated_file_is_refused(folder: Path, missing_bytes: int) -> None:
    path = folder / "model.safetensors"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-missing_bytes])
    expected = f"expected {size} bytes, as its header describes, found {size - missing_bytes}; download"
    with pytest.raises(InputError, match=expected):
        check_model_files(folder)


@pytest.mark.parametrize("content", [b"", b"short", bytes(100), b"\xff" * 100, b"\x02\0\0\0\0\0\0\0[]"])
def test_a_file_without_a_header_is_refused(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=rf"expected a header of safetensors, found none \({len(content)} bytes\)"):
        check_model_files(folder)


def test_a_pointer_of_git_lfs_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(InputError, match="expected weights, found a pointer of git-lfs; run git lfs pull"):
        check_model_files(folder)


def test_a_missing_part_of_the_weights_is_refused(sharded: Path) -> None:
    first = min(sharded.glob("*.safetensors"))
    first.unlink()
    with pytest.raises(InputError, match=rf"files of weights beside it, found \d+ \(without {first.name}\)"):
        check_model_files(sharded)
    (sharded / "model.safetensors.index.json").unlink()
    with pytest.raises(InputError, match=r"expected model.safetensors or .*index.json, found neither"):
        check_model_files(sharded)


def test_an_adapter_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="expected complete weights, found an adapter .* merge it into its base model"):
        check_model_files(folder)


def test_a_part_of_a_multimodal_model_is_refused(folder: Path) -> None:
    transformers.Gemma3Config().save_pretrained(folder)
    with pytest.raises(InputError, match="expected a language model, found gemma3, whose language model is a part"):
        check_model_files(folder)


def test_a_config_that_is_no_json_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text("<html>")
    with pytest.raises(InputError, match=r"config.json: expected JSON, found none"):
        check_model_files(folder)


def test_code_is_hashed_where_it_is_run(folder: Path) -> None:
    assert code_hash(folder, trust_remote_code=True) == {}  # none there: fingerprints of before stay
    (folder / "modeling.py").write_text("a = 1")
    (folder / "parts").mkdir()
    (folder / "parts" / "more.py").write_text("b = 1")
    assert code_hash(folder, trust_remote_code=False) == {}
    before, weights = code_hash(folder, trust_remote_code=True), weights_hash(folder)
    (folder / "parts" / "more.py").write_text("b = 2")
    after = code_hash(folder, trust_remote_code=True)
    assert before.keys() == after.keys() == {"remote_code"}
    assert before != after
    assert weights_hash(folder) == weights


def test_code_of_another_repository_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "owner/name--modeling.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="expected code in the same folder, found code of another repository"):
        code_hash(folder, trust_remote_code=True)
    assert code_hash(folder, trust_remote_code=False) == {}
