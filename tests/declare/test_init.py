"""`scripts/study.py init`: what it writes is what the records ask, commented, valid, and read back as it was meant."""

from __future__ import annotations

import json
import logging
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config.schema import Targets
from pipeline.config.study import Study, read_study
from pipeline.core.progress import log
from pipeline.core.types import InputError
from pipeline.data.records import find_shape
from pipeline.data.text_files import open_text
from pipeline.data.tokenize import load_labeled_sequences
from pipeline.declare.init import main, run
from pipeline.models.preflight import check_model
from pipeline.models.tokenizer import open_tokenizer
from support.commands import ROOT
from support.tiny import LINES, make_model, make_tokenizer, write_lines

MOODS = ("angry", "calm", "merry")


def rows(count: int, *, labeled: bool, first: int = 0, space: str = " ") -> list[dict[str, str]]:
    """Records that no other test has: the mood of a line."""
    made = []
    for i in range(first, first + count):
        row = {"prompt": f"{LINES[i % len(LINES)]} {i}\nMood:"}
        made.append(row | ({"completion": f"{space}{MOODS[i % 3]}"} if labeled else {}))
    return made


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """`run` is a command: it sets up the logging of its process, here that of all tests."""
    root = logging.getLogger()
    handlers, levels = root.handlers[:], (root.level, log.level)
    yield
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    log.setLevel(levels[1])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of a user with texts in it; the architecture of the tiny models is checked in other tests."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["scripts/study.py"])
    monkeypatch.setattr("pipeline.declare.models.check_model", lambda config, tokenizer: None)
    write_lines(tmp_path / "corpus.jsonl", rows(120, labeled=False))
    write_lines(tmp_path / "ceiling.jsonl", rows(120, labeled=True))
    for number, name in enumerate(("gold", "test", "dev", "labels", "labeled")):
        write_lines(tmp_path / f"{name}.jsonl", rows(40, labeled=True, first=1000 + 100 * number))
    return tmp_path


def options(weak: Path, strong: Path, **changes: Any) -> list[str]:
    chosen = {"name": "mine", "teacher": weak, "student": strong, "corpus": "corpus.jsonl"} | changes
    if "labeled" not in chosen:
        chosen = {"gold": "gold.jsonl", "test": "test.jsonl"} | chosen
    return [f"{name}={value}" for name, value in chosen.items() if value is not None]


def study_of(path: Path) -> tuple[Study, str]:
    return read_study(path), path.read_text()


# --------------------------------------------------------------------------------------- what is written


def test_a_study_with_everything(folder: Path, teacher: Path, student: Path, capsys: Any) -> None:
    more = {"dev": "dev.jsonl", "teacher_labels": "labels.jsonl", "ceiling": "ceiling.jsonl", "teacher_num_layers": 1}
    path = run(options(teacher, student, **more))
    study, content = study_of(path)
    file, shown = study.file, capsys.readouterr().out
    assert path == Path("study/mine.yaml")
    assert (file.teacher.path, file.teacher.num_layers, file.student.path) == (str(teacher), 1, str(student))
    assert (file.corpus.files, file.corpus.targets) == (["corpus.jsonl"], Targets.choices)
    for name in ("gold", "test", "dev", "teacher_labels", "ceiling"):
        text = getattr(file, name)
        assert (text.targets, text.choices, text.end_token) == (
            Targets.completion,
            [f" {mood}" for mood in MOODS],
            False,
        )
    assert (file.runs_dir, file.caches_dir) == ("runs/mine", "caches/mine")
    assert set(file.experiments) == {"teacher", "gold_only", "weak_only", "combined", "ceiling"}
    lines = [line for line in content.splitlines() if line]
    assert len(lines) <= 60
    assert max(map(len, lines)) <= 120
    for before, line in zip(["", *lines], lines, strict=False):
        assert "#" in line or before.lstrip().startswith("#"), f"no comment: {line}"
    assert "3 labels, each with its number of gold records: calm 14, angry 13, merry 13" in shown
    marked = re.findall(r"^    Mood:«(.*)»$", shown, re.MULTILINE)
    assert marked == ["?", " calm", " merry"], "of the corpus, of gold and of test"
    assert "scripts/study.py study=mine --config-dir .\n" in re.sub(r"     \w.*", "", shown)
    assert max(len(line) for line in shown.splitlines() if "python" not in line) <= 80


