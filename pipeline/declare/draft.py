"""All that the file of a new study states, found from its records and models."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.config.study import InitConfig
from pipeline.core.types import InputError
from pipeline.data.text_files import Text, open_text
from pipeline.declare.models import Models, needs_end_token
from pipeline.declare.settings import Settings, Sizes, choose_settings
from pipeline.declare.sizes import Window, count_sequences, fit_window, given_window, measure, quantile, rounded_up
from pipeline.declare.task import Task, column_options, corpus_options, lacks_completions, text_config

LABELED = ("gold", "test", "dev", "teacher_labels", "ceiling")
TRAINS = ("corpus", "gold", "teacher_labels", "ceiling")  # texts that are packed into windows
MAX_COMPARED_TOKENS = 32  # completions longer than that are not compared as a whole

Files = Mapping[str, Sequence[str]]
"""Name of a text -> its files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """All that the file of a study states."""

    name: str
    teacher: Mapping[str, Any]
    student: Mapping[str, Any]
    texts: Mapping[str, Sequence[str]]
    """Name -> files."""
    text: Mapping[str, Any]
    """Options of all texts."""
    corpus: Mapping[str, Any]
    """Options of the corpus alone."""
    max_new_tokens: int | None
    """Tokens that the teacher writes after a prompt of the corpus; None: it writes none."""
    exact_match_tokens: int | None
    """Tokens that a student writes for a test record; None: exact match is not measured."""
    allow_shared_records: bool
    task: Task
    window: Window
    settings: Settings


def make_draft(config: InitConfig, task: Task, models: Models, files: Files) -> Draft:
    """All that the file will state, found from the records and the models."""
    options = _text_options(task, models.student_tokenizer)
    of_corpus = corpus_options(task, text_config(files["corpus"], options))
    tokens_written = _tokens_written(task, models, files, options)
    writes = task.kind == "completion" and lacks_completions(text_config(files["corpus"], options | of_corpus))
    open_one = _Opener(files=files, options=options, of_corpus=of_corpus, models=models, writes=writes)
    window = _window(config, task, open_one, room=tokens_written if writes else 0)
    if window.too_long is not None:
        options = options | {"too_long": window.too_long}
        open_one = dataclasses.replace(open_one, options=options)
    settings = _settings(models, open_one, window)
    return Draft(
        name=config.name,
        teacher=_model(config.teacher, config.teacher_num_layers),
        student=_model(config.student, None),
        texts=files,
        text=options,
        corpus=of_corpus,
        max_new_tokens=tokens_written if writes else None,
        exact_match_tokens=tokens_written if 0 < tokens_written <= MAX_COMPARED_TOKENS else None,
        allow_shared_records=config.allow_shared_records,
        task=task,
        window=window,
        settings=settings,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Opener:
    """The texts as both stages will open them, with the tokenizer that reads each."""

    files: Mapping[str, Sequence[str]]
    options: Mapping[str, Any]
    of_corpus: Mapping[str, Any]
    models: Models
    writes: bool
    """Whether the teacher completes the corpus."""

    def text(self, name: str) -> tuple[Text, Any]:
        if name != "corpus":
            return open_text(text_config(self.files[name], self.options), name), self.models.student_tokenizer
        text = open_text(text_config(self.files[name], {**self.options, **self.of_corpus}), name)
        begins = self.models.begins_windows
        return dataclasses.replace(text, completes=self.writes, begins_windows=begins), self.models.teacher_tokenizer


def _text_options(task: Task, tokenizer: Any) -> dict[str, Any]:
    """The options that all texts of the study share."""
    options = column_options(task.columns)
    if task.kind != "text":
        options["targets"] = "completion" if task.is_verbatim else "choices"
    if task.choices:
        options["choices"] = list(task.choices)
    has_end = tokenizer.eos_token_id is not None
    if task.choices:  # of those that differ from record to record, one may always begin another
        has_end = needs_end_token(task.choices, tokenizer)
    return options if has_end else options | {"end_token": False}


def _tokens_written(task: Task, models: Models, files: Files, options: Mapping[str, Any]) -> int:
    """The length of an answer in tokens, which 99 % of the labeled ones do not exceed; 0 without free answers."""
    if task.kind != "completion":
        return 0
    gold = measure(open_text(text_config(files["gold"], options), "gold"), models.student_tokenizer)
    return rounded_up(quantile(gold.targets))


def _window(config: InitConfig, task: Task, open_one: _Opener, *, room: int) -> Window:
    measured = [measure(*open_one.text(name)) for name in TRAINS if name in open_one.files]
    tokens = [length + (room if lengths.what == "corpus" else 0) for lengths in measured for length in lengths.tokens]
    longest, is_plain = open_one.models.longest, task.kind == "text"
    if config.window is None:
        return fit_window(tokens, is_plain=is_plain, longest=longest)
    if longest is not None and config.window > longest:
        raise InputError(
            f"window: expected at most {longest}, the positions of the models, found {config.window}; use a smaller one"
        )
    if is_plain:
        return Window(size=config.window, too_long=None, fitting_fraction=1.0)
    return given_window(config.window, tokens)


def _model(path: str, num_layers: int | None) -> dict[str, Any]:
    """The options of a model that are not those by default."""
    options = {"path": path, "num_layers": num_layers}
    return {name: value for name, value in options.items() if value is not None}


def _settings(models: Models, open_one: _Opener, window: Window) -> Settings:
    counted = {
        name: count_sequences(*open_one.text(name), window=window.size) for name in TRAINS if name in open_one.files
    }
    return choose_settings(
        Sizes(
            corpus=counted["corpus"],
            gold=counted["gold"],
            teacher_labels=counted.get("teacher_labels"),
            ceiling=counted.get("ceiling"),
            window=window.size,
            student_parameters=models.student_parameters,
            teacher_parameters=models.teacher_parameters,
            has_dev="dev" in open_one.files,
        )
    )
