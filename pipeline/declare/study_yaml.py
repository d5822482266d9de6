"""The commented YAML of a new study."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.declare.draft import Draft

MAX_COLUMNS = 116
PLAIN = re.compile(r"(?:[A-Za-z_/]|\.{1,2}/)[\w./+-]*")  # text that YAML reads as text without quotes
NOT_TEXT = {"true", "false", "null", "yes", "no", "on", "off", "y", "n"}
COMMENTS = {
    "teacher_labels": "labeled records that train the teacher",
    "corpus": "unlabeled records: the teacher labels them, the student learns from that",
    "gold": "the small trusted text",
    "dev": "held out for decisions, such as which weight is right",
    "test": "held out for the reported scores",
    "ceiling": "the corpus with its true labels: the best that a perfect teacher could do",
}


def study_yaml(draft: Draft) -> str:
    """The file as text; it holds what `StudyFile` may hold, each line with a comment."""
    return "\n".join(_lines(draft)) + "\n"


def _lines(draft: Draft) -> Iterator[str]:
    trains = "trained on teacher_labels" if "teacher_labels" in draft.texts else "ready-made: it is not trained here"
    yield f"# The study `{draft.name}`: a weak teacher and a small gold set train a strong student."
    yield "# Written by `scripts/study.py init`. Every option: StudyFile and schema.py in pipeline/config."
    yield ""
    yield from _entry("teacher", draft.teacher, f"the weak model, {trains}")
    yield from _entry("student", draft.student, "the strong model, before training")
    yield from _entry("window", draft.window.size, window_sentence(draft))
    yield from _entry("runs_dir", f"runs/{draft.name}", "trained models, scores and the report")
    yield from _entry("caches_dir", f"caches/{draft.name}", "what the teacher predicts, written once")
    yield ""
    yield from _text_lines(draft)
    for name in ("teacher_labels", "corpus", "gold", "dev", "test", "ceiling"):
        if name in draft.texts:
            further = draft.corpus if name == "corpus" else {}
            yield from _entry(name, {"files": list(draft.texts[name]), **further}, COMMENTS[name])
    if draft.allow_shared_records:
        yield from _entry("allow_shared_records", True, "records that two of these texts share are accepted")
    yield ""
    yield from _training_lines(draft)


def window_sentence(draft: Draft) -> str:
    """What the window means for the records."""
    window = draft.window
    if draft.task.kind == "text":
        return "tokens of the longest sequence; longer text is split"
    if window.too_long is None:
        return "tokens of the longest sequence; all records fit"
    return f"tokens of the longest sequence; {window.fitting_fraction:.1%} of the records fit"


def _text_lines(draft: Draft) -> Iterator[str]:
    comments = {
        "shape": "how records are read",
        "columns": "the columns of the prompt and of its label",
        "targets": f"what is supervised: {_supervised(draft.text.get('targets'))}",
        "choices": "the labels, as they are written after a prompt",
        "end_token": "whether an end token follows a label or text",
        "too_long": "records that do not fit the window lose their beginning",
    }
    if draft.text:
        yield "text:  # options of all texts below"
    for name, value in draft.text.items():
        yield from _entry(name, value, comments[name], indent="  ")


def _supervised(targets: str | None) -> str:
    return {"completion": "what follows the prompt", "choices": "the choice between labels"}.get(targets or "", "all")


def _training_lines(draft: Draft) -> Iterator[str]:
    settings = draft.settings
    if draft.max_new_tokens is not None:
        yield "capture:"
        yield from _entry("complete.how", "greedy", "the teacher writes an answer to each prompt", indent="  ")
        yield from _entry("complete.max_new_tokens", draft.max_new_tokens, "of at most so many tokens", indent="  ")
    yield "train:  # options of every training run"
    yield from _entry("global_batch", settings.global_batch, "sequences of an update", indent="  ")
    yield from _entry("micro_batch", settings.micro_batch, "of them at once: fewer take less memory", indent="  ")
    yield from _entry("optimizer.learning_rate", settings.learning_rate, "by the size of the student", indent="  ")
    if settings.evaluate_every_steps is not None:
        every = settings.evaluate_every_steps
        yield from _entry("evaluate_every_steps", every, "updates between two looks at dev", indent="  ")
    if draft.exact_match_tokens is not None:
        comment = "answers are written, by at most so many tokens, and compared"
        yield from _entry("scoring.max_new_tokens", draft.exact_match_tokens, comment, indent="  ")
    yield "experiments:  # options of one run alone"
    yield from _experiment_lines(draft)


def _experiment_lines(draft: Draft) -> Iterator[str]:
    settings = draft.settings
    if settings.teacher_epochs is not None:
        teacher = {"epochs": settings.teacher_epochs, "optimizer.learning_rate": settings.teacher_learning_rate}
        yield from _entry("teacher", teacher, "passes over teacher_labels, and its rate", indent="  ")
    gold_only = {"steps": settings.steps["gold_only"]}
    if settings.gold_only_evaluate_every_steps is not None:
        gold_only["evaluate_every_steps"] = settings.gold_only_evaluate_every_steps
    yield from _entry("gold_only", gold_only, "the floor: updates on gold alone", indent="  ")
    yield from _entry("weak_only", {"epochs": settings.epochs}, "passes over the corpus, without gold", indent="  ")
    yield "  combined:  # both: the purpose of a study"
    yield from _entry("epochs", settings.epochs, "passes over the corpus", indent="    ")
    passes = f"{settings.gold_passes:.0f}" if settings.gold_passes >= 1 else "under 1"
    comment = f"of each batch is gold: {passes} passes over it"
    yield from _entry("gold_fraction", settings.gold_fraction, comment, indent="    ")
    yield from _entry("loss.lm.weight", 1.0, "weight of the known labels of gold", indent="    ")
    yield from _entry("loss.kd.weight", 1.0, "weight of the teacher: higher copies it more closely", indent="    ")
    if "ceiling" in draft.texts:
        yield from _entry("ceiling", {"epochs": settings.epochs}, "passes over the true labels", indent="  ")


# ------------------------------------------------------------------------------------------- YAML


def _entry(name: str, value: Any, comment: str, *, indent: str = "") -> Iterator[str]:
    """One option with its comment behind it; a long one with the comment above, and a long list on several lines."""
    line = f"{indent}{name}: {flow(value)}"
    if len(line) + 2 + len(comment) <= MAX_COLUMNS - 2:
        yield f"{line}  # {comment}"
        return
    yield f"{indent}# {comment}"
    if len(line) <= MAX_COLUMNS or not isinstance(value, (list, tuple)):
        yield line
        return
    line = f"{indent}{name}: ["
    for number, item in enumerate(value):
        piece = flow(item) + ("]" if number == len(value) - 1 else ", ")
        if len(line) + len(piece) > MAX_COLUMNS:
            yield line.rstrip()
            line = f"{indent}  "
        line += piece
    yield line


def flow(value: Any) -> str:
    """A value as YAML on one line; any text comes back as it was."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {flow(item)}" for name, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(flow, value)) + "]"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, float):
        return f"{value:.10f}".rstrip("0") + ("0" if value == int(value) else "")
    text = str(value)
    if isinstance(value, int) or (PLAIN.fullmatch(text) and text.lower() not in NOT_TEXT):
        return text
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in json.dumps(text, ensure_ascii=False))
