"""Answered records before each question: what the model reads, what stays as without them, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.commands import EvaluateConfig
from pipeline.config.schema import (
    Dtype,
    MalformedPolicy,
    ModelConfig,
    ScoringConfig,
    Targets,
    TextConfig,
)
from pipeline.config.validate_train import check_train
from pipeline.core.types import InputError
from pipeline.evaluation import scoring
from pipeline.evaluation.few_shot import Examples, open_examples
from pipeline.training import identity
from support.commands import merged, train_arguments
from support.scoring import exam_of, scored
from support.tiny import prompts, write_lines

GOLD = prompts(6, labeled=True, first=60)
# of two examples, as they must be read: the second without a completion of its own
PREFIX = f"{GOLD[0]['prompt']}{GOLD[0]['completion']}\n\n{GOLD[1]['prompt']}{GOLD[1]['completion']}\n\n"


def examples_from(path: Path, count: int = 2, tokenizer: Any = None, **settings: Any) -> Examples:
    config = ScoringConfig(few_shot=count, few_shot_from=TextConfig(files=[str(path)], **settings))
    found = open_examples(config, None, tokenizer)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def gold(tmp_path_factory: pytest.TempPathFactory) -> Path:
    answered = {name: value for name, value in GOLD[1].items() if name != "completion"}
    return write_lines(tmp_path_factory.mktemp("gold") / "gold.jsonl", [GOLD[0], answered, *GOLD[2:]])


def test_the_examples_stand_before_each_question(student: Path, gold: Path, tmp_path: Path) -> None:
    """As if they were written into the prompts; but a record keeps its key, and one without choices its prompt."""
    questions = [*prompts(5, labeled=True), {"prompt": "the weak", "completion": " one"}]
    written = [row | {"prompt": PREFIX + row["prompt"]} for row in questions[:5]] + questions[5:]
    plain, prefixed = write_lines(tmp_path / "a.jsonl", questions), write_lines(tmp_path / "b.jsonl", written)
    scores, table = scored(student, plain, examples=examples_from(gold))
    expected, expected_table = scored(student, prefixed)
    without, plain_table = scored(student, plain)
    assert scores == expected
    assert table.drop("record_key").equals(expected_table.drop("record_key"))
    assert (
        table["record_key"].to_list() == plain_table["record_key"].to_list() != expected_table["record_key"].to_list()
    )
    assert table["choice_log_probs"].to_list()[:5] != plain_table["choice_log_probs"].to_list()[:5]
    assert table["nll_sum"][5] == pytest.approx(plain_table["nll_sum"][5], rel=1e-5)
    assert scores.num_targets == without.num_targets


def test_the_first_usable_records_are_examples(gold: Path, tmp_path: Path) -> None:
    assert examples_from(gold).text == PREFIX
    assert [record.prompt for record in examples_from(gold, 3).records] == [row["prompt"] for row in GOLD[:3]]
    path = write_lines(
        tmp_path / "a.jsonl", ["{broken", {**GOLD[0], "completion": GOLD[0]["completion"] + "\n"}, GOLD[1]]
    )
    assert examples_from(path, malformed=MalformedPolicy.skip).text == PREFIX
    assert open_examples(ScoringConfig(), TextConfig(files=["nowhere"]), None) is None
    with pytest.raises(InputError, match=r"a\.jsonl, line 1: expected a JSON object"):
        examples_from(path)


def test_refusals(student: Path, gold: Path, tmp_path: Path, tokenizer: Any) -> None:
    test = write_lines(tmp_path / "a.jsonl", prompts(5, labeled=True))
    with pytest.raises(InputError, match="expected at most 6, the usable records of scoring.few_shot_from, found 9"):
        examples_from(gold, 9)
    with pytest.raises(InputError, match="scoring.few_shot=1: expected a text to take examples from, found none"):
        open_examples(ScoringConfig(few_shot=1), None, None)
    with pytest.raises(InputError, match="line 1: expected a prompt with its completion as an example"):
        examples_from(write_lines(tmp_path / "text.jsonl", [{"text": "plain"}] * 2))
    # too long: never left out, whatever the policy for malformed records
    many = examples_from(write_lines(tmp_path / "many.jsonl", prompts(60, labeled=True)), 40)
    with pytest.raises(InputError, match="line 1, after 40 examples: expected at most 256 tokens, the model's pos"):
        exam_of(student, test, examples=many, malformed=MalformedPolicy.skip)
    with pytest.raises(InputError, match="expected records with choices in test, found none"):
        exam_of(student, write_lines(tmp_path / "b.jsonl", [{"prompt": "a", "completion": "b"}]), examples=many)
    with pytest.raises(InputError, match="targets: expected completion, next or choices with scoring.few_shot, found"):
        exam_of(student, test, examples=many, targets=Targets.all)
    chat = {"messages": [{"role": "user", "content": "the weak"}], "choices": [" one", " two"], "answer": 1}
    chats = write_lines(tmp_path / "chat.jsonl", [chat, chat])
    with pytest.raises(InputError, match=r"chat\.jsonl, line 1: expected prompts of plain text, because examples"):
        exam_of(student, chats, examples=many)
    with pytest.raises(InputError, match="expected prompts of plain text"):
        examples_from(chats, tokenizer=tokenizer)


def test_in_a_run_without_training_the_examples_are_golds(student: Path, data: Path, tmp_path: Path) -> None:
    """They are part of its identity by their content; a trained run refuses them."""

    def found(**changes: Any) -> dict[str, Any]:
        chosen = {"experiment": "few_shot", "steps": 0, "test__files": f"[{test}]", **changes}
        return identity.identity_of(merged(train_arguments(student, data, "null", **chosen)))[0]

    test = write_lines(tmp_path / "test.jsonl", prompts(4, labeled=True, first=200))
    base = found()
    longer = write_lines(tmp_path / "longer.jsonl", prompts(20, labeled=True, first=60))
    assert found(gold__files=f"[{longer}]") == base  # it begins with the same four
    assert found(scoring__few_shot_from__files=f"[{longer}]") == base
    other = write_lines(tmp_path / "other.jsonl", prompts(20, labeled=True, first=61))
    assert found(gold__files=f"[{other}]")["few_shot"] != base["few_shot"]
    fewer = found(scoring__few_shot=3)
    assert fewer["options"] != base["options"]
    assert "few_shot" not in found(scoring__few_shot=0)
    with pytest.raises(InputError, match="scoring.few_shot=4: expected steps=0"):
        check_train(
            merged(train_arguments(student, data, "null", gold_fraction=1, experiment="gold_only", scoring__few_shot=4))
        )


def test_any_model_is_scored_with_examples(student: Path, gold: Path, tmp_path: Path) -> None:
    test = write_lines(tmp_path / "test.jsonl", prompts(4, labeled=True))
    options = ScoringConfig(few_shot=2, few_shot_from=TextConfig(files=[str(gold)]), batch_tokens=300)
    text = TextConfig(files=[str(test)], targets=Targets.completion)
    model = ModelConfig(path=str(student), dtype=Dtype.float32)  # auto: bfloat16 where the machine has it
    config = EvaluateConfig(model=model, text=text, scoring=options, out=str(tmp_path))
    expected, _ = scored(student, test, examples=examples_from(gold))
    assert scoring.run(config).accuracy == expected.accuracy
    assert json.loads((tmp_path / "scores.json").read_text())["nll"] == pytest.approx(expected.nll, rel=1e-5)
