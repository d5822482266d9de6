"""Tokenizers: load, hash, compare between teacher and student."""

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
    """Load the tokenizer of a model folder."""
    return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)


def open_tokenizer(config: ModelConfig) -> tuple[Path, Any]:
    """The local folder of the model that options describe, and its tokenizer."""
    folder = model_folder(config.path, revision=config.revision, with_code=config.trust_remote_code)
    return folder, load_tokenizer(folder, trust_remote_code=config.trust_remote_code)


def vocabulary_size(tokenizer: Any) -> int:
    """The largest token id plus one; a model's head may have more rows, as padding.

    Not the number of tokens: ids may have gaps, and a row of the head behind a gap is as alive as any other.
    """
    return max(tokenizer.get_vocab().values()) + 1


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 of all that maps text to ids (model, merges, added tokens, normalizer), not of truncation or padding.

    InputError for a tokenizer without tokenizer.json.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"tokenizer: expected one with a tokenizer.json, found {type(tokenizer).__name__}; convert it to a fast "
            "tokenizer"
        )
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state.pop("truncation", None)
    state.pop("padding", None)
    return content_hash(state)


def chat_template_and_end_token(tokenizer: Any) -> dict[str, Any]:
    """What shapes the ids of a record besides the tokenizer's hash: part of a fingerprint.

    Teacher and student may differ in it: their ids still mean the same tokens.
    """
    return {"chat_template": tokenizer.chat_template, "end_token_id": tokenizer.eos_token_id}


def end_token_ids(folder: Path, tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end a completion, ascending: the tokenizer's end token, those of generation_config.json, and the
    token with which the chat template ends a turn of the assistant."""
    ids = {tokenizer.eos_token_id, _turn_end(tokenizer)}
    path = folder / "generation_config.json"
    if path.exists():
        named = json.loads(path.read_text()).get("eos_token_id")
        ids |= set(named if isinstance(named, list) else [named])
    return tuple(sorted(token for token in ids if token is not None))


def _turn_end(tokenizer: Any) -> int | None:
    """The first of the special tokens that the chat template writes after an answer, or None."""
    if not tokenizer.chat_template:
        return None
    answer = "Answer"
    chat = [{"role": "user", "content": "Question"}, {"role": "assistant", "content": answer}]
    try:
        text = str(tokenizer.apply_chat_template(chat, tokenize=False))
    except Exception:  # a template is a program; one that refuses this chat refuses none of the user's
        return None
    after = tokenizer(text[text.rindex(answer) + len(answer) :], add_special_tokens=False)["input_ids"]
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    return next((token for token in after if token in special), None)


def needs_begin_token(folder: Path) -> bool:
    """Whether each window of a long text should begin with the beginning token: Gemma fails without it."""
    path = folder / "config.json"
    return path.exists() and str(json.loads(path.read_text()).get("model_type", "")).startswith("gemma")


def check_same_tokenizer(teacher_hash: str, student_hash: str, *, cache: str, student: str) -> None:
    """InputError if the same id means different tokens for teacher and student."""
    if teacher_hash != student_hash:
        raise InputError(
            f"tokenizer: expected {student} to have the teacher's tokenizer {teacher_hash[:12]} ({cache}), "
            f"found {student_hash[:12]}; use a student of the teacher's family, or capture with another teacher"
        )
