"""Scores against the slow way: every continuation alone, through the model's plain forward."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
import transformers

from pipeline.config.commands import EvaluateConfig
from pipeline.config.schema import MalformedPolicy, ModelConfig, Targets, TextConfig
from pipeline.core.types import InputError
from pipeline.data.tokenize import load_labeled_sequences
from pipeline.evaluation.predictions import scores_of, teacher_score
from pipeline.evaluation.requests import open_evaluation_set
from pipeline.evaluation.scoring import run, score
from pipeline.models.forward import hidden_states
from pipeline.models.loading import load_model
from pipeline.models.tokenizer import load_tokenizer
from support.commands import script
from support.scoring import exam_of, scored
from support.tiny import make_model, prompts, text_of, write_lines


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
        num_bytes = [len(choice.encode()) for choice in row["choices"]]
        num_tokens = [len(alone(model, tokenizer, row["prompt"], choice)) for choice in row["choices"]]
        for rule, lengths in {"_norm": num_bytes, "_norm_tokens": num_tokens}.items():
            scores = [value / length for value, length in zip(exact, lengths, strict=True)]
            assert found["predicted" + rule] == scores.index(max(scores))
            assert found["correct" + rule] == (found["predicted" + rule] == row["answer"])
        assert found["predicted"] == max(range(len(exact)), key=exact.__getitem__)
        assert found["correct"] == (found["predicted"] == row["answer"])
        own = alone(model, tokenizer, row["prompt"], row["completion"])
        assert (found["num_targets"], found["nll_sum"]) == (len(own), pytest.approx(-sum(own), abs=1e-4))


def test_totals() -> None:
    """Four records: two with choices, of which one is right; one with a generated answer, which is wrong."""
    table = pl.DataFrame(
        {
            "predicted": [0, 2, None, None],
            "correct": [True, False, None, None],  # as an earlier version wrote it
            "num_targets": [1, 2, 3, 2],
            "nll_sum": [0.5, 1.5, 1.0, 1.0],
            "exact": [None, None, False, None],
            "agreement": [1.0, 0.0, None, None],
        }
    )
    scores = scores_of(table)
    assert (scores.num_records, scores.num_choice_records, scores.num_free_records, scores.num_targets) == (4, 2, 1, 8)
    assert (scores.accuracy, scores.exact_match, scores.agreement, scores.nll) == (0.5, 0.0, 0.5, 0.5)
    assert scores.perplexity == pytest.approx(1.6487212707)
    assert scores_of(table.drop("agreement")).agreement is None
    assert (scores.num_ties, scores.accuracy_norm, scores.accuracy_norm_tokens) == (None, None, None)  # not known
    credited = {"correct": [0.5, 0.0], "correct_norm": [1.0, 0.5], "correct_norm_tokens": [0.0, 0.25]}
    tied = table.head(2).with_columns(num_tied=pl.Series([2, 1]), **{k: pl.Series(v) for k, v in credited.items()})
    scores = scores_of(tied)
    assert (scores.num_ties, scores.accuracy, scores.accuracy_norm, scores.accuracy_norm_tokens) == (
        1,
        0.25,
        0.75,
        0.125,
    )


def test_choices_of_a_chat_are_scored_as_they_are_trained(tmp_path: Path, tokenizer: Any) -> None:
    """Both as the template writes a turn of the assistant, with the template's end of turn."""
    row = {"messages": [{"role": "user", "content": "the weak"}], "choices": [" one", " two"], "answer": 1}
    text = text_of(write_lines(tmp_path / "a.jsonl", [row]), "test", targets=Targets.completion, end_token=True)
    (trained,) = load_labeled_sequences(text, tokenizer, window=64)
    held_out = open_evaluation_set(text, tokenizer, longest=None, max_new_tokens=0, end_ids=())
    targets = {request.choice: [token for _, token in request.targets] for request in held_out.likelihoods}
    assert targets[1] == targets[None] == trained.target_ids_N.tolist()
    assert tokenizer.decode(targets[0]) == " one</>"


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


# ------------------------------------------------------------------------------------- ties and the order of choices

LETTERS = list("abcdefgh")  # one token each


def with_equal_tokens(folder: Path, *pairs: str) -> Path:
    """The model with one embedding, which is its head's row too, for the two letters of each pair."""
    model, tokenizer = transformers.AutoModelForCausalLM.from_pretrained(folder), load_tokenizer(folder)
    embeddings_VH = model.get_input_embeddings().weight.detach()
    for pair in pairs:
        first, second = (tokenizer.convert_tokens_to_ids(letter) for letter in pair)
        embeddings_VH[first] = embeddings_VH[second]
    model.save_pretrained(folder)
    return folder


