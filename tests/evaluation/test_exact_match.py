"""Exact match: what a model says after a prompt is what transformers' own generation says, compared with care."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import transformers

from pipeline.config.schema import Targets
from pipeline.core.types import InputError
from pipeline.data.text_files import Text
from pipeline.evaluation.predictions import teacher_score
from pipeline.evaluation.requests import EvaluationSet, check_generation_requests, open_evaluation_set
from pipeline.models.generation import batches_by_length
from pipeline.models.tokenizer import end_token_ids, load_tokenizer
from pipeline.training.held_out import ScoreKey
from support.commands import prepare_run, run_ranks, script, train_arguments
from support.scoring import exam_of, scored
from support.tiny import LINES, make_model, make_tokenizer, text_of, write_lines

PROMPTS = ["the weak", "a shard exists only if", "gold", "position s has read", *LINES, "speaks", "zero to s and"]


def generated(folder: Path, prompt: str, count: int) -> list[int]:
    """One prompt alone, through plain `generate`."""
    model, tokenizer = transformers.AutoModelForCausalLM.from_pretrained(folder).eval(), load_tokenizer(folder)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    forbidden = list(range(len(tokenizer), model.config.vocab_size))  # padding rows of the head say nothing
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.eos_token_id}
    return model.generate(ids, max_new_tokens=count, do_sample=False, suppress_tokens=forbidden, **ends)[
        0, ids.shape[1] :
    ].tolist()


@pytest.fixture(scope="module")
def speaker(student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny student with an end token that it does say, sooner after some prompts than after others."""
    counts = Counter(token for prompt in PROMPTS for token in set(generated(student, prompt, 12)[1:]))
    token = next(token for token, count in counts.most_common() if 2 < count < len(PROMPTS))
    tokenizer = make_tokenizer()
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(token)
    return make_model(tmp_path_factory.mktemp("speaker") / "model", tokenizer, seed=1)


def test_answers_are_transformers_own_whatever_the_batch(speaker: Path, tmp_path: Path) -> None:
    """Prompts of many lengths together, padded at the left and cached, against one at a time."""
    tokenizer = load_tokenizer(speaker)
    theirs = [generated(speaker, prompt, 12) for prompt in PROMPTS]
    lengths = {len(ids) for ids in theirs}
    assert len(lengths) > 2  # some ended by the end token, some by the number
    assert 12 in lengths
    texts = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in theirs]
    # every other completion is what the model says, with other spaces around it
    completions = [f"  {text}\n" if i % 2 else f"{text}x" for i, text in enumerate(texts)]
    rows = [{"prompt": p, "completion": c} for p, c in zip(PROMPTS, completions, strict=True)]
    path = write_lines(tmp_path / "a.jsonl", rows)
    for batch_tokens in (1, 60, 10_000):
        scores, table = scored(speaker, path, max_new_tokens=12, batch_tokens=batch_tokens)
        assert table["generated"].to_list() == texts, batch_tokens
        assert table["exact"].to_list() == [i % 2 == 1 for i in range(len(PROMPTS))]
        assert scores.num_free_records == len(PROMPTS)
        assert scores.exact_match == pytest.approx(sum(i % 2 for i in range(len(PROMPTS))) / len(PROMPTS))
        assert scores.accuracy is None


def test_batches_hold_no_more_tokens_than_asked() -> None:
    lengths = [3, 40, 7, 7, 90, 1, 20]
    found = list(batches_by_length(lengths, batch_tokens=60, max_new_tokens=10))
    assert sorted(i for batch in found for i in batch) == list(range(7))
    for batch in found:
        assert len(batch) == 1 or len(batch) * (max(lengths[i] for i in batch) + 10) <= 60
    assert found == [[4], [1], [6, 2], [3, 0, 5]]
    assert max(map(len, batches_by_length([1] * 2000, batch_tokens=10**9, max_new_tokens=1))) == 512


def test_records_with_choices_are_not_asked(student: Path, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "the weak", "completion": " a", "choices": [" a", " b"], "answer": 0},
        {"prompt": "the weak", "completion": " a"},
    ]
    scores, table = scored(student, write_lines(tmp_path / "a.jsonl", rows), max_new_tokens=3)
    assert (scores.num_choice_records, scores.num_free_records) == (1, 1)
    assert table["generated"].is_null().to_list() == table["exact"].is_null().to_list() == [True, False]
    unasked, table = scored(student, tmp_path / "a.jsonl")
    assert (unasked.num_free_records, unasked.exact_match) == (0, None)
    assert table["exact"].null_count() == 2


# -------------------------------------------------------------------------------------------- what is wanted


def asked(text: Text, tokenizer: Any, folder: Path) -> EvaluationSet:
    end_ids = end_token_ids(folder, tokenizer)
    return open_evaluation_set(text, tokenizer, longest=None, max_new_tokens=5, end_ids=end_ids)


def test_a_turn_of_a_chat_ends_with_the_templates_token(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    messages = [{"role": "user", "content": "the weak"}, {"role": "assistant", "content": "a shard "}]
    text = text_of(write_lines(tmp_path / "a.jsonl", [{"messages": messages}]), "test", targets=Targets.completion)
    with pytest.raises(InputError, match="expected a completion that ends with an end token"):
        asked(text, tokenizer, tmp_path)
    tokenizer.add_special_tokens({"extra_special_tokens": ["</>"]})
    exam = asked(text, tokenizer, tmp_path)
    (question,) = exam.generations
    assert question.end_ids == {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("</>")}
    assert question.expected == "a shard"
    assert tokenizer.decode(question.ids) == "<user>the weak</><assistant>"


def test_what_cannot_be_asked_is_refused(student: Path, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"prompt": "a", "choices": ["b", "c"], "answer": 0}])
    unasked = exam_of(student, path, max_new_tokens=5)
    with pytest.raises(InputError, match="scoring.max_new_tokens: expected records with a prompt and a completion"):
        check_generation_requests([unasked])
    free = write_lines(tmp_path / "b.jsonl", [{"prompt": "a", "completion": "b"}])
    check_generation_requests([unasked, exam_of(student, free, max_new_tokens=5)])
    check_generation_requests([exam_of(student, path)])
    with pytest.raises(InputError, match=r"line 1: expected a completion that ends .* set end_token=true"):
        exam_of(student, free, max_new_tokens=5, end_token=False)
    with pytest.raises(InputError, match="expected at most 256 tokens, the model's positions, found 257"):
        exam_of(student, free, max_new_tokens=256)