def test_the_window_fits_every_record_and_no_more(folder: Path, teacher: Path, student: Path) -> None:
    study, _ = study_of(run(options(teacher, student)))
    tokenizer = open_tokenizer(study.file.student)[1]
    gold, corpus = open_text(study.file.gold, "gold"), open_text(study.file.corpus, "corpus")
    window = study.file.window
    assert window % 16 == 0
    assert load_labeled_sequences(gold, tokenizer, window=window)
    choices = max(len(ids) for ids in tokenizer([f" {mood}" for mood in MOODS])["input_ids"])
    longest = max(len(tokenizer(row["prompt"])["input_ids"]) for row in rows(120, labeled=False))
    longest = max(longest, *(len(tokenizer(row["prompt"])["input_ids"]) for row in rows(40, labeled=True, first=1000)))
    assert window - 16 < longest + choices <= window + 1
    assert find_shape(corpus).targets == "choices"


def test_a_few_far_longer_records_are_cut(folder: Path, teacher: Path, student: Path, capsys: Any) -> None:
    long = [{"prompt": "a calm evening " * 30 + "\nMood:"}]
    write_lines(folder / "corpus.jsonl", [*rows(400, labeled=False, first=5000), *long])
    study, content = study_of(run(options(teacher, student)))
    assert study.file.corpus.too_long is not None
    assert study.file.corpus.too_long.name == "cut_left"
    assert study.file.window < 100, "though the longest has 500"
    assert re.search(r"window: \d+  # tokens of the longest sequence; 99\.\d% of the records fit", content)
    assert "(too_long: cut_left)" in capsys.readouterr().out


def test_labels_without_a_space_get_one(folder: Path, teacher: Path, student: Path, capsys: Any) -> None:
    """Then the choices, not the completions as they stand, are supervised: training and scoring read the same."""
    for number, name in enumerate(("gold", "test")):
        write_lines(folder / f"{name}.jsonl", rows(40, labeled=True, first=1000 + 100 * number, space=""))
    study, _ = study_of(run(options(teacher, student)))
    assert study.file.gold.choices == [f" {mood}" for mood in MOODS]
    assert study.file.gold.targets is study.file.corpus.targets is Targets.choices
    assert "a space is put before each label, as ' angry'" in capsys.readouterr().out


def test_other_columns_in_csv(folder: Path, teacher: Path, student: Path, capsys: Any) -> None:
    """A table of text and label, the commonest form of a labeled text; the corpus has the texts alone."""
    for number, name in enumerate(("corpus", "gold", "test")):
        labels = "" if name == "corpus" else ",label"
        lines = [f"id,text{labels}"]
        for i in range(60):
            label = f",{MOODS[i % 3]}" if labels else ""
            lines.append(f'{i},"{LINES[i % 5]}, {number} {i}"{label}')
        (folder / f"{name}.csv").write_text("\n".join(lines) + "\n")
    names = {"corpus": "corpus.csv", "gold": "gold.csv", "test": "test.csv"}
    study, _ = study_of(run(options(teacher, student, **names)))
    assert (study.file.gold.columns.prompt, study.file.gold.columns.completion) == ("text", "label")
    tokenizer = open_tokenizer(study.file.student)[1]
    assert load_labeled_sequences(open_text(study.file.gold, "gold"), tokenizer, window=study.file.window)
    assert "columns: the prompt is 'text', its label 'label'" in capsys.readouterr().out


def test_free_answers_are_written_by_the_teacher(folder: Path, teacher: Path, student: Path) -> None:
    for number, name in enumerate(("gold", "test")):
        own = [{"prompt": f"{number} {i}?", "completion": f" because {i} is {i % 7}"} for i in range(30)]
        write_lines(folder / f"{name}.jsonl", own)
    write_lines(folder / "corpus.jsonl", [{"prompt": f"why {i}?"} for i in range(50)])
    study, content = study_of(run(options(teacher, student)))
    given = yaml.safe_load(content)
    assert study.file.gold.targets is study.file.corpus.targets is Targets.completion
    assert study.file.gold.choices is None
    assert study.file.gold.end_token
    assert given["capture"]["complete.how"] == "greedy"
    written = given["capture"]["complete.max_new_tokens"]
    assert given["train"]["scoring.max_new_tokens"] == written
    tokenizer = open_tokenizer(study.file.student)[1]
    longest = max(len(tokenizer(f" because {i} is {i % 7}<eos>")["input_ids"]) for i in range(30))
    assert written - 16 < longest <= written
    assert study.file.window >= written + len(tokenizer("why 49?")["input_ids"])


