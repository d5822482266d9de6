"""Scores against the slow way: every continuation alone, through the model's plain forward."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
import transformers

from pipeline.config.schema import EvaluateConfig, MalformedPolicy, ModelConfig, Targets, TextConfig
from pipeline.core.types import InputError
from pipeline.data.tokenize import load_labeled_sequences
from pipeline.evaluation.predictions import scores_of
from pipeline.evaluation.requests import open_evaluation_set
from pipeline.evaluation.scoring import run
from pipeline.models.tokenizer import load_tokenizer
from support.commands import script
from support.scoring import exam_of, scored
from support.tiny import prompts, text_of, write_lines


def alone(model: Any, tokenizer: Any, prompt: str, completion: str) -> list[float]:
    head, tail = tokenizer(prompt)["input_ids"], tokenizer(completion, add_special_tokens=False)["input_ids"]
    tail = [*tail, tokenizer.eos_token_id]
    with torch.no_grad():
        logits_SV = model(input_ids=torch.tensor([head + tail])).logits[0, :, : len(tokenizer)]
    log_p_SV = torch.log_softmax(logits_SV.double(), dim=1)
    return [log_p_SV[len(head) - 1 + j, token].item() for j, token in enumerate(tail)]


def test_choices_of_one_and_of_several_tokens(student: Path, tmp_path: Path) -> None:
    rows = prompts(7, labeled=True)
    rows[3]["choices"] = [" weak", " weak model", " weak model supervises", "x"]  # each begins the next
    rows[3] |= {"answer": 1, "completion": " weak model"}
    _, table = scored(student, write_lines(tmp_path / "a.jsonl", rows))
    model = transformers.AutoModelForCausalLM.from_pretrained(student).eval()
    tokenizer = load_tokenizer(student)
    for row, found in zip(rows, table.iter_rows(named=True), strict=True):
        exact = [sum(alone(model, tokenizer, row["prompt"], choice)) for choice in row["choices"]]
        assert found["choice_log_probs"] == pytest.approx(exact, abs=1e-4)
        assert found["predicted"] == max(range(len(exact)), key=exact.__getitem__)
        assert found["correct"] == (found["predicted"] == row["answer"])
        own = alone(model, tokenizer, row["prompt"], row["completion"])
        assert (found["num_targets"], found["nll_sum"]) == (len(own), pytest.approx(-sum(own), abs=1e-4))


def test_totals() -> None:
    """Four records: two with choices, of which one is right; one with a generated answer, which is wrong."""
    table = pl.DataFrame(
        {
            "predicted": [0, 2, None, None],
            "correct": [True, False, None, None],
            "num_targets": [1, 2, 3, 2],
            "nll_sum": [0.5, 1.5, 1.0, 1.0],
            "exact": [None, None, False, None],
            "teacher_predicted": [0, 1, None, None],
        }
    )
    scores = scores_of(table)
    assert (scores.num_records, scores.num_choice_records, scores.num_free_records, scores.num_targets) == (4, 2, 1, 8)
    assert (scores.accuracy, scores.exact_match, scores.agreement, scores.nll) == (0.5, 0.0, 0.5, 0.5)
    assert scores.perplexity == pytest.approx(1.6487212707)
    assert scores_of(table.drop("teacher_predicted")).agreement is None


def test_choices_of_a_chat_are_scored_as_they_are_trained(tmp_path: Path, tokenizer: Any) -> None:
    """The template has written the special tokens: neither gets the tokenizer's end token."""
    row = {"messages": [{"role": "user", "content": "the weak"}], "choices": [" one", " two"], "answer": 1}
    text = text_of(write_lines(tmp_path / "a.jsonl", [row]), "test", targets=Targets.completion, end_token=True)
    (trained,) = load_labeled_sequences(text, tokenizer, window=64)
    held_out = open_evaluation_set(text, tokenizer, longest=None, max_new_tokens=0)
    targets = {request.choice: [token for _, token in request.targets] for request in held_out.likelihoods}
    assert targets[1] == targets[None] == trained.target_ids_N.tolist()
    assert tokenizer.decode(targets[0]) == " one"