def test_the_teachers_score_is_of_the_same_kind(student: Path, tmp_path: Path) -> None:
    rows = [{"prompt": p, "completion": " one"} for p in PROMPTS]
    path = write_lines(tmp_path / "a.jsonl", rows)
    _, asked = scored(student, path, max_new_tokens=2)
    right = pl.Series([i < 3 for i in range(len(PROMPTS))])
    asked.with_columns(exact=right).write_parquet(tmp_path / "asked.parquet")
    scores, unasked = scored(student, path)
    unasked.write_parquet(tmp_path / "unasked.parquet")
    exam = exam_of(student, path, max_new_tokens=2)
    assert teacher_score(exam, str(tmp_path / "asked.parquet")) == pytest.approx(3 / len(PROMPTS))
    with pytest.raises(InputError, match=r"found none for 11; score .* with scoring.max_new_tokens=2"):
        teacher_score(exam, str(tmp_path / "unasked.parquet"))
    assert scores.nll is not None
    assert teacher_score(exam_of(student, path), str(tmp_path / "asked.parquet")) == pytest.approx(-scores.nll)


# ------------------------------------------------------------------------------------------- while training

ASKED = {"scoring__max_new_tokens": 6, "evaluate_every_steps": 10, "optimizer__learning_rate": 0.01, "steps": 40}


def asking(student: Path, folder: Path, **changes: Any) -> list[str]:
    """A run on gold alone, which learns four answers by heart; dev knows these and two that it was never told."""
    rows = [{"prompt": f"{line}?", "completion": f" {line.split()[1]}"} for line in LINES]
    write_lines(folder / "gold.jsonl", rows[:4])
    for split in ("dev", "test"):
        write_lines(folder / f"{split}.jsonl", [*rows[:4], {"prompt": "so", "completion": " zz"}])
    how = {"targets": "completion", "end_token": True}
    targets = {f"{split}__{name}": value for split in ("gold", "dev", "test") for name, value in how.items()}
    more = {"gold_fraction": 1.0, "optimizer__schedule": "constant", **targets, **ASKED, **changes}
    return train_arguments(student, folder, "null", **more)


@pytest.mark.slow
def test_exact_match_under_every_zero_stage_is_that_of_one_rank(student: Path, tmp_path: Path) -> None:
    """Two ranks at ZeRO 1 to 3 neither hang nor say anything else."""
    folders = [tmp_path / f"zero{stage}" for stage in range(4)]
    for stage, folder in enumerate(folders):
        prepare_run(folder, asking(student, tmp_path, deepspeed__zero_stage=stage, steps=20))
    run_ranks(1, folders[:1])
    run_ranks(2, folders[1:])
    seen = []
    for folder in folders:
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
        seen.append([row["dev_exact_match"] for row in rows if "dev_exact_match" in row])
    assert len(seen[0]) == 2
    assert seen[0][-1] > 0
    assert seen[1:] == [seen[0]] * 3


@pytest.mark.slow
def test_a_run_that_dev_asks_and_the_best_of_it(student: Path, tmp_path: Path) -> None:
    more = {"launcher__num_processes": 2, "deepspeed__zero_stage": 3, "export__what": "best"}
    script("train", *asking(student, tmp_path, **more), cwd=tmp_path)
    (run,) = (tmp_path / "runs").iterdir()
    rows = {row["step"]: row for row in map(json.loads, (run / "metrics.jsonl").open())}
    result = json.loads((run / "result.json").read_text())
    seen = {step: row["dev_exact_match"] for step, row in rows.items() if "dev_exact_match" in row}
    assert result["decided_by"] == "dev_exact_match"
    assert result["exported_step"] == result["best_step"] == max(seen, key=lambda step: (seen[step], -step))
    assert result["best_step"] < 40  # learnt by heart before the end, and never better
    for split in ("dev", "test"):
        assert (result[split]["exact_match"], result[split]["num_free_records"]) == (0.8, 5)
        table = pl.read_parquet(run / f"predictions-{split}.parquet")
        assert table["exact"].to_list() == [True] * 4 + [False]
        assert table["generated"].to_list()[:4] == [line.split()[1] for line in LINES[:4]]
    assert "| test | 5 |  | 0.8000 ± 0.1789 |" in (run / "model" / "README.md").read_text()

    done = script(
        "evaluate",
        *(f"model.path={run / 'model'}", "model.dtype=float32", "model.attention=null", "text.targets=completion"),
        *(f"text.files=[{tmp_path}/test.jsonl]", "text.end_token=true", "scoring.max_new_tokens=6", "out=scores"),
        cwd=tmp_path,
    )
    assert "exact_match          0.8" in done.stdout
    scores = json.loads((tmp_path / "scores" / "scores.json").read_text())
    of_text = {item.name for item in dataclasses.fields(ScoreKey)}
    assert scores == pytest.approx({name: value for name, value in result["test"].items() if name not in of_text})
