"""What the records of a new study ask of a model: which columns hold what, the choices, what is supervised."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.config.schema import ColumnsConfig, Targets, TextConfig, TextShape, TooLongPolicy
from pipeline.core.types import InputError
from pipeline.data.messages import text_content
from pipeline.data.records import MalformedRecords, fields_of, find_shape, row_of
from pipeline.data.shapes import Fields
from pipeline.data.text_files import Text, all_records, open_text

SAMPLED_RECORDS = 200  # read to find columns
MAX_CLASSES, MIN_RECORDS_OF_CLASS, MAX_CLASS_CHARACTERS = 100, 3, 60  # completions that repeat like this are labels
PROMPTS = ("prompt", "text", "sentence", "question", "content", "input", "document", "title", "review", "query")
COMPLETIONS = (
    *("completion", "label", "label_text", "label_name", "labels", "class", "category", "topic", "target", "answer"),
    *("intent", "sentiment", "tag", "response", "output"),
)
READY = ("messages", "conversations", "instruction", "chosen", "choices", "options", "endings")  # read as they are


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What the labeled records of a study ask."""

    kind: str
    """choices: one of a few labels; completion: free text after a prompt; text: plain text without prompts."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """prompt and completion -> the columns that hold them, where they are called otherwise."""
    choices: tuple[str, ...] = ()
    """The labels of all records; empty where records bring choices of their own."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """How many gold records have each label; labels without the spaces around them."""
    is_verbatim: bool = True
    """Whether the records' completions are these choices character by character."""


def find_columns(text: Text, *, prompt: str | None, completion: str | None) -> dict[str, str]:
    """The columns of prompt and completion where they have other names; empty where the records are read as they are.

    InputError where the named columns do not exist, or where no column of labels can be found.
    """
    names = _column_names(text)
    for given in (prompt, completion):
        if given is not None and given not in names:
            raise InputError(
                f"{text.what}: expected a column {given!r}, found {sorted(names)}; correct prompt_column or "
                "completion_column"
            )
    is_ready = any(name in names for name in READY) or {"prompt", "completion"} <= names
    if prompt is None and completion is None and (is_ready or not _labels(text, names, prompt)):
        return {}
    prompt = prompt or next((name for name in PROMPTS if name in names and name != completion), None)
    completion = completion or next(iter(_labels(text, names, prompt)), None)
    if prompt is None or completion is None:
        raise InputError(
            f"{text.what}: expected columns of a prompt and of its label, found {sorted(names)}; name them with "
            "prompt_column and completion_column"
        )
    return {"prompt": prompt, "completion": completion}


def _labels(text: Text, names: Collection[str], prompt: str | None) -> list[str]:
    """The columns that may hold labels; InputError where none of them holds text."""
    has_prompt = any(name in names for name in PROMPTS)
    found = [name for name in COMPLETIONS if name in names and name != prompt and has_prompt]
    values = {name: [row[name] for row in _rows(text) if row.get(name) is not None] for name in found}
    written = [name for name in found if all(isinstance(value, str) for value in values[name])]
    if found and not written:
        raise InputError(
            f"{text.what}: expected labels as text, because a model writes them, found {values[found[0]][0]!r} in "
            f"column {found[0]!r}; write the name of each class in its place"
        )
    return written


def _column_names(text: Text) -> set[str]:
    return set().union(*(row.keys() for row in _rows(text)))


def _rows(text: Text) -> Iterator[dict[str, Any]]:
    """The first records as they stand; a malformed one is refused when all are read."""
    for raw in itertools.islice(all_records(text.files), SAMPLED_RECORDS):
        try:
            yield row_of(raw, text)
        except InputError:
            continue


def column_options(columns: Mapping[str, str]) -> dict[str, Any]:
    """The options of a text whose prompt and completion stand in columns of other names."""
    return {"shape": "prompt_completion", "columns": dict(columns)} if columns else {}


def text_config(files: Sequence[str], options: Mapping[str, Any]) -> TextConfig:
    """The options of a text as the YAML of a study writes them, typed."""
    given = dict(options)
    for name, kind in (("targets", Targets), ("shape", TextShape), ("too_long", TooLongPolicy)):
        if name in given:
            given[name] = kind[given[name]]
    if "columns" in given:
        given["columns"] = ColumnsConfig(**given["columns"])
    return TextConfig(files=list(files), **given)


# ------------------------------------------------------------------------------------------- the task


def find_task(texts: Mapping[str, Sequence[str]], columns: Mapping[str, str]) -> Task:
    """What the labeled texts (name -> files) ask; InputError where their records cannot be read, or differ in kind."""
    opened = {name: _open(name, files, columns) for name, files in texts.items()}
    kinds, completions, of_gold = dict[str, str](), list[tuple[str, str]](), Counter[str]()
    own_choices = set[tuple[str, ...]]()
    for name, text in opened.items():
        for where, fields in read_fields(text):
            kind = "choices" if fields.choices else "text" if fields.text is not None else "completion"
            answer = fields.answer if fields.choices else answer_of(fields, text)
            if kind != "text" and answer is None:
                column = "answer (the index of the right choice)" if fields.choices else "completion"
                raise InputError(
                    f"{where}: expected a labeled record ({name}), found no {column}; if its label stands in another "
                    "column, name it with completion_column"
                )
            kinds.setdefault(kind, where)
            own_choices.update([fields.choices] if fields.choices else [])
            right = fields.choices[answer] if isinstance(answer, int) else answer or ""
            completions.append((prompt_end(fields), right))
            of_gold[right.strip()] += name == "gold"
    if len(kinds) != 1:
        found = ", ".join(f"{kind} ({where})" for kind, where in kinds.items()) or "no record"
        raise InputError(f"labeled texts: expected records of one kind, found {found}; make them alike")
    kind = next(iter(kinds))
    if kind == "choices":
        common = next(iter(own_choices)) if len(own_choices) == 1 else ()
        counts = {choice.strip(): of_gold[choice.strip()] for choice in common}
        return Task(kind=kind, columns=columns, choices=common, counts=counts)
    if kind == "completion":
        return _labels_or_text(completions, columns, of_gold)
    return Task(kind=kind, columns=columns)