def test_chats(folder: Path, teacher: Path, student: Path) -> None:
    """The answers of an assistant that repeat are labels, too."""
    for number, name in enumerate(("corpus", "gold", "test")):
        chats = []
        for i in range(40):
            chat = [{"role": "user", "content": f"{number} {i}: which mood?"}]
            answer = [{"role": "assistant", "content": MOODS[i % 3]}] if name != "corpus" else []
            chats.append({"messages": chat + answer})
        write_lines(folder / f"{name}.jsonl", chats)
    study, _ = study_of(run(options(teacher, student)))
    assert study.file.gold.choices == list(MOODS)
    assert (study.file.gold.targets, study.file.corpus.targets) == (Targets.completion, Targets.choices)


def test_plain_text(folder: Path, teacher: Path, student: Path) -> None:
    for number, name in enumerate(("corpus", "gold", "test")):
        write_lines(folder / f"{name}.jsonl", [{"text": f"{number} {i} " + " ".join(LINES)} for i in range(30)])
    study, content = study_of(run(options(teacher, student)))
    assert "text" not in yaml.safe_load(content)
    assert study.file.gold.targets is Targets.auto
    assert 16 <= study.file.window <= 256


def test_choices_of_their_own(folder: Path, teacher: Path, student: Path) -> None:
    for number, name in enumerate(("corpus", "gold", "test")):
        own = []
        for i in range(30):
            row: dict[str, Any] = {"prompt": f"{number}: {i} + 1 =", "choices": [f" {i + 1}", f" {i}"]}
            own.append(row | ({"answer": 0} if name != "corpus" else {}))
        write_lines(folder / f"{name}.jsonl", own)
    study, _ = study_of(run(options(teacher, student)))
    assert study.file.gold.choices is None
    assert study.file.corpus.targets is Targets.choices
    assert study.file.gold.end_token, "1 begins 10"


def test_one_choice_that_begins_another_keeps_the_end_token(folder: Path, teacher: Path, student: Path) -> None:
    for number, name in enumerate(("gold", "test")):
        own = [{"prompt": f"{number} {i}:", "completion": [" go", " gone by"][i % 2]} for i in range(30)]
        write_lines(folder / f"{name}.jsonl", own)
    study, _ = study_of(run(options(teacher, student)))
    ids = open_tokenizer(study.file.student)[1]([" go", " gone by"])["input_ids"]
    assert study.file.gold.end_token is (ids[1][: len(ids[0])] == ids[0])


def test_answers_in_the_corpus_and_another_ending_are_warnings(
    folder: Path, teacher: Path, student: Path, capsys: Any
) -> None:
    own = [row | {"prompt": row["prompt"].removesuffix("\nMood:")} for row in rows(60, labeled=True)]
    write_lines(folder / "corpus.jsonl", own)
    run(options(teacher, student))
    warned = capsys.readouterr().err
    assert "corpus: 60 of 60 records hold an answer" in warned
    assert "the labeled prompts all end with '\\nMood:', and those of the corpus do not" in warned


# --------------------------------------------------------------------------------------------------- cut


def test_one_labeled_file_is_cut(folder: Path, teacher: Path, student: Path, capsys: Any) -> None:
    """Every record is in one of the three, records with the same prompt in the same; the same seed, the same cut."""
    whole = rows(100, labeled=True, first=2000)
    whole += [row | {"prompt": row["prompt"].upper()} for row in whole[:30]]
    write_lines(folder / "labeled.jsonl", whole)
    run(options(teacher, student, labeled="labeled.jsonl"))
    parts = {path.stem: path.read_text() for path in sorted((folder / "labeled-mine").iterdir())}
    assert list(parts) == ["dev", "gold", "test"]
    lines = [json.loads(line) for part in parts.values() for line in part.splitlines()]
    assert sorted(map(str, lines)) == sorted(map(str, whole))
    keys = [{json.loads(line)["prompt"].casefold() for line in part.splitlines()} for part in parts.values()]
    assert sum(map(len, keys)) == len(set().union(*keys))
    assert abs(len(parts["test"].splitlines()) - 65) <= 1
    assert "labeled, cut by a hash of the prompts with seed 0: dev" in capsys.readouterr().out
    run(options(teacher, student, labeled="labeled.jsonl", folder="other/study"))  # the same files are no obstacle
    assert parts == {path.stem: path.read_text() for path in sorted((folder / "labeled-mine").iterdir())}
    with pytest.raises(InputError, match="expected no such file, or the one that this cut makes"):
        run(options(teacher, student, labeled="labeled.jsonl", folder="third/study", seed=1))


