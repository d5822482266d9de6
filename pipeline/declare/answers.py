"""What a new study is made of: options of `init` on the command line, and questions where a terminal can answer."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_type_hints

from pipeline.config.options import options
from pipeline.config.schema import TextConfig
from pipeline.config.study import InitConfig
from pipeline.config.validate import plain_name
from pipeline.core.files import is_hub_name, matching_paths, one_path
from pipeline.core.types import InputError
from pipeline.data.text_files import open_text

HELP: dict[str, str] = {name: sentence for name, _, sentence in options(InitConfig)}
TEXTS = ("corpus", "gold", "test", "dev", "labeled", "teacher_labels", "ceiling")
REQUIRED = ("name", "teacher", "student", "corpus")
MAX_ATTEMPTS = 5  # at one question

STORY = """Write the file of a study from a few answers: it finds the shape of the records, their labels, a window and
settings for training, and checks models and texts.

    python scripts/study.py init                  asks for what is needed
    python scripts/study.py init name=mine teacher=WEAK student=STRONG corpus=all.jsonl gold=gold.jsonl test=test.jsonl
    python scripts/study.py init name=mine teacher=WEAK student=STRONG corpus=all.jsonl labeled=labeled.jsonl

Options (name=value):"""


def read_answers(arguments: list[str]) -> InitConfig:
    """The options of `init`; those that are missing are asked for on a terminal.

    InputError for an unknown option, a value of another type, contradictions, and elsewhere for what is missing.
    """
    given = _parsed(arguments)
    missing = missing_options(given)
    if missing and sys.stdin.isatty():
        given = ask(given, input)
    elif missing:
        lines = "".join(f"\n  {name}: {HELP[name]}" for name in missing)
        raise InputError(
            f"init: expected a value for each of these options, found none; give them as name=value:{lines}"
        )
    _check_together(given)
    return InitConfig(**given)


def help_lines() -> list[str]:
    """The story of `init`, and every option with its default and its sentence."""
    lines = [STORY]
    for name, default, sentence in options(InitConfig):
        shown = "must be given" if name in REQUIRED else "null" if default is None else default
        lines.append(f"  {name} = {shown}\n      {sentence}")
    return lines


def missing_options(given: Mapping[str, Any]) -> list[str]:
    """The options without which no study can be written, in the order of the questions."""
    missing = [name for name in REQUIRED if name not in given]
    if "labeled" not in given:
        missing += [name for name in ("gold", "test") if name not in given]
    return missing


def _parsed(arguments: list[str]) -> dict[str, Any]:
    hints, given = get_type_hints(InitConfig), dict[str, Any]()
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name not in HELP or not equals:
            near = difflib.get_close_matches(name, HELP, n=2)
            hint = f"did you mean {' or '.join(near)}?" if near else "--help lists all options"
            raise InputError(f"init: expected name=value with the name of an option, found {argument!r}; {hint}")
        if value and value != "null":
            given[name] = _typed(name, value, hints[name])
    return given


def _typed(name: str, value: str, hint: Any) -> Any:
    if "int" in str(hint):
        if not value.isdecimal():
            raise InputError(f"{name}: expected a whole number, found {value!r}; {HELP[name]}")
        return int(value)
    if hint is bool:
        if value not in ("true", "false"):
            raise InputError(f"{name}: expected true or false, found {value!r}; {HELP[name]}")
        return value == "true"
    return value


def _check_together(given: Mapping[str, Any]) -> None:
    _check_name(given["name"])
    beside = [name for name in ("gold", "dev", "test") if name in given]
    if "labeled" in given and beside:
        raise InputError(
            f"labeled: expected it in place of gold, dev and test, found it beside {', '.join(beside)}; give the one "
            "or the others"
        )
    if "gold_records" in given and "labeled" not in given:
        raise InputError(
            "gold_records: expected labeled, the records to cut gold from, found none; give labeled, or leave it out"
        )
    if "teacher_num_layers" in given and "teacher_labels" not in given:
        raise InputError(
            "teacher_num_layers: expected teacher_labels, because a model without its last layers predicts nothing "
            "before it is trained, found none; give teacher_labels, or a ready-made teacher with all its layers"
        )
    for name, least in (("window", 16), ("teacher_num_layers", 1), ("gold_records", 1)):
        if name in given and given[name] < least:
            raise InputError(f"{name}: expected at least {least}, found {given[name]}; {HELP[name]}")


# ---------------------------------------------------------------------------------------- questions


def ask(given: Mapping[str, Any], read_line: Callable[[str], str]) -> dict[str, Any]:
    """Ask for everything that is not given, with the same checks; an empty answer leaves an optional text out."""
    answers = dict(given)
    print("A new study. Files may be .jsonl, .csv, .parquet and others; Ctrl-C ends without writing anything.\n")
    for name in REQUIRED:
        _ask(name, answers, read_line)
    if "labeled" not in answers and "gold" not in answers:
        _ask("gold", answers, read_line, otherwise="cut gold, dev and test from one labeled file")
        if "gold" not in answers:
            _ask("labeled", answers, read_line)
    if "labeled" not in answers:
        _ask("test", answers, read_line)
        _ask("dev", answers, read_line, otherwise="none")
    _ask("teacher_labels", answers, read_line, otherwise="the teacher is ready-made")
    _ask("ceiling", answers, read_line, otherwise="no ceiling")
    return answers


def _ask(name: str, answers: dict[str, Any], read_line: Callable[[str], str], *, otherwise: str | None = None) -> None:
    """Ask until the answer can be used; `otherwise` is what an empty answer means, None: it is needed."""
    if name in answers:
        return
    sentence = HELP[name].split("; null")[0]
    suffix = "" if otherwise is None else f" [Enter: {otherwise}]"
    for _ in range(MAX_ATTEMPTS):
        try:
            answer = read_line(f"{name}: {sentence}{suffix}\n> ").strip()
        except EOFError:
            break
        if not answer and otherwise is not None:
            return
        try:
            if not answer:
                raise InputError(f"{name}: expected an answer, found none")
            check_answer(name, answer)
        except InputError as error:
            print(f"  {error}")
            continue
        answers[name] = answer
        return
    raise InputError(f"{name}: expected an answer, found none that can be used; give it as {name}=value")


def check_answer(name: str, answer: str) -> None:
    """InputError where a name, a model or the files of a text cannot be used."""
    if name == "name":
        _check_name(answer)
    elif name in ("teacher", "student"):
        if not is_hub_name(answer):
            one_path(answer, name)
    elif name in TEXTS:
        open_text(TextConfig(files=files_of(answer)), name)


def _check_name(name: str) -> None:
    """InputError where study=NAME would not find the study, or means something else."""
    plain_name(name=name)
    if "," in name or name.endswith((".yaml", ".yml")):
        raise InputError(f"name: expected a name without commas and without the ending of a file, found {name!r}")


def files_of(answer: str) -> list[str]:
    """The paths and globs of a text: one, several with commas between them, or a list in brackets as Hydra has it."""
    if matching_paths(answer):
        return [answer]
    inner = answer[1:-1] if answer.startswith("[") and answer.endswith("]") else answer
    return [part.strip().strip("'\"") for part in inner.split(",") if part.strip()]


def confirm(question: str) -> bool:
    """Yes on a terminal unless the answer begins with n; elsewhere always yes."""
    if not sys.stdin.isatty():
        return True
    with contextlib.suppress(EOFError):
        return not input(f"{question} [Y/n] ").strip().lower().startswith("n")
    return False


def study_folder(config: InitConfig) -> Path:
    """The folder of the study's file; InputError where Hydra could not find it by --config-dir."""
    folder = Path(config.folder or ("conf/study" if Path("conf/study").is_dir() else "study"))
    if folder.name != "study":
        raise InputError(
            f"folder: expected a folder called study, because commands look there for study=NAME, found {folder}; use "
            f"{folder / 'study'}"
        )
    return folder


def given_texts(config: InitConfig) -> dict[str, str]:
    """The texts of a study by name, as they were answered."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name in TEXTS and value}