def test_plain_text_longer_than_the_batch_and_without_choices(student: Path, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": "the weak model supervises the strong one " * 3}, {"text": "a"}])
    scores, table = scored(student, path, targets=Targets.all)
    tokenizer = load_tokenizer(student)
    assert table["num_targets"][0] == len(tokenizer("the weak model supervises the strong one " * 3)["input_ids"])
    assert (scores.accuracy, scores.num_choice_records) == (None, 0)


def test_a_record_longer_than_the_model_is_refused(student: Path, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": "zq " * 300}])
    with pytest.raises(InputError, match="line 1: expected at most 256 tokens, the model's positions, found"):
        exam_of(student, path, targets=Targets.all)


BAD = {
    "nothing to score": ([{"prompt": "ab"}], {}, "expected records with targets or choices, found none"),
    "choices beside text": ([{"text": "ab", "choices": ["c"]}], {"targets": Targets.all}, "expected a prompt beside"),
    "one choice begins another": (
        [{"prompt": "a", "choices": [" weak", " weak model"]}],
        {"end_token": False},
        "expected choices of which none begins another, found such; set end_token=true",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_asked_is_refused_before_a_model_loads(name: str, student: Path, tmp_path: Path) -> None:
    rows, settings, message = BAD[name]
    with pytest.raises(InputError, match=message):
        exam_of(student, write_lines(tmp_path / "a.jsonl", rows), **settings)


def test_malformed_held_out_records_are_skipped_if_asked(student: Path, tmp_path: Path) -> None:
    rows = [*prompts(3, labeled=True), {"prompt": "zq " * 300, "completion": "x"}, "broken"]
    exam = exam_of(student, write_lines(tmp_path / "a.jsonl", rows), malformed=MalformedPolicy.skip)
    assert len(exam.records) == 3


def test_agreement_is_joined_by_content_not_by_position(student: Path, teacher: Path, tmp_path: Path) -> None:
    rows = prompts(30, labeled=True)
    _, theirs = scored(teacher, write_lines(tmp_path / "a.jsonl", rows))
    shuffled = theirs.sample(fraction=1.0, shuffle=True, seed=1)
    shuffled.write_parquet(tmp_path / "teacher.parquet")
    scores, mine = scored(student, tmp_path / "a.jsonl", teacher=str(tmp_path / "teacher.parquet"))
    assert scores.agreement == pytest.approx((mine["predicted"] == theirs["predicted"]).mean())
    theirs.head(29).write_parquet(tmp_path / "short.parquet")
    with pytest.raises(InputError, match="expected the teacher's prediction for each of 30 records, found none for 1"):
        scored(student, tmp_path / "a.jsonl", teacher=str(tmp_path / "short.parquet"))


def test_the_script_on_any_folder(student: Path, data: Path, tmp_path: Path) -> None:
    done = script(
        "evaluate",
        *(f"model.path={student}", "model.attention=null", f"text.files=[{data}/test.jsonl]", "out=scores"),
        cwd=tmp_path,
    )
    assert "accuracy" in done.stdout
    scores = json.loads((tmp_path / "scores" / "scores.json").read_text())
    assert scores["num_records"] == pl.read_parquet(tmp_path / "scores" / "predictions.parquet").height == 20


def test_a_folder_that_cannot_be_written_is_refused_before_the_model_loads(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.evaluation.scoring.open_model", lambda *_: pytest.fail("the model was loaded"))
    text = TextConfig(files=[str(write_lines(tmp_path / "a.jsonl", prompts(2, labeled=True)))])
    config = EvaluateConfig(model=ModelConfig(path=str(student)), text=text, out=str(tmp_path / "a.jsonl" / "out"))
    with pytest.raises(InputError, match="out: expected a folder to write into, found Not a directory"):
        run(config)
