"""What makes another run, and what does not; records that texts have in common."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.options import identity_options
from pipeline.core.files import content_hash
from pipeline.core.types import InputError
from pipeline.training.identity import identity_of, options_read
from support.commands import capture_arguments, composed, script, train_arguments
from support.tiny import prompts, write_lines


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
    assert base == identity_options(composed("train", *train_arguments(student, data, str(cache))))
    unread: list[dict[str, Any]] = [
        {"student__revision": "main"},  # the student is a folder
        {"k": 8},  # all that were captured
        {"optimizer__muon_momentum": 0.5, "optimizer__muon_learning_rate": 1},
        {"optimizer__decay_fraction": 0.5},
    ]
    for changes in unread:
        assert options(**changes) == base, changes
    read: list[dict[str, Any]] = [
        {"k": 3},
        {"student__path": "owner/name", "student__revision": "main"},
        {"optimizer__schedule": "wsd", "optimizer__decay_fraction": 0.5},
        {"optimizer__schedule": "wsd"},
        {"seed": 2},
    ]
    found = [options(**changes) for changes in read]
    assert len({content_hash(one) for one in [base, *found]}) == len(read) + 1
    gold_only: dict[str, Any] = {"gold_fraction": 1}
    assert options(**gold_only, k=3) == options(**gold_only)
    assert options(**gold_only, k=3)["k"] is None
    assert options(more_caches=f"[{wider}]", k=8)["k"] == 8  # of the other cache it is a half
    assert options(more_caches=f"[{wider}]", gold_fraction=1, k=8)["k"] is None


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
