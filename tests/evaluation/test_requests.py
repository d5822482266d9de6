"""Requests of records with choices: those of the text, and the answer's tokens with `targets=choices`."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config.schema import Targets
from support.scoring import exam_of, scored
from support.tiny import prompts, write_lines

CHOICES = [" one", " two", " tail", " stream", " string"]


def test_choices_of_a_text_score_as_choices_of_each_record(student: Path, tmp_path: Path) -> None:
    """Named once for the text or in each record, with an index or a completion: the same predictions and scores."""
    lines = prompts(6, labeled=False)
    spelled = [row | {"choices": CHOICES, "answer": i % 5} for i, row in enumerate(lines)]
    named = [row | ({"answer": i} if i % 2 else {"completion": CHOICES[i]}) for i, row in enumerate(lines[:5])]
    one, two = write_lines(tmp_path / "a.jsonl", spelled[:5]), write_lines(tmp_path / "b.jsonl", named)
    expected, predictions = scored(student, one)
    found, other = scored(student, two, choices=CHOICES)
    assert found == expected
    assert found.num_choice_records == 5
    assert other.equals(predictions)


@pytest.mark.parametrize("end_token", [True, False])
def test_the_answer_in_the_tree_is_scored_as_the_completion(student: Path, tmp_path: Path, end_token: bool) -> None:
    """With `targets=choices` the known targets of a record are the answer's tokens, each once."""
    path = write_lines(tmp_path / "a.jsonl", [row | {"answer": i} for i, row in enumerate(prompts(5, labeled=False))])
    settings = {"choices": CHOICES, "end_token": end_token}
    as_completion, _ = scored(student, path, targets=Targets.completion, **settings)
    as_tree, _ = scored(student, path, targets=Targets.choices, **settings)
    assert as_tree.num_targets == as_completion.num_targets
    assert as_tree.nll == pytest.approx(as_completion.nll, rel=1e-5)
    assert as_tree.accuracy == as_completion.accuracy
    tree = exam_of(student, path, targets=Targets.choices, **settings)
    assert all(token >= 0 for request in tree.likelihoods for _, token in request.targets)