def test_gold_of_a_given_size(folder: Path, teacher: Path, student: Path, capsys: Any) -> None:
    write_lines(folder / "labeled.jsonl", rows(100, labeled=True, first=2000))
    study, _ = study_of(run(options(teacher, student, labeled="labeled.jsonl", gold_records=10)))
    assert len(Path(study.file.gold.files[0]).read_text().splitlines()) == 10
    assert "; 25 are left out" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gold": "corpus.jsonl"}, "found no completion; if its label stands in another column"),
        ({"test": "gold.jsonl"}, "40 prompts of test are also in gold"),
        ({"gold": "ceiling.jsonl"}, "120 prompts of gold are also in corpus"),
        ({"labeled": "ceiling.jsonl"}, "120 prompts of labeled are also in corpus"),
        ({"labeled": "labeled.jsonl", "gold": "gold.jsonl"}, "in place of gold, dev and test, found it beside gold"),
        ({"labeled": "labeled.jsonl", "gold_records": 39}, "gold_records: expected at most 20, because 20 of the 40"),
        ({"gold_records": 5}, "gold_records: expected labeled"),
        ({"teacher_num_layers": 1}, "teacher_num_layers: expected teacher_labels"),
        ({"name": "a/b"}, "name: expected a name without"),
        ({"window": "wide"}, "window: expected a whole number, found 'wide'"),
        ({"window": 10_000}, "window: expected at most 256, the positions of the models, found 10000"),
        ({"window": 16}, "window: expected one that fits at least half of the records, found 16, which fits 0%"),
        ({"allow_shared_records": "maybe"}, "expected true or false, found 'maybe'"),
        ({"folder": "conf"}, "folder: expected a folder called study"),
        ({"corpus": "nowhere.jsonl"}, "corpus: expected 'nowhere.jsonl' to be a file"),
        ({"teacher": "nowhere"}, "model path: expected 'nowhere' to match one path, found nothing"),
        ({"prompt_column": "question"}, "gold: expected a column 'question', found ['completion', 'prompt']"),
        ({"golds": "gold.jsonl"}, "found 'golds=gold.jsonl'; did you mean gold"),
    ],
)
def test_refused(folder: Path, teacher: Path, student: Path, changes: dict[str, Any], message: str) -> None:
    before = sorted(folder.rglob("*"))
    with pytest.raises(InputError, match=re.escape(message)):
        run(options(teacher, student, **changes))
    assert sorted(folder.rglob("*")) == before, "nothing is written"


def test_shared_records_can_be_allowed(folder: Path, teacher: Path, student: Path) -> None:
    study, _ = study_of(run(options(teacher, student, test="gold.jsonl", allow_shared_records="true")))
    assert study.file.allow_shared_records


def test_a_damaged_model_is_refused(
    folder: Path, teacher: Path, student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.declare.models.check_model", check_model)
    shutil.copytree(student, folder / "damaged")
    weights = folder / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"damaged/model.safetensors: expected \d+ bytes"):
        run(options(teacher, folder / "damaged"))


def test_models_of_two_tokenizers_are_refused(folder: Path, teacher: Path, student: Path) -> None:
    other = make_model(folder / "other", make_tokenizer(lines=["something else"], vocabulary_size=290), seed=3)
    with pytest.raises(InputError, match=r"expected teacher .* and student .* to have the same, found another"):
        run(options(teacher, other))


def test_labels_that_are_numbers_are_refused(folder: Path, teacher: Path, student: Path) -> None:
    write_lines(folder / "gold.jsonl", [{"text": f"one {i}", "label": i % 2} for i in range(10)])
    with pytest.raises(InputError, match="gold: expected labels as text, because a model writes them, found 0 in"):
        run(options(teacher, student))


def test_a_corpus_of_plain_text_beside_prompts_is_refused(folder: Path, teacher: Path, student: Path) -> None:
    write_lines(folder / "corpus.jsonl", [{"text": "one"}])
    with pytest.raises(InputError, match="line 1: expected a prompt in column 'prompt', as in the labeled records"):
        run(options(teacher, student))


def test_an_existing_file_stays(folder: Path, teacher: Path, student: Path) -> None:
    path = write_lines(folder / "study" / "mine.yaml", ["# mine"])
    with pytest.raises(InputError, match=r"study/mine.yaml: expected no such file, found one; choose another name"):
        run(options(teacher, student))
    assert path.read_text() == "# mine\n"


