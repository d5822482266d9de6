"""`scripts/study.py init`: write the file of a new study from a few answers, after checking models and texts."""

from __future__ import annotations

import contextlib
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pipeline.config.cli import exit_with_error
from pipeline.config.schema import ModelConfig, StudentConfig, TextConfig
from pipeline.config.study import InitConfig, Study, read_study, script_command
from pipeline.core.files import check_writable, write_atomically
from pipeline.core.progress import log, start_logging
from pipeline.core.types import InputError
from pipeline.data.shown import visible
from pipeline.data.text_files import open_text
from pipeline.declare.answers import confirm, files_of, given_texts, help_lines, read_answers, study_folder
from pipeline.declare.cut import Cut, cut_labeled, cut_sentence, written_cut
from pipeline.declare.draft import LABELED, Draft, Files, make_draft
from pipeline.declare.leaks import check_texts
from pipeline.declare.models import Models, open_models
from pipeline.declare.shown import show_texts
from pipeline.declare.study_yaml import study_yaml, window_sentence
from pipeline.declare.task import column_options, find_columns, find_task, missing_ending, text_config

SHOWN = ("corpus", "gold", "test")
SHOWN_LABELS, COLUMNS = 12, 80


def run(arguments: list[str]) -> Path:
    """Write the file of a new study; returns its path. `--help` prints the options and ends the process.

    InputError, with nothing written, where an option, a model or a text cannot be used, where texts share records, or
    where the file exists already.
    """
    if {"--help", "-h"} & set(arguments):
        print("\n".join(help_lines()))
        raise SystemExit(0)
    start_logging(level=30)
    config = read_answers(arguments)
    path = study_folder(config) / f"{config.name}.yaml"
    if path.exists():
        raise InputError(f"{path}: expected no such file, found one; choose another name, or move it away")
    teacher = ModelConfig(path=config.teacher, num_layers=config.teacher_num_layers)
    student = StudentConfig(path=config.student)
    files: Files = {name: files_of(answer) for name, answer in given_texts(config).items()}
    columns = _columns(config, files)
    print("checking the models ...", flush=True)
    models = open_models(teacher, student)
    cut: Cut | None = None
    if "labeled" in files:
        files, cut = _cut(config, files, columns)
    with contextlib.nullcontext() if cut is None else written_cut(cut):
        task = find_task({name: files[name] for name in LABELED if name in files}, columns)
        draft = make_draft(config, task, models, files)
        content = study_yaml(draft)
        study = _read(content, config.name)
        _check_leaks(study)
        story = list(_story(draft, study, models))
        check_writable(path.parent, "folder")
        write_atomically(path, content)
    print("\n".join(story))
    print(f"\nWritten: {path}. Read it, change what you like, and run next:\n")
    print(f"    {next_command('study', path)}     shows its cost first; run again, it resumes")
    print(f"    {next_command('report', path)}     afterwards")
    return path


def next_command(script: str, path: Path) -> str:
    """What to type next: a script with the study of a file."""
    is_found = path.parent.resolve() == Path("conf/study").resolve()
    return script_command(script, study=path.stem, config_dir=None if is_found else str(path.parent.parent))


# ------------------------------------------------------------------------------------------- the texts