def lettered(choices: list[str], count: int = 16) -> list[dict[str, Any]]:
    """Records with choices of one and of several tokens, of which a letter is the answer."""
    rows = prompts(count, labeled=False)
    return [row | {"choices": choices, "answer": choices.index(LETTERS[i % 4])} for i, row in enumerate(rows)]


def test_the_order_of_the_choices_changes_no_score(tokenizer: Any, tmp_path: Path) -> None:
    """Two models with ties of their own; every order joins the same predictions of the other."""
    student = with_equal_tokens(make_model(tmp_path / "student", tokenizer, seed=3), "ab", "cd")
    teacher = with_equal_tokens(make_model(tmp_path / "teacher", tokenizer, seed=3), "ab", "ef")
    choices, found = [*LETTERS, " weak model", " one"], []
    for order in (range(10), reversed(range(10)), (3, 9, 1, 0, 8, 2, 7, 4, 6, 5)):
        permuted = [choices[i] for i in order]
        path = write_lines(tmp_path / "a.jsonl", lettered(permuted))
        _, theirs = scored(teacher, path, end_token=False)
        theirs.write_parquet(tmp_path / "theirs.parquet")
        scores, table = scored(student, path, teacher=str(tmp_path / "theirs.parquet"), end_token=False)
        by_text = [dict(zip(permuted, values, strict=True)) for values in table["choice_log_probs"]]
        found.append((scores, by_text))
        for row in table.iter_rows(named=True):
            best = [i for i, value in enumerate(row["choice_log_probs"]) if value == max(row["choice_log_probs"])]
            assert (row["predicted"], row["num_tied"]) == (best[0], len(best))
            assert row["correct"] == (1 / len(best) if row["answer"] in best else 0)
    assert found[1:] == found[:1] * 2
    scores, _ = found[0]
    assert scores.num_ties is not None
    assert 0 < scores.num_ties < 16
    assert scores.agreement is not None
    assert 0 < scores.agreement < 1


def test_a_bfloat16_model_ranks_what_its_logits_round_to_ties(student: Path, tmp_path: Path) -> None:
    """One record at a time, so that its hidden states have the same bits here and there; the head in float64."""
    choices, num_rounded = [chr(code) for code in range(33, 127)], 0
    model = load_model(student, dtype="bfloat16", device=torch.device("cpu"))
    for row in prompts(6, labeled=False):
        path = write_lines(tmp_path / "a.jsonl", [row | {"choices": choices, "answer": 0}])
        exam = exam_of(student, path, end_token=False)
        scores, table = score(model, exam, batch_tokens=300, teacher_predictions=None, log_every_seconds=60)
        ids_BS = torch.tensor([exam.likelihoods[-1].ids])
        with torch.no_grad():
            hidden_H = hidden_states(model, ids_BS, torch.arange(ids_BS.shape[1])[None])[0, -1]
            rounded_V = model.lm_head(hidden_H)
            logits_V = model.lm_head.weight.double() @ hidden_H.double()
        tokens = exam.tokenizer.convert_tokens_to_ids(choices)
        exact = logits_V[: len(exam.tokenizer)].log_softmax(0)[tokens].tolist()
        assert list(table["choice_log_probs"][0]) == pytest.approx(exact, abs=1e-5)
        assert table["predicted"][0] == exact.index(max(exact))
        assert scores.nll == pytest.approx(-exact[0], abs=1e-5)
        assert scores.num_ties == 0
        num_rounded += len(tokens) - len(rounded_V[tokens].unique())
    assert num_rounded > 15


def test_a_model_that_computes_nan_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", tokenizer, seed=1)
    broken = transformers.AutoModelForCausalLM.from_pretrained(model)
    broken.model.norm.weight.detach()[0] = float("nan")
    exam = exam_of(model, write_lines(tmp_path / "a.jsonl", lettered(LETTERS, 2)))
    with pytest.raises(InputError, match=r"a.jsonl, line 1: expected a log-probability of each choice, found NaN"):
        score(broken, exam, batch_tokens=99, teacher_predictions=None, log_every_seconds=60)


def test_predictions_of_an_earlier_version_are_read(student: Path, teacher: Path, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", prompts(30, labeled=True))
    _, theirs = scored(teacher, path)
    theirs.write_parquet(tmp_path / "new.parquet")
    theirs.select(
        *("record_id", "record_key", "answer", "predicted", pl.col("correct") == 1, "num_targets", "nll_sum"),
        *(pl.col("choice_log_probs").cast(pl.List(pl.Float32)), "generated", "exact"),
    ).write_parquet(tmp_path / "old.parquet")
    new, old = (scored(student, path, teacher=str(tmp_path / f"{name}.parquet")) for name in ("new", "old"))
    assert new[0] == old[0]
    assert new[1].equals(old[1])
    exam = exam_of(student, path)
    assert teacher_score(exam, str(tmp_path / "old.parquet")) == teacher_score(exam, str(tmp_path / "new.parquet"))


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