def test_missing_options_are_all_named(folder: Path, capsys: Any) -> None:
    with pytest.raises(InputError) as error:
        run(["name=mine"])
    named = re.findall(r"^  (\w+): ", str(error.value), re.MULTILINE)
    assert named == ["teacher", "student", "corpus", "gold", "test"]
    with pytest.raises(SystemExit) as ended:
        main(["name=mine"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: init: expected a value for each of these options")


def test_help_names_every_option(capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        run(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "  name = must be given\n" in shown
    assert "  window = null\n" in shown
    assert "  seed = 0\n" in shown


# ----------------------------------------------------------------------------------------------- questions

ANSWERS = "import sys; from pipeline.declare.answers import read_answers; print(read_answers(sys.argv[1:]))"
WHOLE = "import sys; from pipeline.declare.init import main; main(sys.argv[1:])"


def answer(code: str, arguments: Sequence[str], answers: Sequence[str], cwd: Path) -> tuple[int, str]:
    """Code on a real terminal: wait for each prompt, then type the next answer."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "dumb", "COLUMNS": "500"}
    master, slave = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments], cwd=cwd, stdin=slave, stdout=slave, stderr=slave, env=environment
    ) as process:
        os.close(slave)
        shown, left, deadline = "", list(answers), time.monotonic() + 100
        while time.monotonic() < deadline:
            if not select.select([master], [], [], 0.1)[0]:
                continue
            try:
                piece = os.read(master, 4096).decode(errors="replace")
            except OSError:  # the other end is closed
                break
            shown += piece
            if left and shown.endswith(("> ", "] ")):
                os.write(master, f"{left.pop(0)}\n".encode())
                shown += "\n"
        os.close(master)
        code_of_exit = process.wait(20)
    assert not left, f"not asked: {left}\n{shown}"
    return code_of_exit, shown


def test_questions_on_a_terminal(folder: Path, teacher: Path, student: Path) -> None:
    """A wrong answer is asked for again; an empty one means what the question offers."""
    typed = ["a/b", "mine", "nowhere", str(teacher), str(student), "corpus.jsonl", "", "labeled.jsonl", "", ""]
    exit_code, shown = answer(ANSWERS, [], typed, folder)
    assert exit_code == 0, shown
    assert "name: expected a name without / * ? [ ]" in shown
    assert "teacher: expected 'nowhere' to match one path, found nothing" in shown
    assert "[Enter: cut gold, dev and test from one labeled file]" in shown
    assert f"InitConfig(name='mine', teacher='{teacher}', student='{student}', corpus='corpus.jsonl'" in shown
    assert "gold=None, test=None, dev=None, labeled='labeled.jsonl', teacher_labels=None, ceiling=None" in shown


def test_given_options_are_not_asked_for(folder: Path, teacher: Path, student: Path) -> None:
    typed = ["test.jsonl", "dev.jsonl", "labels.jsonl", "ceiling.jsonl"]
    exit_code, shown = answer(ANSWERS, options(teacher, student, test=None), typed, folder)
    assert exit_code == 0, shown
    assert "teacher: the weak model" not in shown
    assert "test='test.jsonl', dev='dev.jsonl', labeled=None" in shown
    assert "teacher_labels='labels.jsonl', ceiling='ceiling.jsonl'" in shown


def test_nothing_is_asked_for_where_nothing_is_missing(folder: Path, teacher: Path, student: Path) -> None:
    exit_code, shown = answer(ANSWERS, options(teacher, student), [], folder)
    assert (exit_code, shown.startswith("InitConfig(")) == (0, True), shown


def test_an_ending_input_is_an_error(folder: Path) -> None:
    _, shown = answer(ANSWERS, [], ["mine", "\x04"], folder)
    assert "teacher: expected an answer, found none that can be used; give it as teacher=value" in shown


@pytest.mark.slow(minutes=0.5)
def test_the_whole_command_on_a_terminal(folder: Path, teacher: Path, student: Path) -> None:
    """No to the cut ends with nothing written; yes writes it and the study."""
    typed = ["mine", str(teacher), str(student), "corpus.jsonl", "", "labeled.jsonl", "labels.jsonl", ""]
    before = sorted(folder.rglob("*"))
    assert answer(WHOLE, [], [*typed, "n"], folder)[0] == 2
    assert sorted(folder.rglob("*")) == before
    exit_code, shown = answer(WHOLE, [], [*typed, "y"], folder)
    assert exit_code == 0, shown
    study, _ = study_of(folder / "study" / "mine.yaml")
    assert study.file.gold.files == ["labeled-mine/gold.jsonl"]
    assert study.file.teacher_labels is not None
    assert study.file.ceiling is None
