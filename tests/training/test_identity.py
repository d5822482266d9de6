"""What makes another run, and what does not; a student that cannot be used; records that texts have in common."""

from __future__ import annotations

import copy
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from pipeline.core.types import InputError
from pipeline.data.text_files import open_text
from pipeline.models.tokenizer import open_tokenizer
from pipeline.training import inputs
from pipeline.training.driver import prepare
from pipeline.training.identity import identity_of
from pipeline.training.options_read import options_read
from support.commands import capture_arguments, composed, script, train_arguments
from support.tiny import prompts, write_lines


def identity_with(student: Path, data: Path, cache: Path, **changes: Any) -> dict[str, Any]:
    return identity_of(composed("train", *train_arguments(student, data, str(cache), **changes)))[0]


def test_code_is_part_of_the_identity_where_it_is_run(student: Path, data: Path, cache: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(student, tmp_path / "student"))
    plain = identity_with(folder, data, cache)
    assert plain.keys() == {"options", "student", "cache", "gold"}
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


@pytest.fixture(scope="module")
def wider(tmp_path_factory: pytest.TempPathFactory, teacher: Path, data: Path) -> Path:
    """A second cache, with twice the kept entries."""
    folder = tmp_path_factory.mktemp("wider")
    script("capture", *capture_arguments(teacher, data, k=16), cwd=folder)
    (found,) = folder.glob("caches/tiny-*")
    return found


def test_an_option_that_nothing_reads_makes_no_other_run(student: Path, data: Path, cache: Path, wider: Path) -> None:
    def options(**changes: Any) -> dict[str, Any]:
        return options_read(composed("train", *train_arguments(student, data, str(cache), **changes)))

    base = options()
    assert options(k=8) == base  # all that were captured
    assert options(k=3) != base
    assert options(more_caches=f"[{wider}]", k=8)["k"] == 8  # of the other cache it is a half
    assert options(more_caches=f"[{wider}]", gold_fraction=1, k=8)["k"] is None


def test_held_out_texts_are_no_part_of_it_where_they_decide_nothing(student: Path, data: Path, cache: Path) -> None:
    """Where dev chooses the exported step, it is, and nothing else of what is scored."""
    other: dict[str, Any] = {"dev__files": f"[{data}/test.jsonl]", "test__files": f"[{data}/dev.jsonl]"}
    other |= {"test__targets": "choices", "scoring__max_new_tokens": 0}
    base = identity_with(student, data, cache)
    assert identity_with(student, data, cache, **other) == base
    assert identity_with(student, data, cache, dev="null", test="null") == base
    decided = {"evaluate_every_steps": 2, "export__what": "best"}
    best = identity_with(student, data, cache, **decided)
    assert best.keys() == base.keys() | {"dev"}
    assert identity_with(student, data, cache, **decided, test="null") == best
    assert identity_with(student, data, cache, **decided, **other)["dev"] != best["dev"]
    assert identity_with(student, data, cache, evaluate_every_steps=2).keys() == base.keys()  # only logged


def test_more_entries_than_were_captured_are_refused(student: Path, data: Path, cache: Path, tmp_path: Path) -> None:
    arguments = train_arguments(student, data, str(cache), k=9)
    with pytest.raises(InputError, match="k: expected 1 to 8"):
        identity_of(composed("train", *arguments))


def warnings_of(caplog: pytest.LogCaptureFixture, arguments: list[str]) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="pipeline"):
        identity_of(composed("train", *arguments))
    return [record.getMessage() for record in caplog.records]


def test_records_in_common_are_counted(
    student: Path, data: Path, cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By what is read, whatever the choices and the spelling of the file."""
    assert warnings_of(caplog, train_arguments(student, data, str(cache))) == []
    gold = prompts(12, labeled=True, first=60)
    held_out = [{"completion": row["completion"], "prompt": row["prompt"]} for row in gold[:5]]
    test = write_lines(tmp_path / "test.jsonl", [*held_out, *prompts(3, labeled=True, first=200)])
    arguments = train_arguments(student, data, str(cache), test__files=f"[{test}]", dev__files=f"[{data}/gold.jsonl]")
    assert warnings_of(caplog, arguments) == [
        "12 of 12 records of dev are in gold too",
        "5 of 8 records of test are in gold too",
        "5 of 8 records of test are in dev too",
    ]
    # another completion of the same prompt, and a label that is a choice
    rows = [gold[0] | {"completion": " other"}, {key: gold[1][key] for key in ("prompt", "choices", "answer")}]
    arguments = train_arguments(student, data, str(cache), test__files=f"[{write_lines(test, rows)}]")
    assert warnings_of(caplog, arguments) == ["1 of 2 records of test are in gold too"]


def test_gold_is_tokenized_once_and_by_a_finished_run_not_at_all(
    student: Path, data: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_times, tokenize = 0, inputs.labeled_sequences

    def counted(*arguments: Any, **named: Any) -> Any:
        nonlocal num_times
        num_times += 1
        return tokenize(*arguments, **named)

    monkeypatch.setattr(inputs, "labeled_sequences", counted)
    config = composed("train", *train_arguments(student, data, str(cache), runs_dir=str(tmp_path / "runs")))
    prepared = prepare(config)
    assert not (tmp_path / "runs").exists()
    prepared.paths.folder.mkdir(parents=True)
    prepared.write()
    gold = inputs.load_gold(prepared.paths)
    expected = list(tokenize(open_text(config.gold, "gold"), open_tokenizer(config.student)[1], window=config.window))
    assert [gold.row(row).key for row in range(len(gold))] == [sequence.key for sequence in expected]
    assert num_times == 1
    prepared.paths.result.write_text("{}")
    assert prepare(config).paths == prepared.paths
    assert num_times == 1
