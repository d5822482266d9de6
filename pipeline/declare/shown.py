"""What the models of a study will read: the first record of each text, with what is supervised marked."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

from pipeline.config.schema import ModelConfig, TextConfig
from pipeline.config.study import Study, flat
from pipeline.data.shown import CLOSE, OPEN, sample_lines, sample_text
from pipeline.data.text_files import open_text
from pipeline.models.tokenizer import needs_begin_token, open_tokenizer

READS_WINDOWS = ("corpus", "gold", "teacher_labels", "ceiling")  # the others are scored, whatever their length


def show_texts(texts: Mapping[str, TextConfig], study: Study) -> Iterator[str]:
    """Lines of at most 80 columns: of each text its counts and its first record as the model will read it.

    The corpus as the teacher reads it, the others as the student does. InputError where a record cannot be used.
    """
    yield f"A record of each text as the models read it; {OPEN} {CLOSE} marks what is supervised:"
    yield ""
    for name, config in texts.items():
        model: ModelConfig = study.file.teacher if name == "corpus" else study.file.student
        folder, tokenizer = open_tokenizer(model)
        text = open_text(config, name)
        if name == "corpus":
            given = config.window_begin_token
            begins = needs_begin_token(folder) if given is None else given
            text = dataclasses.replace(text, completes=teacher_writes(study), begins_windows=begins)
        window = study.file.window if name in READS_WINDOWS else None
        yield from sample_lines(sample_text(text, tokenizer, window=window))
        yield ""


def teacher_writes(study: Study) -> bool:
    """Whether the teacher completes the corpus's prompts."""
    how = flat(study.file.capture).get("complete.how", "none")
    return str(getattr(how, "name", how)) != "none"
