"""An unlabeled corpus that holds its labels: the plan warns of it with a count and a remedy that works."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest

from pipeline.capture.plan import make_plan
from pipeline.capture.plan_lookup import plan_folder
from pipeline.config.schema import ColumnsConfig, MalformedPolicy, Targets, TextConfig
from support.commands import config_of
from support.tiny import prompts, write_lines

UNREAD = ColumnsConfig(completion="unused", answer="unused")


def planned(teacher: Path, rows: list[dict[str, Any]], folder: Path, **text: Any) -> None:
    config = config_of(teacher, write_lines(folder / "corpus.jsonl", rows), folder / "caches")
    config = dataclasses.replace(config, corpus=TextConfig(files=config.corpus.files, **text))
    make_plan(config, plan_folder(config))


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Any:
    logging.getLogger("pipeline").propagate = True
    caplog.set_level(logging.WARNING)
    return lambda: [record.getMessage() for record in caplog.records if "known answer" in record.getMessage()]


ROWS = [*prompts(6, labeled=False), *prompts(3, labeled=True, first=6), {"text": "the weak model supervises"}]
REMEDY = "corpus.columns.completion=unused corpus.columns.answer=unused"


@pytest.mark.parametrize(
    ("targets", "who_reads"),
    [
        (Targets.completion, "the teacher reads it, and students learn its tokens. "),
        (Targets.next, "the teacher does not read it, but a term can (loss.lm.on, drop_wrong). "),
        (Targets.choices, "the teacher does not read it, but a term can (loss.lm.on, drop_wrong). "),
    ],
)
def test_answers_in_the_corpus_are_counted(
    targets: Targets, who_reads: str, teacher: Path, tmp_path: Path, warnings: Any
) -> None:
    rows = ROWS[:-1] if targets is not Targets.choices else ROWS[6:-1]
    planned(teacher, rows, tmp_path, targets=targets, malformed=MalformedPolicy.skip)
    (message,) = warnings()
    assert message.startswith(f"corpus: 3 of {len(rows)} records have a known answer beside their prompt, ")
    assert who_reads in message
    assert message.endswith(REMEDY)


def test_the_remedy_works_and_a_corpus_without_answers_is_passed_over(
    teacher: Path, tmp_path: Path, warnings: Any
) -> None:
    planned(teacher, ROWS, tmp_path / "unread", columns=UNREAD, targets=Targets.all)
    planned(teacher, prompts(6, labeled=False), tmp_path / "prompts", targets=Targets.next)
    planned(teacher, [{"text": "the weak model supervises"}], tmp_path / "text")
    assert warnings() == []
    planned(teacher, ROWS, tmp_path / "read", targets=Targets.all)
    assert len(warnings()) == 1