def _columns(config: InitConfig, files: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """The columns of prompt and completion in the labeled texts, where they are not the usual ones."""
    name = "labeled" if "labeled" in files else "gold"
    text = open_text(TextConfig(files=list(files[name])), name)
    return find_columns(text, prompt=config.prompt_column, completion=config.completion_column)


def _cut(config: InitConfig, files: Files, columns: Mapping[str, str]) -> tuple[Files, Cut]:
    """Gold, dev and test from the labeled text, beside it; refused where the corpus has records of it."""
    options = column_options(columns)
    others = {name: text_config(own, options) for name, own in files.items()}
    check_texts(others, allowed=config.allow_shared_records)
    text = open_text(others["labeled"], "labeled")
    first = text.files[0]
    folder = first.parent / f"{first.name.split('.')[0]}-{config.name}"
    cut = cut_labeled(text, folder, seed=config.seed, gold_records=config.gold_records)
    print(f"labeled, cut by a hash of the prompts with seed {config.seed}: {cut_sentence(cut)}")
    if not confirm("Write these files?"):
        raise InputError("labeled: expected a cut into gold, dev and test, found no consent; give gold and test")
    made = {name: [file] for name, file in cut.files().items()}
    return {name: own for name, own in files.items() if name != "labeled"} | made, cut


def _check_leaks(study: Study) -> None:
    texts = {name: getattr(study.file, name) for name in ("corpus", *LABELED)}
    given = {name: text for name, text in texts.items() if text is not None}
    check_texts(given, allowed=study.file.allow_shared_records)
    if (ending := missing_ending(open_text(given["gold"], "gold"), open_text(given["corpus"], "corpus"))) is not None:
        log.warning(
            "corpus: the labeled prompts all end with %r, and those of the corpus do not: write them alike, or the "
            "teacher is asked something that it did not learn",
            ending,
        )


# ------------------------------------------------------------------------------------------- what is shown


def _read(content: str, name: str) -> Study:
    """The study as every command will read it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.yaml"
        path.write_text(content)
        return read_study(path)


def _story(draft: Draft, study: Study, models: Models) -> Iterator[str]:
    """What was found, three records as the models read them, and how much will be trained."""
    for line in _found_lines(draft, models):
        yield from textwrap.wrap(line, COLUMNS, subsequent_indent="  ")
    yield ""
    yield from show_texts({name: getattr(study.file, name) for name in SHOWN}, study)
    settings = draft.settings
    names = [name for name in ("teacher", "gold_only", "weak_only", "combined", "ceiling") if name in settings.steps]
    counts = ", ".join(f"{name} {settings.steps[name]:,}" for name in names)
    yield f"updates, each of {settings.global_batch} sequences of up to {draft.window.size} tokens, about:"
    yield f"  {counts}"


def _found_lines(draft: Draft, models: Models) -> Iterator[str]:
    task = draft.task
    teacher, student = (count / 1e6 for count in (models.teacher_parameters, models.student_parameters))
    yield f"models: teacher {teacher:,.3g}, student {student:,.3g} million parameters, the same tokenizer"
    if teacher > student:
        yield "  the teacher is the larger one: gains over it, and the gap that PGR divides by, may be negative"
    if task.columns:
        yield f"columns: the prompt is {task.columns['prompt']!r}, its label {task.columns['completion']!r}"
    if task.counts:
        counts = sorted(task.counts.items(), key=lambda item: -item[1])
        shown = ", ".join(f"{visible(label)} {count:,}" for label, count in counts[:SHOWN_LABELS])
        more = f" and {len(counts) - SHOWN_LABELS} more" if len(counts) > SHOWN_LABELS else ""
        yield f"{len(counts)} labels, each with its number of gold records: {shown}{more}"
    if missing := [visible(label) for label, count in task.counts.items() if not count]:
        yield f"  gold has no record of {', '.join(missing)}: only the teacher can teach the student these"
    if not task.is_verbatim and task.choices[0].startswith(" "):
        yield f"a space is put before each label, as {task.choices[0]!r}: models know words best after a space"
    cut = "" if draft.window.too_long is None else "; the others lose their beginning (too_long: cut_left)"
    yield f"window: {draft.window.size} {window_sentence(draft)}{cut}"


def main(arguments: list[str]) -> None:
    """`run` as a command: an InputError ends the process with its message and exit code 2, Ctrl-C with 130."""
    try:
        run(arguments)
    except InputError as error:
        exit_with_error(error)
    except KeyboardInterrupt:
        print("\nstopped; no study was written", file=sys.stderr)
        sys.exit(130)
