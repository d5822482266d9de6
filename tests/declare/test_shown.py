"""What is shown of a record is what is trained on: the marked tokens are the targets of its segments."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from pipeline.config.schema import Targets, TextConfig
from pipeline.config.study import read_study
from pipeline.core.types import UNKNOWN_TARGET, InputError
from pipeline.data.shown import CLOSE, OPEN, sample_lines, sample_text, shortened, supervised_line, visible
from pipeline.data.text_files import Text, open_text
from pipeline.data.tokenize import load_labeled_sequences
from pipeline.declare.shown import show_texts
from pipeline.models.tokenizer import load_tokenizer
from support.tiny import TOPICS, make_tokenizer, prompts, text_of, write_lines
from support.trained_tokenizers import metaspace_tokenizer

CHAT = [
    {"role": "user", "content": "where?"},
    {"role": "assistant", "content": "here"},
    {"role": "user", "content": "and [now]?"},
    {"role": "assistant", "content": "there"},
]


def text_with(tmp_path: Path, rows: list[Any], what: str = "gold", **settings: Any) -> Text:
    return text_of(write_lines(tmp_path / f"{what}.jsonl", rows), what, **settings)


@pytest.mark.parametrize(
    ("row", "settings", "expected"),
    [
        ({"prompt": "one:", "completion": " two"}, {"targets": Targets.completion}, "one:« two<eos>»"),
        ({"prompt": "one:", "completion": " two"}, {"targets": Targets.completion, "end_token": False}, "one:« two»"),
        ({"prompt": "one:", "completion": " two"}, {"targets": Targets.all, "end_token": False}, "o«ne: two»"),
        ({"prompt": "one:"}, {"targets": Targets.next, "end_token": False}, "one:«?»"),
        ({"prompt": "one:", "completion": "t"}, {"targets": Targets.next, "end_token": False}, "one:«t»"),
        ({"prompt": "one:", "choices": TOPICS}, {"targets": Targets.choices, "end_token": False}, "one:«?»"),
        (
            {"prompt": "one:", "choices": TOPICS, "answer": 2},
            {"targets": Targets.choices, "end_token": False},
            "one:« three of»",
        ),
        ({"text": "one two"}, {"targets": Targets.all}, "o«ne two<eos>»"),
        (
            {"messages": CHAT},
            {"targets": Targets.completion},
            "<user>where?</><assistant>here</><user>and [now]?</><assistant>«there</>»",
        ),
    ],
)
def test_marks(tmp_path: Path, row: Any, settings: dict[str, Any], expected: str) -> None:
    tokenizer = make_tokenizer(lines=["zz"])  # hardly a merge: "one" is three tokens, its first no target
    sample = sample_text(text_with(tmp_path, [row], **settings), tokenizer, window=128)
    assert sample.record == expected


@pytest.mark.parametrize("kind", ["byte level", "metaspace"])
@pytest.mark.parametrize("targets", [Targets.completion, Targets.all])
def test_marked_text_is_that_of_the_targets_of_training(tmp_path: Path, kind: str, targets: Targets) -> None:
    """Also with a tokenizer that writes a space before every text."""
    tokenizer = (
        make_tokenizer() if kind == "byte level" else load_tokenizer(metaspace_tokenizer(tmp_path / "tokenizer"))
    )
    for row in prompts(6, labeled=True):
        row = {"prompt": row["prompt"], "completion": row["completion"]}
        text = text_with(tmp_path, [row], targets=targets)
        sample = sample_text(text, tokenizer, window=128)
        (sequence,) = load_labeled_sequences(text, tokenizer, window=128)
        target_ids = sequence.target_ids_N.tolist()
        assert UNKNOWN_TARGET not in target_ids
        (marked,) = re.findall(f"{OPEN}(.*){CLOSE}", sample.record)
        assert marked.strip() == tokenizer.decode(target_ids).strip()
        assert row["completion"] in marked
        assert sample.positions == (len(target_ids),) * 2
        assert sample.tokens == (len(sequence.input_ids_S),) * 2


def test_counts(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """All records are counted, the first hundred measured; of choices the positions of all their segments."""
    rows = [{"prompt": "x" * (1 + i % 5) + ":", "choices": TOPICS} for i in range(250)]
    sample = sample_text(text_with(tmp_path, rows, "corpus", end_token=False), tokenizer, window=64)
    assert (sample.num_records, sample.is_exact, sample.num_sampled) == (250, True, 100)
    nodes = {tuple(ids[:i]) for ids in tokenizer(TOPICS)["input_ids"] for i in range(len(ids))}
    assert sample.positions == (len(nodes), len(nodes))
    assert sample.choices == tuple(TOPICS)
    head = next(iter(sample_lines(sample)))
    assert head.startswith(f"corpus: 250 records; {len(nodes)} supervised positions each, ")
    assert head.endswith("(first 100)")


def test_only_records_that_are_taken_are_shown(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": "a:", "completion": "b"}, {"prompt": "a" * 50, "completion": "b"}]
    sample = sample_text(text_with(tmp_path, rows, take=1), tokenizer, window=16)
    assert (sample.num_records, sample.num_sampled) == (1, 1)


def test_a_prompt_that_the_teacher_completes(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    text = text_with(tmp_path, [{"prompt": "write:"}], "corpus", targets=Targets.completion)
    sample = sample_text(dataclasses.replace(text, completes=True), tokenizer, window=64)
    assert sample.record == "write:«?»"
    assert "the teacher writes what is supervised of each" in next(iter(sample_lines(sample)))
    assert supervised_line(sample) == "corpus, supervised: what the teacher writes a record, as write:«?»"


def test_lines_fit_a_terminal_and_escape_what_would_control_it(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    prompt = "first\nsecond \x1b[31m" + "long " * 400 + "\nTopic:"
    rows = [{"prompt": prompt, "choices": [f" choice {i}" for i in range(10, 50)], "answer": 3}]
    sample = sample_text(text_with(tmp_path, rows, end_token=False), tokenizer, window=None)
    lines = list(sample_lines(dataclasses.replace(sample, place="gold.jsonl, line 1")))
    assert max(map(len, lines)) <= 80
    assert len(lines) < 25
    assert all(line.isprintable() for line in lines)
    shown = "\n".join(line.strip() for line in lines)
    assert "first\nsecond \\x1b[31mlong long" in shown
    assert re.search(r"\[\.\.\. 1,\d+ characters \.\.\.\]", "".join(line[4:] for line in lines))
    assert 'Topic:« choice 13»\n40 choices: " choice 10", " choice 11",' in shown
    assert shown.endswith('" choice 29", and 20 more')


def test_shortened_keeps_both_ends() -> None:
    text = "".join(map(str, range(1000)))
    short = shortened(text, 100, 40)
    begin, end = re.split(r" \[\.\.\. [\d,]+ characters \.\.\.\] ", short)
    assert (text.startswith(begin), text.endswith(end), len(begin), len(end)) == (True, True, 60, 40)
    assert f"{len(text) - 100:,} characters" in short
    assert shortened("short", 100, 40) == "short"


@pytest.mark.parametrize("length", [3, 300])
def test_supervised_line(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, length: int) -> None:
    rows = [{"prompt": "a " * length + "\nTopic:", "completion": " one"}]
    text = text_with(tmp_path, rows, targets=Targets.completion, end_token=False, choices=TOPICS)
    line = supervised_line(sample_text(text, tokenizer, window=None))
    assert line.startswith("gold, supervised: ")
    assert line.endswith("\\nTopic:« one» (or another of 3 choices)")
    assert len(line) < 160
    assert line.isprintable()


def test_nothing_usable_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    config = TextConfig(files=[str(write_lines(tmp_path / "gold.jsonl", [{"prompt": 1}]))])
    with pytest.raises(InputError, match=r"gold.jsonl, line 1: column 'prompt': expected text"):
        sample_text(open_text(config, "gold"), tokenizer, window=64)
    config.malformed = type(config.malformed).skip
    with pytest.raises(InputError, match="gold: expected usable records, found none among the first 1"):
        sample_text(open_text(config, "gold"), tokenizer, window=64)


def test_visible_is_one_line() -> None:
    assert visible("a\tb\r\u202ec é") == "a\\tb\\r\\u202ec é"


def test_show_texts_of_a_study(tmp_path: Path, teacher: Path, student: Path) -> None:
    """The corpus as the teacher reads it: it completes the prompts; the test text whatever the window is."""
    write_lines(tmp_path / "corpus.jsonl", [{"prompt": "write:"}])
    write_lines(tmp_path / "gold.jsonl", [{"prompt": "write:", "completion": " it"}])
    write_lines(tmp_path / "test.jsonl", [{"prompt": "write " * 40, "completion": " it"}])
    path = tmp_path / "mine.yaml"
    texts = "".join(f"{name}: {{files: [{tmp_path}/{name}.jsonl]}}\n" for name in ("corpus", "gold", "test"))
    path.write_text(
        f"teacher: {{path: {teacher}}}\nstudent: {{path: {student}}}\nwindow: 32\ntext: {{targets: completion}}\n"
        f"capture: {{complete.how: greedy}}\n{texts}"
    )
    study = read_study(path)
    names = ("corpus", "gold", "test")
    shown = "\n".join(show_texts({name: getattr(study.file, name) for name in names}, study))
    assert "corpus: 1 records; the teacher writes what is supervised of each" in shown
    assert "    write:«?»" in shown
    assert "    write:« it<eos>»" in shown
    study.file.window = 4
    with pytest.raises(InputError, match=r"gold.jsonl, line 1: expected at most 4 tokens"):
        list(show_texts({"gold": study.file.gold}, study))
