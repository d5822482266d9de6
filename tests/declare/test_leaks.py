"""Records that texts share: exact counts against a slow twin, and what is refused."""

from __future__ import annotations

import itertools
import json
import logging
import random
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.schema import TextConfig
from pipeline.core.types import InputError
from pipeline.data.records import fields_of, find_shape
from pipeline.data.text_files import all_records, open_text
from pipeline.declare import leaks
from pipeline.declare.leaks import TRAINING, check_texts, find_shared
from support.tiny import write_lines

WORDS = ["Cafe\u0301", "caf\u00e9", "Tree", "tree ", "a  b", "A b", "\u00df", "ss", "x"]


def configs(folder: Path, **rows: list[Any]) -> dict[str, TextConfig]:
    return {name: TextConfig(files=[str(write_lines(folder / f"{name}.jsonl", texts))]) for name, texts in rows.items()}


def asked(*prompts: str) -> list[dict[str, str]]:
    return [{"prompt": prompt} for prompt in prompts]


def plain(prompt: str) -> str:
    return " ".join(unicodedata.normalize("NFC", prompt).casefold().split())


def test_counts_equal_those_of_a_slow_twin(tmp_path: Path) -> None:
    """Every pair, prompt by prompt: the same characters, or the same but for case, white space and Unicode form."""
    draw = random.Random(0)
    for attempt in range(20):
        names = ["teacher_labels", "corpus", "gold", "dev", "test", "news", "ceiling"]
        prompts = {
            name: [" ".join(draw.choices(WORDS, k=draw.randint(1, 2))) for _ in range(draw.randint(1, 12))]
            for name in names
        }
        texts = configs(tmp_path / str(attempt), **{name: asked(*own) for name, own in prompts.items()})
        opened = {name: find_shape(open_text(config, name)) for name, config in texts.items()}
        found = {frozenset(shared.names): (shared.num_same, shared.num_similar) for shared in find_shared(opened)}
        expected = {}
        for one, other in itertools.combinations(names, 2):
            keys = {plain(p) for p in prompts[one]} & {plain(p) for p in prompts[other]}
            same = {plain(p) for p in {*prompts[one]} & {*prompts[other]}}
            if keys and {one, other} != {"corpus", "ceiling"}:
                expected[frozenset((one, other))] = (len(same), len(keys - same))
        assert found == expected


@pytest.mark.parametrize(
    ("one", "other"), list(itertools.combinations(["teacher_labels", "corpus", "gold", "ceiling", "dev", "news"], 2))
)
def test_what_is_refused(tmp_path: Path, one: str, other: str) -> None:
    """Held-out records anywhere else, and gold in the corpus; what trains may otherwise share."""
    texts = configs(tmp_path, **{one: asked("a", "the same"), other: asked("b", "the same")})
    is_refused = one not in TRAINING or other not in TRAINING or {one, other} == {"corpus", "gold"}
    if not is_refused:
        counted = [shared.num_same for shared in check_texts(texts, allowed=False)]
        assert counted == ([] if {one, other} == {"corpus", "ceiling"} else [1])
        return
    with pytest.raises(InputError, match=f"1 prompts of {other} are also in {one}"):
        check_texts(texts, allowed=False)
    assert [shared.num_same for shared in check_texts(texts, allowed=True)] == [1]


def test_the_message_names_counts_places_and_what_to_do(tmp_path: Path) -> None:
    prompts = [f"prompt {number}" for number in range(10)]
    texts = configs(tmp_path, corpus=asked("x", *prompts), test=asked(*prompts, "PROMPT  3", "X"), dev=asked("y"))
    with pytest.raises(InputError) as error:
        check_texts(texts, allowed=False)
    message = str(error.value)
    assert "10 prompts of test are also in corpus (1 more differ only in case, spaces or Unicode form)" in message
    assert message.count(f"{tmp_path}/test.jsonl, line ") == message.count(f"{tmp_path}/corpus.jsonl, line ") == 3
    assert "remove them from one of the two" in message
    assert "allow_shared_records: true" in message
    for place in range(1, 11):  # a record of test stands one line above its twin in the corpus
        pair = f"{tmp_path}/test.jsonl, line {place} and {tmp_path}/corpus.jsonl, line "
        assert pair not in message or f"{pair}{place + 1}" in message


def test_similar_prompts_are_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    texts = configs(tmp_path, corpus=asked("The  CAFE\u0301"), test=asked("the caf\u00e9"))
    with caplog.at_level(logging.WARNING, "pipeline"):
        (shared,) = check_texts(texts, allowed=False)
    assert (shared.num_same, shared.num_similar) == (0, 1)
    assert "0 prompts of test are also in corpus (1 more differ only" in caplog.text
    assert "test.jsonl, line 1 and " in caplog.text