def _open(name: str, files: Sequence[str], columns: Mapping[str, str]) -> Text:
    return find_shape(open_text(text_config(files, column_options(columns)), name))


def _labels_or_text(
    completions: Sequence[tuple[str, str]], columns: Mapping[str, str], of_gold: Mapping[str, int]
) -> Task:
    """Completions that are few, short and often repeated are labels; others are free text.

    A label is read after its prompt, so a space is put before each where neither the prompts end with one nor the
    completions begin with one: words after a space are the tokens that models know best.
    """
    counts = Counter(completion.strip() for _, completion in completions)
    are_labels = (
        2 <= len(counts) <= MAX_CLASSES
        and len(completions) >= MIN_RECORDS_OF_CLASS * len(counts)
        and max(map(len, counts)) <= MAX_CLASS_CHARACTERS
    )
    if not are_labels:
        return Task(kind="completion", columns=columns)
    spelled = {completion.strip(): completion for _, completion in completions}
    is_verbatim = all(spelled[completion.strip()] == completion for _, completion in completions)
    needs_space = any(end and not end.isspace() and not c[:1].isspace() for end, c in completions)
    classes = sorted(counts)
    choices = tuple(f" {label}" if needs_space else spelled[label] for label in classes)
    return Task(
        kind="choices",
        columns=columns,
        choices=choices,
        counts={label: of_gold[label] for label in classes},
        is_verbatim=is_verbatim and not needs_space,
    )


def read_fields(text: Text) -> Iterator[tuple[str, Fields]]:
    """Place and fields of each record; InputError for a malformed one, with its place."""
    malformed = MalformedRecords(skip=text.skip_malformed)
    for raw in all_records(text.files, text.read_columns, take=text.take):
        try:
            yield raw[0], fields_of(raw, text)
        except InputError as error:
            malformed.reject(raw[0], str(error))


def answer_of(fields: Fields, text: Text) -> str | None:
    """The answer of a labeled record; None where it has none."""
    if fields.messages:
        last = fields.messages[-1]
        is_answer = isinstance(last, dict) and last.get(text.chat.role) == "assistant"
        return text_content(last.get(text.chat.content, "")) if is_answer else None
    return fields.completion


def prompt_end(fields: Fields) -> str:
    """The last character of a prompt; empty for chats, whose template ends the prompt."""
    return "" if fields.messages is not None else (fields.prompt or "")[-1:]


# --------------------------------------------------------------------------------------------- texts


def corpus_options(task: Task, config: TextConfig) -> dict[str, Any]:
    """What of the corpus is supervised; InputError where its records do not fit those that are labeled.

    Labels: the choices, at which the teacher's distribution is captured. Free text: the completion, which the teacher
    writes where the corpus has none. Plain text: every token.
    """
    text = find_shape(open_text(config, "corpus"))
    where, fields = next(read_fields(text), ("", None))
    if fields is None:
        raise InputError(f"corpus: expected records, found none in {config.files}; check the files")
    is_plain = fields.prompt is None and fields.messages is None
    if is_plain and task.kind != "text":
        column = task.columns.get("prompt", "prompt")
        raise InputError(
            f"{where}: expected a prompt in column {column!r}, as in the labeled records, found plain text; write the "
            "corpus's prompts as those of the labeled records, in a column of that name"
        )
    if task.kind == "text":
        return {} if is_plain else {"targets": "all"}
    if task.kind == "choices":
        if not task.choices and not fields.choices:
            raise InputError(
                f"{where}: expected choices, because the labeled records have choices of their own that differ, found "
                "none; add them to each record of the corpus"
            )
        return {"targets": "choices"}
    return {"targets": "completion"}


def lacks_completions(config: TextConfig) -> bool:
    """Whether the first record of the corpus has a prompt and no completion, so that the teacher has to write it."""
    text = find_shape(open_text(config, "corpus"))
    first = next((fields for _, fields in read_fields(text)), None)
    return first is not None and first.text is None and answer_of(first, text) is None


def missing_ending(labeled: Text, corpus: Text) -> str | None:
    """How the labeled prompts all end, where a prompt of the corpus does not: it asks the teacher something else.

    Of each text the first records; None where the labeled prompts have no common ending of two characters or more.
    """
    ends = [list(_first_prompts(text)) for text in (find_shape(labeled), find_shape(corpus))]
    common = _common_ending(ends[0]).rstrip()
    if len(ends[0]) < 2 or len(common) < 2 or all(prompt.rstrip().endswith(common) for prompt in ends[1]):
        return None
    return common


def _first_prompts(text: Text) -> Iterator[str]:
    for _, fields in itertools.islice(read_fields(text), SAMPLED_RECORDS):
        if fields.prompt:
            yield fields.prompt


def _common_ending(texts: Sequence[str]) -> str:
    common = texts[0] if texts else ""
    for text in texts:
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(reversed(common), reversed(text), strict=False))
        common = common[len(common) - sum(1 for _ in same) :]
    return common
