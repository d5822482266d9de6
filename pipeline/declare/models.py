"""The two models of a new study: found, complete, of one tokenizer, and how large they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.config.schema import ModelConfig, StudentConfig
from pipeline.core.types import InputError
from pipeline.data.choice_tree import check_no_choice_begins_another
from pipeline.models.compatibility import max_positions
from pipeline.models.loading import meta_model
from pipeline.models.preflight import check_model
from pipeline.models.tokenizer import check_tokenizers, needs_begin_token, open_tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """What a study needs to know of its models before they are loaded."""

    teacher_tokenizer: Any
    student_tokenizer: Any
    longest: int | None
    """Tokens that both can read; None: no limit."""
    teacher_parameters: int
    student_parameters: int
    begins_windows: bool
    """Whether the teacher's windows of a long text begin with the beginning token."""


def open_models(teacher: ModelConfig, student: StudentConfig) -> Models:
    """Check both models without reading their weights.

    InputError where one is missing or incomplete, has an architecture that does not fit, or where their tokenizers give
    an id different meanings.
    """
    (teacher_folder, teacher_tokenizer), (student_folder, student_tokenizer) = map(open_tokenizer, (teacher, student))
    check_tokenizers(teacher_tokenizer, student_tokenizer, names=(teacher.path, student.path))
    check_model(teacher, teacher_tokenizer)
    check_model(student, student_tokenizer)
    limits = [limit for folder in (teacher_folder, student_folder) if (limit := max_positions(folder)) is not None]
    return Models(
        teacher_tokenizer=teacher_tokenizer,
        student_tokenizer=student_tokenizer,
        longest=min(limits, default=None),
        teacher_parameters=_num_parameters(teacher),
        student_parameters=_num_parameters(student),
        begins_windows=needs_begin_token(teacher_folder),
    )


def _num_parameters(config: ModelConfig) -> int:
    return sum(parameter.numel() for parameter in meta_model(config).parameters())


def needs_end_token(choices: tuple[str, ...], tokenizer: Any) -> bool:
    """Whether one choice begins another in tokens, so that only an end token tells them apart."""
    try:
        check_no_choice_begins_another([tokenizer(choice, add_special_tokens=False)["input_ids"] for choice in choices])
    except InputError:
        return tokenizer.eos_token_id is not None
    return False