def test_a_record_is_found_in_another_format(tmp_path: Path) -> None:
    """A prompt with and without its label, in CSV, as a chat with a system message, as an Alpaca instruction."""
    question = "Which river is longest?"
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}]
    table = tmp_path / "table.csv"
    table.write_text(f'prompt,completion\n"{question}"," Nile"\n')
    texts = configs(
        tmp_path,
        corpus=asked(question),
        chat=[{"messages": [*chat, {"role": "assistant", "content": "The Nile."}]}],
        alpaca=[{"instruction": question, "output": "The Nile."}],
        choices=[{"prompt": question, "choices": [" Nile", " Rhine"], "answer": 0}],
    )
    texts["table"] = TextConfig(files=[str(table)])
    found = {frozenset(shared.names) for shared in check_texts(texts, allowed=True)}
    assert found == {frozenset(pair) for pair in itertools.combinations(texts, 2)}


def test_only_records_that_are_taken_count(tmp_path: Path) -> None:
    texts = configs(tmp_path, corpus=asked("a", "b", "c"), test=asked("d", "c", "b"))
    texts["corpus"].take, texts["test"].take = 2, 2
    assert check_texts(texts, allowed=False) == []
    texts["test"].take = 3
    with pytest.raises(InputError, match=r"1 prompts of test are also in corpus: .*test.jsonl, line 3 and .*, line 2"):
        check_texts(texts, allowed=False)


def test_plain_text_is_compared_as_a_whole(tmp_path: Path) -> None:
    texts = configs(
        tmp_path, corpus=[{"text": "one two"}, {"text": "three"}], test=[{"text": "one"}, {"text": "three"}]
    )
    assert [shared.num_same for shared in check_texts(texts, allowed=True)] == [1]


def test_a_corpus_with_answers_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"prompt": "a"}, {"prompt": "b", "completion": " yes"}, {"prompt": "c", "choices": ["y", "n"], "answer": 1}]
    with caplog.at_level(logging.WARNING, "pipeline"):
        check_texts(configs(tmp_path, corpus=rows, ceiling=rows, test=asked("d")), allowed=False)
    assert [record.message.split(", which")[0] for record in caplog.records] == [
        "corpus: 2 of 3 records hold an answer"
    ]


def test_a_malformed_record_stops_with_its_place(tmp_path: Path) -> None:
    texts = configs(tmp_path, corpus=asked("a"), test=[{"prompt": "b"}, {"prompt": 3}])
    with pytest.raises(InputError, match=r"test.jsonl, line 2: column 'prompt': expected text, found 3"):
        check_texts(texts, allowed=True)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a"},
        {"prompt": "\u00c5 \U0001f642", "completion": " b"},
        {"prompt": "a", "answer": 1},
        {"prompt": "a", "answer": 1, "choices": ["x", "y"]},
        {"prompt": "a", "choices": ["x", "y"], "completion": None},
        {"prompt": [{"role": "user", "content": "a"}]},
        {"text": "a"},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    ],
)
@pytest.mark.parametrize("choices", [None, ["b", "x"]])
def test_the_quick_way_reads_what_the_usual_one_reads(
    tmp_path: Path, row: dict[str, Any], choices: list[str] | None
) -> None:
    config = TextConfig(files=[str(write_lines(tmp_path / "a.jsonl", [row]))], choices=choices)
    text = find_shape(open_text(config, "corpus"))
    (raw,) = all_records(text.files, text.read_columns)
    usual = leaks._asked(raw[0], fields_of(raw, text), text)
    assert leaks._quick(raw, text) in (usual, None)
    assert list(leaks._prompts(text)) == [usual]


@pytest.mark.parametrize("prompt", ["", "\0", "\ud800", 3, None])
def test_the_quick_way_refuses_what_the_usual_one_refuses(tmp_path: Path, prompt: Any) -> None:
    text = find_shape(open_text(configs(tmp_path, gold=[{"prompt": prompt}])["gold"], "gold"))
    (raw,) = all_records(text.files, text.read_columns)
    with pytest.raises(InputError) as expected:
        fields_of(raw, text)
    with pytest.raises(InputError) as found:
        list(leaks._prompts(text))
    assert str(found.value).startswith(f"{raw[0]}: {expected.value}")


@pytest.mark.parametrize("size", [4_000, pytest.param(100_000, marks=pytest.mark.slow(minutes=0.5))])
def test_large_texts(tmp_path: Path, size: int) -> None:
    """Five texts, two of them with ten records in common; 100,000 records each take a few seconds."""
    for number, name in enumerate(["corpus", "gold", "dev", "test", "teacher_labels"]):
        lines = [f'{{"prompt": "{number} {i} what is the topic of this sentence?"}}' for i in range(size)]
        if name == "corpus":
            lines[500:510] = [json.dumps({"prompt": f"3 {i} what is the topic of this sentence?"}) for i in range(10)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    texts = {path.stem: TextConfig(files=[str(path)]) for path in tmp_path.iterdir()}
    (shared,) = check_texts(texts, allowed=True)
    assert (shared.names, shared.num_same) == (("corpus", "test"), 10)
