"""Tokenizers: loaded, hashed by what turns text into ids, compared between teacher and student."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers

from pipeline.config.schema import ModelConfig
from pipeline.core.files import content_hash
from pipeline.core.types import InputError
from pipeline.models.paths import model_folder


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer that lies in a model folder."""
    return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)


def open_tokenizer(config: ModelConfig) -> tuple[Path, Any]:
    """From options to values: the local folder of a model, and its tokenizer."""
    folder = model_folder(config.path, revision=config.revision, with_code=config.trust_remote_code)
    return folder, load_tokenizer(folder, trust_remote_code=config.trust_remote_code)


def vocabulary_size(tokenizer: Any) -> int:
    """The real vocabulary: the tokenizer's, not the padded number of rows that a head may have."""
    return len(tokenizer)


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 of what turns text into ids: model, merges, added tokens, normalizer; not truncation or padding."""
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(f"tokenizer: expected one with a tokenizer.json, found {type(tokenizer).__name__}")
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state.pop("truncation", None)
    state.pop("padding", None)
    return content_hash(state)


def text_settings(tokenizer: Any) -> dict[str, Any]:
    """What else decides how text becomes ids: part of a fingerprint, not of whether two models can share ids."""
    return {"chat_template": tokenizer.chat_template, "end_token_id": tokenizer.eos_token_id}


def check_same_tokenizer(teacher_hash: str, student_hash: str, *, cache: str, student: str) -> None:
    """Refuse a student whose token ids mean something else than the teacher's."""
    if teacher_hash != student_hash:
        raise InputError(
            f"tokenizer: expected {student} to have the teacher's tokenizer {teacher_hash[:12]} ({cache}), "
            f"found {student_hash[:12]}; use a teacher and a student of one family, or capture with another teacher"
        )
